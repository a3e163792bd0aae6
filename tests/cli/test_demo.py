"""The demo at a tiny size: the same story, files and figures."""

import json
from dataclasses import replace

import pytest
import torch

import torchslice as ts
from torchslice import demo

from .conftest import TINY


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(demo, "RECIPE", replace(TINY, method="modular"))
    monkeypatch.setattr(demo, "TUNING_EPOCHS", 1)


def test_the_demo_tells_the_story_and_keeps_its_files(torchslice, tiny, tmp_path):
    result = torchslice("demo", "--out", tmp_path / "demo", "--device", "cpu")
    assert result.code == 0, result.err
    for part in (
        "1. Train",
        "2. The slices",
        "class slices keep",
        "3. Cut",
        "control: random slice",
        "4. Compare",
        "bit-equal",
        "Next",
    ):
        assert part in result.out
    files = sorted(path.name for path in (tmp_path / "demo").iterdir())
    assert files == ["digits-0-2-5-6-9.safetensors", "digits-1-4-7.safetensors", "digits-3-8.safetensors", "run"]
    small = ts.load(tmp_path / "demo" / "digits-3-8.safetensors")
    assert small.classes == ("3", "8")
    assert torch.isfinite(small(ts.data.load("digits").example)).all()


def test_the_demo_as_json_in_a_folder_that_it_names(torchslice, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = torchslice("demo", "--device", "cpu", "--json")
    figures = json.loads(result.out)
    assert figures["folder"].startswith(str(tmp_path)) and figures["bit_equal"]
    assert [len(one["classes"]) for one in figures["sub_models"]] == [2, 3, 5]


def test_an_unwritable_folder_is_refused(torchslice, tmp_path):
    (tmp_path / "file").write_text("")
    torchslice("demo", "--out", tmp_path / "file").refused("cannot write")
