"""What was made of networks with any inputs is saved, loaded and computes the same bits."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import torchslice as ts
from tests.battery.trained import KINDS, QUICK, learnable, trained
from torchslice.cut.widen import widen
from torchslice.judge import predict
from torchslice.maintain import Extended

NAMES = pytest.mark.parametrize("name", KINDS)


def random_slices(name: str):
    neurons, task = trained(name)
    return {label: neurons.random(0.5, seed=seed) for seed, label in enumerate(task.classes)}


@NAMES
def test_results_come_back_with_what_they_know(name: str, tmp_path) -> None:
    neurons, task = trained(name)
    pair = ["ant", "cat"]
    made = ts.reuse(neurons, task, random_slices(name), classes=pair, tune=False)
    tuned = ts.finetune(made.model, task.restrict(pair), replace(QUICK, epochs=1))
    for number, (thing, given) in enumerate([(made, {}), (tuned, {"classes": pair}), (made.model, {"classes": pair})]):
        path = tmp_path / f"{number}.safetensors"
        ts.save(thing, path, **given)
        loaded = ts.load(path, allow_import=True)
        model = thing if isinstance(thing, torch.nn.Module) else thing.model
        assert loaded.classes == tuple(pair) and loaded.slice == (made.slice if thing is made else None)
        assert torch.equal(predict(loaded.model, task.restrict(pair)), predict(model, task.restrict(pair)))
        again = ts.find_neurons(loaded.model, task.example, classes=loaded.classes)
        assert len(again) == len(ts.find_neurons(model, task.example))


@NAMES
def test_a_wider_network_comes_back(name: str, tmp_path) -> None:
    neurons, task = trained(name)
    wide = widen(neurons, factor=1.5).model
    ts.save(wide, tmp_path / "wide.safetensors")
    loaded = ts.load(tmp_path / "wide.safetensors", allow_import=True).model
    assert torch.equal(predict(loaded, task), predict(wide, task))


@NAMES
def test_an_extension_comes_back_and_goes_on(name: str, tmp_path) -> None:
    neurons, task = trained(name)
    six, critical = learnable(name, classes=6), neurons.random(0.5)
    once = ts.extend(neurons, six.restrict(["eel"]), critical, known=task, replay=0.5, training=QUICK)
    path = tmp_path / "extended.safetensors"
    ts.save(once, path)
    loaded = ts.load(path, allow_import=True)
    assert loaded.classes == once.classes
    found = ts.find_neurons(loaded.model, task.example, classes=loaded.classes)
    again = Extended.of(found, loaded.extension)
    assert torch.equal(predict(again.network(0), task), predict(once.network(0), task))
    assert torch.equal(
        predict(again.joined(), six.restrict(once.classes)), predict(once.joined(), six.restrict(once.classes))
    )
    known = ts.data.joined(task, six.restrict(["eel"]))
    more = ts.extend(
        again, six.restrict(["fox"]), critical | found.random(0.5), known=known, replay=0.5, training=QUICK
    )
    assert more.classes[-1] == "fox"


def test_a_fresh_process_needs_only_the_class(tmp_path) -> None:
    neurons, task = trained("dictionary")
    ts.save(ts.extract(neurons, neurons.random(0.5)), tmp_path / "small.safetensors", classes=task.classes)
    torch.save(task.example, tmp_path / "example.pt")
    code = (
        "import sys, torch, torchslice as ts\n"
        "loaded = ts.load(sys.argv[1], allow_import=True)\n"
        "with torch.no_grad(): torch.save(loaded.model(**torch.load(sys.argv[2]))['logits'], sys.argv[3])"
    )
    files = [str(tmp_path / file) for file in ("small.safetensors", "example.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, cwd=Path(__file__).parents[2], timeout=120)
    with torch.no_grad():
        expected = ts.extract(neurons, neurons.random(0.5)).eval()(**task.example)["logits"]
    assert torch.equal(torch.load(files[2]), expected)
