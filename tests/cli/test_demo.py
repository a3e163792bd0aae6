"""The demo at a tiny size: the same story, files and figures."""

import json
from dataclasses import replace

import pytest
import torch

import torchslice as ts
from torchslice import demo
from torchslice.runs.recipe import Method

from .conftest import TINY


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(demo, "RECIPE", replace(TINY, method=Method()))
    monkeypatch.setattr(demo, "TUNING", replace(demo.TUNING, epochs=1))
    monkeypatch.setattr(demo, "SEEDS", 2)
    monkeypatch.setattr(demo, "TASKS", (("3", "8"), ("1", "4", "7")))


def test_the_demo_tells_the_story_and_keeps_its_files(torchslice, tmp_path):
    result = torchslice("demo", "--out", tmp_path / "demo", "--device", "cpu")
    assert result.code == 0, result.err
    for part in (
        "1. Train 2",
        "2. Every class has its neurons in an order",
        "3. Cut",
        "control: random slice",
        "4. Compare",
    ):
        assert part in result.out
    assert "bit-equal" in result.out and "Next" in result.out
    files = sorted(path.name for path in (tmp_path / "demo").iterdir())
    made = ["digits-1-4-7.safetensors", "digits-3-8.safetensors"]
    assert files == [*made, "run-0", "run-1"]
    small = ts.load(tmp_path / "demo" / "digits-3-8.safetensors")
    assert small.classes == ("3", "8") and torch.isfinite(small.model(ts.data.load("digits").example)).all()
    (last,) = [line.split() for line in result.out.splitlines() if line.strip().startswith("torchslice extract")]
    out = ("--finetune", 1, "--out", tmp_path / "4-9.safetensors", "--device", "cpu")
    assert torchslice(*last[1 : last.index("--finetune")], *out).code == 0


def test_the_demo_as_json_in_a_folder_that_it_names(torchslice, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(demo, "SEEDS", 1)
    monkeypatch.setattr(demo, "TASKS", (("3", "8"),))
    figures = json.loads(torchslice("demo", "--device", "cpu", "--json").out)
    assert figures["folder"].startswith(str(tmp_path)) and figures["bit_equal"]
    assert [len(one["classes"]) for one in figures["sub_models"]] == [2]


def test_an_unwritable_folder_is_refused(torchslice, tmp_path):
    (tmp_path / "file").write_text("")
    torchslice("demo", "--out", tmp_path / "file").refused("cannot write")
    torchslice("demo", "--out", tmp_path / "demo", "--device", "tpu").refused("'tpu'")
