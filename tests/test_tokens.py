"""Every verb on a network that reads tokens: padding decides nothing, and cut networks are saved and loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import torchslice as ts
from tests.texts import CLASSES, config, make_task, tokenizer
from torchslice import TorchsliceError
from torchslice.artefact import read_record
from torchslice.artefact.hub import card
from torchslice.data import Task
from torchslice.find.semantic import metrics
from torchslice.graph.neurons import Neurons
from torchslice.graph.record import evaluating
from torchslice.imports import import_transformers
from torchslice.inputs import take
from torchslice.models.huggingface import Encoder

TRAINING = ts.Training(epochs=3, learning_rate=3e-3, batch_size=16, optimizer="adamw", precision="fp32", progress=False)
METRICS = ["avg", "var", "ens", "taylor"]


def encoder(classes: int = len(CLASSES)) -> Encoder:
    torch.manual_seed(0)
    return Encoder(import_transformers().BertModel(config(), add_pooling_layer=False), 16, classes)


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task()


@pytest.fixture(scope="module")
def trained(task: Task) -> Neurons:
    network = encoder()
    ts.fit(network, task, TRAINING)
    assert ts.accuracy(network, task).overall > 0.5
    return ts.find_neurons(network, task.example, classes=task.classes)


def scores(neurons: Neurons, task: Task, batch_size: int) -> dict[str, torch.Tensor]:
    found = ts.semantic.contributions(neurons, task, metric=METRICS, batch_size=batch_size, progress=False)
    return {name: torch.cat([*found[name].values()], 1) for name in METRICS}


def test_contributions_do_not_depend_on_padding(trained: Neurons, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, together = scores(trained, task, 1), scores(trained, task, 32)
    for name in METRICS:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-3, atol=1e-6)
    monkeypatch.setattr(
        metrics, "spatial_mean", lambda values, kept: values.mean(-1)
    )  # were padding counted, it would show
    for name, blind in scores(trained, task, 32).items():
        assert (blind - alone[name]).abs().max() > 0.01 * alone[name].abs().max()


def test_gates_do_not_depend_on_padding(trained: Neurons, task: Task) -> None:
    gated = ts.gates.attach(trained.on(copy.deepcopy(trained.model)))
    short = min(range(2), key=lambda row: int(task.example["attention_mask"][row].sum()))
    length = int(task.example["attention_mask"][short].sum())
    alone = {name: tensor[short : short + 1, :length] for name, tensor in task.example.items()}
    with evaluating(gated):
        gated(**task.example)
        padded = [values[short] for values in gated.gate_values.values()]
        gated(**alone)
        for values, other in zip(gated.gate_values.values(), padded, strict=True):
            torch.testing.assert_close(values[0], other, rtol=1e-5, atol=1e-6)
        gated(**{**task.example, "attention_mask": torch.ones_like(task.example["attention_mask"])})
        assert any(
            not torch.allclose(v[short], p, atol=1e-4) for v, p in zip(gated.gate_values.values(), padded, strict=True)
        )


def test_masked_equals_extracted_on_other_texts(trained: Neurons, task: Task) -> None:
    slice_ = trained.random(0.5)
    small = ts.extract(trained, slice_)
    for inputs, _ in task.batches("test", 7):
        held = ts.masked(trained, slice_)
        with evaluating(small, held, trained.model):
            expected = held(**inputs)
            torch.testing.assert_close(small(**inputs), expected, rtol=1e-5, atol=1e-5)
            assert not torch.allclose(trained.model(**inputs), expected, atol=1e-4)


def test_reuse_saves_all_that_is_needed_to_answer(trained: Neurons, task: Task, tmp_path: Path) -> None:
    slices = ts.semantic.class_slices(trained, task, strategy=ts.semantic.PerLayer(0.5), progress=False)
    pair = ts.reuse(trained, task, slices, classes=["animals", "weather"], training=TRAINING)
    ts.save(pair, tmp_path / "pair.safetensors")
    again = ts.load(tmp_path / "pair.safetensors")
    raw = task.restrict(again.classes).test.texts
    texts = ts.data.Texts(raw, torch.zeros(len(raw), dtype=torch.int64)).like(again.preprocessing)
    for inputs in texts.read([torch.arange(len(texts))]):
        with evaluating(pair.model):
            assert torch.equal(again.model(**inputs), pair.model(**inputs))


def test_gates_and_sub_tasks_are_trained_cut_and_reused(trained: Neurons, task: Task) -> None:
    gated = ts.gates.attach(trained.on(copy.deepcopy(trained.model)))
    ts.fit(gated, task, TRAINING, objective=ts.gates.objective())
    slices: Any = ts.gates.class_slices(gated, task, progress=False)
    assert ts.reuse(gated, task, slices, classes=["animals", "colours"], tune=False).classes == ("animals", "colours")
    rankings = ts.subtasks.rank(trained, task, progress=False)
    network = copy.deepcopy(trained.model)
    ts.fit(network, task, TRAINING, objective=ts.subtasks.objective(trained.on(network), rankings))
    options: Any = {"classes": ["animals", "colours"], "mac_retention": 0.8, "tune": False}
    small = ts.reuse(trained.on(network), task, rankings, **options).model
    assert ts.accuracy(small, task.restrict(["animals", "colours"])).overall > 0.7


def test_extending_by_a_class_keeps_the_old_answers_bit_for_bit(task: Task, tmp_path: Path) -> None:
    known, network = task.restrict(["animals", "weather"]), encoder(2)
    ts.fit(network, known, TRAINING)
    neurons = ts.find_neurons(network, known.example, classes=known.classes)
    critical = neurons.random(0.5)
    before = ts.extract(neurons, critical).eval()
    extended = ts.extend(neurons, task.restrict(["colours"]), critical, known=known, replay=0.5, training=TRAINING)
    ts.save(extended, tmp_path / "three.safetensors", preprocessing=task.preprocessing)
    again = type(extended).of(
        ts.find_neurons(ts.load(tmp_path / "three.safetensors").model, task.example), extended.extension
    )
    for inputs, _ in known.batches("test", 5):
        with torch.no_grad():
            assert torch.equal(before(**inputs), extended.network(0)(**inputs))
            assert torch.equal(before(**inputs), again.network(0)(**inputs))
            assert extended.joined()(**inputs).shape == (len(inputs["input_ids"]), 3)


def test_readapt_and_restructure(trained: Neurons, task: Task) -> None:
    critical = trained.random(0.5)
    adapted = ts.readapt(trained, task, critical, task.train.take(torch.arange(30)), training=TRAINING)
    assert adapted.best["validation_accuracy"] >= adapted.log[0]["validation_accuracy"]
    smaller = ts.restructure(trained, task, critical, param_retention=0.9, training=TRAINING)
    assert sum(p.numel() for p in smaller.model.parameters()) <= 0.9 * sum(
        p.numel() for p in trained.model.parameters()
    )


def test_deeplift_is_refused_for_tokens(trained: Neurons, task: Task) -> None:
    with pytest.raises(TorchsliceError, match="inputs.'input_ids'. is a tensor int64 .*, not of floating point"):
        ts.semantic.contributions(trained, task, metric="deeplift")


def test_a_loader_that_pads_its_own_batches(trained: Neurons, task: Task) -> None:
    pad = import_transformers().DataCollatorWithPadding(tokenizer())
    rows = [{**tokenizer()(text), "label": int(y)} for text, y in zip(task.train.texts, task.train.labels, strict=True)]
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=pad)
    own = ts.data.task(loader, test=loader, classes=task.classes)
    lengths = {inputs["input_ids"].shape[1] for inputs, _ in own.batches("train", 4)}
    assert len(lengths) > 1
    ts.fit(copy.deepcopy(trained.model), own, TRAINING)
    found = scores(trained, own, 8)["taylor"]
    assert found.shape == (len(CLASSES), len(trained)) and take(task.example, slice(0, 1)).keys() == task.example.keys()


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_an_export_takes_texts_of_any_length(format: str, trained: Neurons, task: Task, tmp_path: Path) -> None:
    small, path = ts.extract(trained, trained.random(0.5)), tmp_path / f"small.{format}"
    ts.export(small, path, samples=next(task.batches("validation", 8))[0], preprocessing=task.preprocessing)
    if format == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(path)
    for inputs, _ in task.batches("test", 4):
        if format == "onnx":
            found = torch.from_numpy(session.run(None, {name: t.numpy() for name, t in inputs.items()})[0])
        else:
            found = torch.export.load(path).module()(*inputs.values())
        with torch.no_grad():
            torch.testing.assert_close(found.detach(), small(**inputs), rtol=1e-5, atol=1e-5)


def test_the_card_of_a_network_of_texts_is_short_and_asks_for_no_permission(trained: Neurons, tmp_path: Path) -> None:
    path = tmp_path / "three.safetensors"
    ts.save(trained.model, path, classes=trained.classes, preprocessing=make_task().preprocessing)
    text = card(read_record(path), 'pull("me/three")')
    assert '"tokenizer": "in the file", "pad_token": 0' in text and len(text) < 1500
    assert "allow_import" not in text and ts.load(path).classes == trained.classes


def test_a_batch_of_longer_texts_than_the_model_takes_is_refused() -> None:
    inputs = {"input_ids": torch.zeros(2, 17, dtype=torch.int64), "attention_mask": torch.ones(2, 17)}
    for model in (encoder(), import_transformers().BertForSequenceClassification(config())):
        with pytest.raises(TorchsliceError, match="texts of 17 tokens, and the model takes 16 at most. Shorten"):
            ts.find_neurons(model, inputs)
