"""Networks of transformers from folders and configurations on this machine."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

import torchslice as ts
from tests.texts import CLASSES, LONGEST, WORDS, config, make_task, write_folder
from torchslice import TorchsliceError
from torchslice.imports import import_transformers
from torchslice.models import check_tokenizer, create, is_trained
from torchslice.models.huggingface import Encoder


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("nothing may be looked for on the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def classifier(classes: int) -> Any:
    return import_transformers().BertForSequenceClassification(config(num_labels=classes)).eval()


def test_an_encoder_gets_mean_pooling_and_a_linear_layer(tmp_path: Path) -> None:
    encoder = import_transformers().BertModel(config()).eval()
    network = create(f"hf:{write_folder(tmp_path, encoder)}", num_classes=5)
    assert isinstance(network, Encoder) and network.classifier.out_features == 5
    inputs = make_task().example
    with torch.no_grad():
        tokens = encoder(**inputs).last_hidden_state  # [2, T, width]
        means = torch.stack(
            [row[mask.bool()].mean(0) for row, mask in zip(tokens, inputs["attention_mask"], strict=True)]
        )
        assert torch.allclose(network.eval()(**inputs), network.classifier(means), atol=1e-6)


def test_a_classifier_keeps_its_last_layer_where_it_has_the_classes(tmp_path: Path) -> None:
    own, inputs = classifier(3), make_task().example
    path = write_folder(tmp_path, own)
    with torch.no_grad():
        assert torch.equal(create(f"hf:{path}", 3).eval()(**inputs).logits, own(**inputs).logits)
    other: Any = create(f"hf:{path}", 4)
    assert other.classifier.out_features == 4
    assert torch.equal(other.bert.pooler.dense.weight, own.bert.pooler.dense.weight)
    assert is_trained(f"hf:{path}", 3) and not is_trained(f"hf:{path}", 4) and not is_trained("resnet18", 3)
    assert str(tmp_path) not in repr([vars(module) for module in other.modules()])


def test_a_configuration_gives_an_untrained_network(tmp_path: Path) -> None:
    config(architectures=["BertForSequenceClassification"]).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        network: Any = create(f"hf:{path}", num_classes=3, num_hidden_layers=1)
        assert len(network.bert.encoder.layer) == 1 and network.num_labels == 3
        assert not is_trained(f"hf:{path}", 3)
    with pytest.raises(TorchsliceError, match="a BertConfig has no 'layers'; it has .*num_hidden_layers"):
        create(f"hf:{tmp_path}", num_classes=3, layers=1)


def test_images_too(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vit = import_transformers().ViTConfig(
        image_size=8, patch_size=4, architectures=["ViTForImageClassification"], **sizes
    )
    vit.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 8, 8)
    neurons = ts.find_neurons(create(f"hf:{tmp_path}", 7), images)
    assert neurons.num_classes == 7 and len(neurons) >= 24


def test_what_is_refused(tmp_path: Path) -> None:
    def refused(message: str, path: Path, **arguments: Any) -> None:
        with pytest.raises(TorchsliceError, match=message):
            create(f"hf:{path}", num_classes=3, **arguments)

    refused("there is no .*nowhere; hf: needs a folder with config.json", tmp_path / "nowhere")
    pickled = write_folder(tmp_path / "pickled")
    torch.save({}, pickled / "pytorch_model.bin")
    refused("pytorch_model.bin is a pickle, which could run code", pickled)
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}))
    (own / "mine.py").write_text("raise SystemExit('the code in the folder was run')")
    refused("is no configuration that transformers knows", own)
    (own / "config.json").write_text("{")
    refused("is no configuration that transformers knows", own)
    lacking = write_folder(tmp_path / "lacking", import_transformers().BertModel(config()))
    content = json.loads((lacking / "config.json").read_text())
    (lacking / "config.json").write_text(json.dumps({**content, "num_hidden_layers": 3}))
    refused("the weights in .* lack 'encoder.layer.2.* of a BertModel", lacking)


def test_a_tokenizer_of_another_network_is_refused(tmp_path: Path) -> None:
    path = write_folder(tmp_path, vocab_size=len(WORDS) - 1)
    with pytest.raises(TorchsliceError, match=rf"has {len(WORDS)} tokens and its network knows {len(WORDS) - 1}"):
        check_tokenizer(str(path), len(WORDS), 512)
    assert check_tokenizer(str(path), 3, 10**30) == LONGEST and check_tokenizer(str(path), 3, 5) == 5
    task = make_task()  # and where nobody knows the folder: the example has the highest token
    small = Encoder(import_transformers().BertModel(config(vocab_size=len(WORDS) - 1)), 16, len(CLASSES))
    with pytest.raises(TorchsliceError, match="cannot run on the example .*word_embeddings.* index out of range"):
        ts.find_neurons(small, task.example)
