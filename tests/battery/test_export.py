"""Cut networks as programs: the same logits in ONNX Runtime, at batch sizes that were not traced."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tests.battery.zoo import NETWORKS, logits, make, prepared, unseen
from torchslice.artefact import export, save
from torchslice.cut.extract import extract


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cut_network_runs_in_onnx_runtime(name: str, tmp_path) -> None:
    neurons = prepared(name)
    small = extract(neurons, neurons.random(0.5), classes=[1, 4, 9])
    made = export(small, tmp_path / "small.onnx", samples=unseen(neurons.example), output=neurons.output)
    assert made.samples >= 4 and made.largest > 1e-3
    assert made.difference <= 2e-6 * max(1.0, made.largest)
    assert [file.name for file in tmp_path.iterdir()] == ["small.onnx"], "weights lie beside the file"


@pytest.mark.parametrize("name", ["two inputs", "dictionary", "answering", "tokens", "resnet18"])
def test_a_cut_network_runs_as_an_exported_program(name: str, tmp_path) -> None:
    neurons = prepared(name)
    small = extract(neurons, neurons.random(0.5), classes=[1, 4, 9])
    made = export(small, tmp_path / "small.pt2", samples=unseen(neurons.example), output=neurons.output)
    assert made.difference <= 2e-6 * max(1.0, made.largest)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_recipe_of_the_docs_loads_an_artefact_without_torchslice(name: str, tmp_path) -> None:
    page = (Path(__file__).parents[2] / "docs/exporting.md").read_text()
    read, build = re.findall(r"```python\n((?:with safe_open|for path, module).*?)```", page, re.DOTALL)
    neurons = prepared(name)
    small = extract(neurons, neurons.random(0.5), classes=[1, 4, 9]).eval()
    save(small, tmp_path / "pair.safetensors")
    given = {"net": make(name)[0], "json": json, "nn": nn, "safe_open": safe_open}
    exec(read.replace("pair.safetensors", str(tmp_path / "pair.safetensors")), given)
    exec(build, given)
    inputs = unseen(neurons.example)
    torch.testing.assert_close(logits(given["net"].eval(), inputs), logits(small, inputs), rtol=0, atol=2e-6)
