"""The command line, called in this process, and one tiny trained run that the tests share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from torchslice.cli import main
from torchslice.runs import Recipe, Run

TINY = Recipe("convnet", "digits", "mwt", model_arguments={"width": 0.125}, epochs=2, batch_size=64, precision="fp32")
TRAIN = ["train", "convnet", "digits", "--model-argument", "width=0.125", "--batch-size", "64", "--precision", "fp32"]
TRAIN += ["--method", "mwt"]


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
        """Raise unless the command ended with 2, said nothing, and gave one line with all the parts."""
        assert self.code == 2 and not self.out, (self.code, self.out)
        line = self.err.strip().splitlines()[-1]
        assert line.startswith("torchslice") and "Traceback" not in self.err, self.err
        assert not [part for part in parts if part not in line], line


@pytest.fixture
def torchslice(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run(*arguments: object) -> Result:
        code = main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        return Result(code, streams.out, streams.err)

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with gates and slices; do not write to it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    data = TINY.load_data()
    run = Run.start(folder, TINY, data)
    run.train(data, device="cpu", progress=False)
    run.find_slices(data, device="cpu", progress=False)
    return folder


@pytest.fixture(scope="session")
def standard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished standard run without slices; do not write to it."""
    folder = tmp_path_factory.mktemp("standard") / "run"
    recipe = replace(TINY, method="standard", epochs=4)
    data = recipe.load_data()
    Run.start(folder, recipe, data).train(data, device="cpu", progress=False)
    return folder


@pytest.fixture
def standard_copy(standard: Path, tmp_path: Path) -> Path:
    """A copy of the finished standard run, to be changed."""
    return Path(shutil.copytree(standard, tmp_path / "run"))


@pytest.fixture
def run_copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def pair(trained: Path, tmp_path: Path, torchslice: Callable[..., Result]) -> Path:
    """The sub-model of two digits, saved."""
    path = tmp_path / "pair.safetensors"
    assert torchslice("extract", trained, "--classes", "3,8", "--out", path, "--device", "cpu").code == 0
    return path
