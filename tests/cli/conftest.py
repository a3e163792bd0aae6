"""The command line, called in this process, and a few tiny networks that the tests share."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import torchslice as ts
from torchslice.cli import main
from torchslice.runs import Recipe, Run
from torchslice.runs.recipe import Method

TRAINING = ts.Training(epochs=2, batch_size=64, precision="fp32")
TINY = Recipe("convnet", "digits", Method("standard"), TRAINING, {"width": 0.125})
MODEL = ["convnet", "digits", "--model-argument", "width=0.125"]
TRAIN = ["train", *MODEL, "--epochs", 2, "--batch-size", 64, "--precision", "fp32", "--device", "cpu"]
QUICK = ["--epochs", 1, "--batch-size", 64, "--precision", "fp32", "--device", "cpu"]
OWN = """
import dataclasses, torchslice as ts

def load(names="01234"):
    return ts.data.load("digits").restrict(list(str(names)))

def dim(names="0123456789"):
    task = load(names)
    return dataclasses.replace(task, train=dataclasses.replace(task.train, images=task.train.images // 2))

def wide():
    task = ts.data.load("digits")
    splits = {name: task.split(name) for name in ("train", "validation", "test")}
    wide = {n: dataclasses.replace(s, images=s.images.repeat(1, 1, 1, 2)) for n, s in splits.items()}
    return dataclasses.replace(task, **wide)

def letters():
    return dataclasses.replace(ts.data.load("digits"), classes=tuple("abcdefghij"))
"""
#: What looks like a parameter of a verb in an error and is none.
ALLOWED = r"state_dict|weights_sha256|format_version|input_shape|__round__|(width|channels|num_classes|groups)="


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)

    def refused(self, *parts: str) -> None:
        """Raise unless the command ended with 2, said nothing, and gave one line, in words of the command line."""
        assert self.code == 2 and not self.out, (self.code, self.out)
        (line,) = self.err.splitlines()
        assert line.startswith("torchslice"), line
        assert not [part for part in parts if part not in line], line
        text = re.sub(ALLOWED, "", re.sub(r"'[^']*'|/\S+", "", line))
        assert not re.search(r"\b[a-z]+_[a-z_]+|\b[a-z]+=", text), f"a parameter of Python: {line}"


@pytest.fixture
def torchslice(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run(*arguments: object) -> Result:
        code = main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        return Result(code, streams.out, streams.err)

    return run


def train(folder: Path, recipe: Recipe) -> Path:
    """Train a run and return its folder."""
    task = recipe.load_task()
    Run.start(folder, recipe, task).train(task, device="cpu", progress=False)
    return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all that the tests share; nothing is written there but by the fixtures."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def standard(shared: Path) -> Path:
    """A run that was trained the usual way, without slices."""
    return train(shared / "standard", TINY)


@pytest.fixture(scope="session")
def gates(shared: Path) -> Path:
    """A run with gates, without slices."""
    return train(shared / "gates", replace(TINY, method=Method("gates")))


@pytest.fixture(scope="session")
def subtasks(shared: Path) -> Path:
    """A run of sub-task training."""
    return train(shared / "subtasks", replace(TINY, method=Method("subtasks")))


@pytest.fixture(scope="session")
def own(shared: Path) -> Iterator[str]:
    """Name of a module with data sets of one's own."""
    (shared / "digitsofatest.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(shared)
        patch.setattr(sys, "dont_write_bytecode", True)
        yield "digitsofatest"


@pytest.fixture(scope="session")
def five(shared: Path, own: str) -> Path:
    """A standard run on five digits."""
    return train(shared / "five", replace(TINY, data=f"{own}:load", training=replace(TRAINING, epochs=3)))


def neurons_of(folder: Path) -> tuple[Any, ts.data.Task]:
    """Return the network of a run and its task."""
    run = Run.open(folder)
    task = run.load_task()
    return run.network(task, device="cpu"), task


@pytest.fixture(scope="session")
def sources(standard: Path, shared: Path) -> dict[str, list[object]]:
    """One network in all the ways that a command can start from it."""
    neurons, task = neurons_of(standard)
    state = neurons.model.state_dict()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, shared / "weights.pt")
    save_file(state, shared / "weights.safetensors")
    ts.save(neurons.model, shared / "whole.safetensors", classes=task.classes, preprocessing=task.preprocessing)
    return {
        "run": [standard],
        "pt": [*MODEL, "--weights", shared / "weights.pt"],
        "safetensors": [*MODEL, "--weights", shared / "weights.safetensors"],
        "artefact": [shared / "whole.safetensors", "digits"],
    }


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copy a run, to change it."""
    return lambda run: Path(shutil.copytree(run, tmp_path / "copy" / run.name))
