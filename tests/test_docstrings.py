"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import copy
import doctest
import importlib
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchslice as ts

ROOT = Path(ts.__file__).parent
FILES = [path.relative_to(ROOT.parent).with_suffix("") for path in sorted(ROOT.rglob("*.py"))]
MODULES = [".".join(path.parts).removesuffix(".__init__") for path in FILES if "cli" not in path.parts]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
QUICK = ts.Training(epochs=1, progress=False, device="cpu", precision="fp32")


@cache
def given() -> SimpleNamespace:
    """What examples may use without making it: a task, a trained model and what follows from them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        task = ts.data.load("digits")
        model = ts.models.create("convnet", num_classes=10, channels=1, width=0.25)
        fresh = ts.models.create("convnet", num_classes=10, channels=1, width=0.25)
        ts.fit(model, task, ts.Training(epochs=2, progress=False, device="cpu", precision="fp32"))
        neurons = ts.find_neurons(model, task.example, classes=task.classes)
        scores = ts.semantic.contributions(neurons, task, metric="taylor", samples_per_class=32, progress=False)
        slices = ts.semantic.class_slices(neurons, task, scores, strategy=ts.semantic.PerClass(0.2))
        small = ts.extract(neurons, slices["3"] | slices["8"], classes=["3", "8"])
        gated = ts.gates.attach(ts.find_neurons(fresh, task.example, classes=task.classes))
    names = {"task": task, "model": model, "neurons": neurons, "scores": scores, "slices": slices, "gated": gated}
    return SimpleNamespace(**names, critical=neurons.random(0.5), small=small)


def names(folder: Path) -> dict[str, Any]:
    return {**vars(given()), "torch": torch, "nn": nn, "ts": ts, "Tensor": Tensor, "folder": folder, "quick": QUICK}


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, tmp_path: Path) -> None:
    module = importlib.import_module(name)
    found = [test for test in doctest.DocTestFinder().find(module, name) if test.examples]
    if not found:
        return
    before = {key: copy.deepcopy(getattr(given(), key).state_dict()) for key in ("model", "small")}
    runner, report = doctest.DocTestRunner(optionflags=OPTIONS), []
    for number, test in enumerate(found):
        folder = tmp_path / str(number)
        folder.mkdir()
        test.globs = {**vars(module), **names(folder)}
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
    for key, state in before.items():
        network = getattr(given(), key)
        assert not network.training, f"an example changes the mode of {key}"
        same = all(torch.equal(tensor, state[entry]) for entry, tensor in network.state_dict().items())
        assert same, f"an example changes {key}"


def test_most_public_functions_have_an_example() -> None:
    """Verbs without one are listed here, so that one more is a decision."""
    bare = []
    for name in ts.__all__:
        thing = getattr(ts, name)
        if not isinstance(thing, type(ts)) and ">>>" not in (thing.__doc__ or ""):
            bare.append(name)
    assert bare == ["TorchsliceError"]
