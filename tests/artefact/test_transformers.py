"""Networks of transformers in files: their configuration comes back, and no code but the layers' runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchslice as ts
from tests.artefact.test_file import rewrite
from tests.texts import config
from torchslice import TorchsliceError
from torchslice.artefact import read_record
from torchslice.imports import import_transformers
from torchslice.inputs import run

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "num_labels": 3}
WORDS = {**SMALL, "vocab_size": 40, "pad_token_id": 0}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "Bert": WORDS,
    "Roberta": {**WORDS, "max_position_embeddings": 20},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 40, "num_labels": 3},
    "Electra": {**WORDS, "embedding_size": 16},
    "Albert": {**WORDS, "embedding_size": 16},
    "MPNet": WORDS,
    "DebertaV2": WORDS,
    "ModernBert": {**WORDS, **SPECIAL},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40, "num_labels": 3, "pad_token_id": 0},
    "Llama": {**WORDS, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_a_classifier_of_texts_comes_back(family: str, tmp_path: Path) -> None:
    transformers = import_transformers()
    made = getattr(transformers, f"{family}Config")(**CONFIGURATIONS[family])
    network = getattr(transformers, f"{family}ForSequenceClassification")(made).eval()
    ts.save(network, tmp_path / "network.safetensors")
    again: Any = ts.load(tmp_path / "network.safetensors").model
    inputs = {"input_ids": torch.randint(3, 40, (2, 7)), "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}
    with torch.no_grad():
        assert torch.equal(run(again, inputs), run(network, inputs))
    assert again.config is not made and again.config.to_dict() == made.to_dict()
    assert all(module.config is again.config for module in again.modules() if hasattr(module, "config"))


def test_a_cut_classifier_of_images_comes_back(tmp_path: Path) -> None:
    transformers = import_transformers()
    network = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **SMALL)).eval()
    images = torch.randn(2, 3, 8, 8)
    neurons = ts.find_neurons(network, images)
    small = ts.extract(neurons, neurons.random(0.5), classes=[0, 2])
    ts.save(small, tmp_path / "small.safetensors")
    again = ts.load(tmp_path / "small.safetensors")
    assert again.versions.keys() == {"python", "torchslice", "torch", "transformers"}
    with torch.no_grad():
        assert torch.equal(run(again.model, images), run(small, images))


class Mine(import_transformers().PreTrainedConfig):
    """A configuration of one's own."""


class Holder(nn.Module):
    def __init__(self, held: Any) -> None:
        super().__init__()
        self.weight, self.config = nn.Parameter(torch.ones(1)), held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_a_configuration_of_ones_own_needs_permission(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    ts.save(Holder(Mine(number=3)), path)
    with pytest.raises(TorchsliceError, match="importing that runs the code"):
        ts.load(path)
    again: Any = ts.load(path, allow_import=True).model
    assert type(again.config) is Mine and again.config.number == 3
    with pytest.raises(TorchsliceError, match="attribute 'config' of the Holder, 'model': it holds a torch.nn.modules"):
        ts.save(Holder(Mine(model=nn.Linear(2, 2))), path)


@pytest.mark.parametrize("what", ["constructor", "method", "dunder", "module"])
def test_a_record_cannot_make_a_configuration_do_anything_else(what: str, tmp_path: Path) -> None:
    path = tmp_path / "bert.safetensors"
    ts.save(import_transformers().BertModel(config()), path)
    assert json.dumps(read_record(path)["configs"]).count("BertConfig") == 1

    def change(record: Any) -> None:
        (only,) = record["configs"]
        if what == "constructor":
            only["class"] = "transformers.models.bert.tokenization_bert:BertTokenizer"
        elif what == "module":
            only["class"] = "torch.nn.modules.linear:Linear"
        else:
            only["attributes"]["to_dict" if what == "method" else "__class__"] = 3

    rewrite(path, change, forge=True)
    with pytest.raises(TorchsliceError, match=r"cannot load .*(never loaded|no configuration|cannot be an attribute)"):
        ts.load(path)
