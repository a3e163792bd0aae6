"""torchslice readapt: from a run and new samples to an adapted artefact, and what it refuses."""

import dataclasses

import pytest
import torch

import torchslice as ts
from torchslice.data import Split
from torchslice.runs import Run
from torchslice.semantic import contributions
from torchslice.use import read_record, readapt, worthiest

from .conftest import TINY

RUNNING = ("--device", "cpu", "--seed", 2, "--epochs", 1)
SOURCE = """
import dataclasses, torch, torchslice as ts

def dim(names="0123456789"):
    data = ts.data.load("digits").restrict(list(str(names)))
    dimmed = {n: ts.data.Split(s.images // 2, s.labels) for n, s in vars(data).items() if isinstance(s, ts.data.Split)}
    return dataclasses.replace(data, **dimmed)

def wide():
    data = ts.data.load("digits")
    wide = {n: ts.data.Split(s.images.repeat(1, 1, 1, 2), s.labels) for n, s in vars(data).items()
            if isinstance(s, ts.data.Split)}
    return dataclasses.replace(data, **wide)

def letters():
    return dataclasses.replace(ts.data.load("digits"), classes=tuple("abcdefghij"))
"""


@pytest.fixture
def sources(tmp_path, monkeypatch):
    (tmp_path / "new_samples_for_a_test.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return "new_samples_for_a_test"


def test_it_saves_what_python_makes(torchslice, standard, sources, tmp_path):
    path = tmp_path / "new" / "adapted.safetensors"
    options = ("--param-share", 0.3, "--replay", "0,1", "--classifier", "--data-option", "names=8210", *RUNNING)
    result = torchslice("readapt", standard, f"{sources}:dim", "--out", path, *options, "--json").json
    run, data = Run.open(standard), TINY.load_data()
    network, running = run.network(data, device="cpu"), {"seed": 2, "device": "cpu", "progress": False}
    scores = {layer: s.mean(0) for layer, s in contributions(network, data, **running)["taylor"].items()}
    critical = worthiest(network, ts.find_neurons(network, data.example), scores, 0.3)
    few = data.restrict(list("8210")).train
    new = Split(few.images // 2, torch.tensor([8, 2, 1, 0])[few.labels])
    made = readapt(network, critical, new, data, replay=(0, 1), classifier=True, epochs=1, **running)
    assert result["best_epoch"] == made.best_epoch and result["replay"] == made.replay
    assert result["param_share"] == made.param_share < 0.35 and len(result["epochs"]) == 2
    with torch.no_grad():
        assert torch.equal(ts.load(path)(data.example), made.model(data.example))
    assert ts.load(path).classes == data.classes and read_record(path)["slice"] == critical.to_plain()
    text = torchslice("evaluate", path, f"{sources}:dim", "--device", "cpu", "--json").json
    dimmed = dataclasses.replace(data, test=Split(data.test.images // 2, data.test.labels))
    assert text["accuracy"] == ts.accuracy(made.model, dimmed).overall


def test_with_the_slices_of_the_run(torchslice, standard_copy, sources, tmp_path):
    options = ("--by", "contribution", "--samples", 20, "--theta", 0.7, "--device", "cpu")
    assert torchslice("slice", standard_copy, *options).code == 0
    path = tmp_path / "adapted.safetensors"
    result = torchslice("readapt", standard_copy, f"{sources}:dim", "--out", path, *RUNNING)
    assert "new samples" in result.out and f"torchslice evaluate {path}" in result.out
    part = ts.slices.union(Run.open(standard_copy).slices().values())
    assert read_record(path)["metrics"]["neuron_retention"] == part.neuron_retention


@pytest.mark.parametrize(
    ("data", "options", "parts"),
    [
        ("letters", (), ["'a'", "Known: 0, 1"]),
        ("wide", (), ["1x8x16", "1x8x8"]),
        ("dim", ("--param-share", 1.0), ["covers every neuron"]),
        ("dim", ("--param-share", 0.0), ["param_share", "(0, 1]"]),
        ("dim", ("--replay", "some"), ["--replay 'some'"]),
        ("dim", ("--replay", "-1"), ["replay of 0 or more"]),
        ("dim", ("--learning-rate", 0), ["learning_rate above 0"]),
    ],
)
def test_what_is_refused(torchslice, standard, sources, tmp_path, data, options, parts):
    path = tmp_path / "x.safetensors"
    command = ("readapt", standard, f"{sources}:{data}", "--out", path, "--param-share", 0.3, *RUNNING, *options)
    torchslice(*command).refused(*parts)
    assert not path.exists()
