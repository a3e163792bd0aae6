"""Ratios by hand, runs in turns, what cannot be measured, and what memory is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import speed
from benchmarks.speed import SETTINGS, cells, compare, in_turns
from torchslice import TorchsliceError


def test_a_row_by_hand() -> None:
    row = compare("ours", "theirs", "<= 1", [(1.0, 2.0), (3.0, 2.0), (2.0, 2.0)])
    assert (row["ratio"], row["quartiles"]) == (1.0, [0.75, 1.25])
    assert cells(row) == ["ours (2.000 s)", "theirs (2.000 s)", "1.00 (0.75 to 1.25)", "<= 1"]
    memory = compare("a", "b", "-", [(3.0, 2.0)], unit="{:.0f} MiB")
    assert cells(memory)[:3] == ["a (3 MiB)", "b (2 MiB)", "1.50 (1.50 to 1.50)"]


def test_sides_run_in_turns_and_the_first_turn_does_not_count() -> None:
    order: list[str] = []
    a, b, c = (lambda name=name: order.append(name) for name in "abc")
    turns = in_turns(2, a, b, c)
    assert "".join(order) == "abc" + "bca" + "cab"
    assert len(turns) == 2 and all(len(turn) == 3 and min(turn) >= 0 for turn in turns)


def test_the_history_says_what_became_worse(tmp_path: Path) -> None:
    def say(commit: str, cut: float, speed_up: float, processor: str = "x86_64") -> str:
        rows = [
            {"what": f"a cut ({cut} s)", "ratio": cut, "quartiles": [cut - 0.05, cut + 0.05], "goal": "<= 1"},
            {"what": "a speed-up (2x)", "ratio": speed_up, "quartiles": [speed_up] * 2, "goal": ">= 0.8"},
            {"what": "not measured", "ratio": None, "quartiles": None, "goal": ""},
        ]
        about = {"commit": commit, "processor": processor, "accelerator": None}
        return speed.since_last({"manifest": about, "runs": [{"rows": rows}]}, tmp_path / "speed-cpu")

    assert "The first result of this machine (x86_64, no GPU)" in say("a", 1.0, 1.0)
    assert "The first result" in say("a", 1.0, 1.0)  # the same result, such as of --page-only, is no second one
    assert say("b", 1.15, 0.95).endswith("at commit a by more than a tenth, beyond the spread: nothing.")
    assert "The first result of this machine (arm64" in say("b", 9.0, 0.1, "arm64")
    assert say("c", 1.4, 0.7).splitlines() == [
        "Worse than at commit b by more than a tenth, beyond the spread: ",
        "- a cut: 1.40, was 1.15",
        "- a speed-up: 0.70, was 0.95",
    ]
    assert (tmp_path / "speed-cpu.history.jsonl").read_text().count("\n") == 4


def test_what_cannot_be_compared_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(module: str, *, extra: str) -> None:
        raise TorchsliceError(f"this needs {module.partition('.')[0]}, which is not installed.")

    settings, task = SETTINGS["smoke"], speed.noise(10)
    monkeypatch.setattr(speed, "import_optional", absent)
    (row,) = speed.against_captum(settings, "cpu", task)
    assert cells(row)[1:3] == ["captum: this needs captum, which is not installed.", "-"]
    (row,) = speed.against_torch_pruning(settings, "cpu", task)
    assert cells(row)[1:3] == ["this needs torch_pruning, which is not installed.", "-"]
    monkeypatch.setattr(speed, "STATUS", tmp_path / "nowhere")
    (row,) = speed.contribution_memory(settings, "cpu", task)
    assert "not measured" in cells(row)[1] and row["ratio"] is None


@pytest.mark.skipif(not speed.STATUS.is_file(), reason="this system does not say")
def test_memory_is_that_of_this_process() -> None:
    device = torch.device("cpu")
    before, _ = speed.memory_mib(device)
    ballast = torch.ones(512 * 2**18)  # 512 MiB
    now, peak = speed.memory_mib(device)
    assert 400 < now - before < 600 and peak >= now and len(ballast)
