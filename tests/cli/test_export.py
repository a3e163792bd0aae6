"""torchslice export, from runs, weights, artefacts and extended networks."""

import json

import onnxruntime
import pytest
import torch

import torchslice as ts

from .conftest import QUICK, neurons_of


def run_onnx(path, samples):
    session = onnxruntime.InferenceSession(path.read_bytes())
    about = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    (logits,) = session.run(["logits"], {"input": samples.numpy()})
    return about, torch.from_numpy(logits)


@pytest.mark.parametrize("kind", ["run", "pt", "artefact"])
def test_every_source_becomes_the_same_program(torchslice, standard, sources, kind, tmp_path):
    result = torchslice("export", *sources[kind], "--out", tmp_path / "a.pt2", "--json").json
    assert result["format"] == "pt2" and result["samples"] == 64 and result["difference"] < 1e-5
    assert result["classes"] == list("0123456789") and result["inputs"] == ["input"]
    neurons, task = neurons_of(standard)
    program = torch.export.load(tmp_path / "a.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(task.example), neurons.logits(task.example), rtol=1e-5, atol=1e-5)


def test_a_sub_model_becomes_onnx(torchslice, subtasks, tmp_path):
    part, out = tmp_path / "part.safetensors", tmp_path / "part.bin"
    assert torchslice("extract", subtasks, "--classes", "3,8", "--out", part, "--device", "cpu").code == 0
    result = torchslice("export", part, "digits", "--format", "onnx", "--out", out)
    assert result.code == 0 and f"{out}, " in result.out and "differs by" in result.out
    task = ts.data.load("digits").restrict(["3", "8"])
    about, logits = run_onnx(out, task.example)
    with torch.no_grad():
        torch.testing.assert_close(logits, ts.load(part).model(task.example), rtol=1e-5, atol=1e-5)
    assert about["classes"] == ["3", "8"] and about["preprocessing"]["input_shape"] == [1, 8, 8]
    torchslice("export", part, "digits", "--format", "onnx", "--out", out).refused("exists", "--force")


def test_an_extended_network_answers_with_all_classes(torchslice, five, tmp_path):
    saved, words = tmp_path / "ten.safetensors", ("--classes", "5,6", "--neuron-fraction", 0.5)
    assert torchslice("extend", five, "--new", "digits", *words, "--out", saved, *QUICK).code == 0
    result = torchslice("export", saved, "digits", "--out", tmp_path / "ten.pt2", "--json").json
    assert result["classes"] == list("0123456") and result["difference"] < 1e-5
