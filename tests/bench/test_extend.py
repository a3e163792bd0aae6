"""The bench of extend at its smallest scale, and its page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from torchslice.bench import BENCHES
from torchslice.bench.extend import SETTINGS
from torchslice.bench.extend_page import ARMS, FIGURES, page


def test_every_arm_is_measured_and_nothing_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETTINGS, "smoke", replace(SETTINGS["smoke"], restarts=(True, False)))
    result = BENCHES["extend"]("smoke", out=tmp_path, progress=False)
    assert json.loads((tmp_path / "extend-smoke.json").read_text()) == json.loads(json.dumps(result))
    (run,) = result["runs"]
    assert run["arms"].keys() == ARMS.keys()
    for name, arm in run["arms"].items():
        figures = {"new"} if name == "scratch" else set(FIGURES)
        assert figures <= set(arm) and all(0 <= arm[figure] <= 1 for figure in figures)
        if "identical" in arm:
            assert arm["identical"] == arm["kept"] == 1
    assert {name for name, arm in run["arms"].items() if "identical" in arm} == {
        *("ours", "ours, bias", "ours, replay", "ours, slice as found"),
        *("control: random slice", "control: random slice, replay"),
    }
    assert [variant["restart"] for variant in run["variants"]] == [True, False]
    best = max(run["variants"], key=lambda variant: variant["validation"])
    assert (
        run["chosen"] == {key: best[key] for key in ("metric", "share", "restart")}
        and run["arms"]["ours"]["new"] == best["new"]
    )
    assert [len(step["tasks"]) for step in run["chain"]] == [1, 2]
    first, second = run["chain"]
    assert second["tasks"][0] == first["tasks"][0] and second["neuron_retention"] >= first["neuron_retention"]

    monkeypatch.setattr("torchslice.bench.experiment.fit", None)  # what is finished is not run again
    assert BENCHES["extend"]("smoke", out=tmp_path, progress=False)["runs"] == result["runs"]
    page = (tmp_path / "extend-smoke.md").read_text()
    assert all(arm in page for arm in ARMS) and "in 6 of 6 cases" in page and "## convnet on digits" in page


def test_the_page_shows_means_and_spreads(tmp_path: Path) -> None:
    def run(known: float, identical: float) -> dict:
        arm = {**dict.fromkeys(FIGURES, 0.5), "known": known, "kept": 1.0, "identical": identical}
        arms = {name: dict(arm) for name in ARMS} | {"scratch": {"new": 0.9}}
        variant = {
            **dict.fromkeys(("found", "settled", "known", "new"), 0.4),
            "metric": "avg",
            "share": 0.3,
            "restart": False,
        }
        step = {"classes": ["a", "b"], "learned": 0.7, "neuron_retention": 0.25, "tasks": [0.6]}
        about = {
            "seed": 0,
            "data": "mnist",
            "model": "lenet",
            "whole": 0.9,
            "chosen": {"metric": "avg", "share": 0.3, "restart": True},
        }
        about |= {"train_images": 2000, "epochs": 7}
        return {**about, "variants": [variant], "arms": arms, "chain": [step]}

    settings = {"seeds": 2, "known": 5, "settle_epochs": 3}
    manifest = {
        "command": "x",
        "settings": settings,
        "processor": "p",
        "accelerator": None,
        "torch": "2",
        "python": "3",
    }
    text = page({"manifest": manifest, "runs": [run(0.8, 1), run(0.9, 0)]}, tmp_path / "x")
    assert "| ours | 85.0 ± 7.1 | 100.0 ± 0.0 | 50.0 ± 0.0 |" in text and "| scratch | - | - | 90.0 ± 0.0 |" in text
    assert f"in {len(ARMS) - 1} of {2 * (len(ARMS) - 1)} cases" in text
    assert (
        "| 30% by avg, others kept | 40.0 ± 0.0 |" in text and "| a, b | 25.0 ± 0.0 | 70.0 ± 0.0 | 60.0 ± 0.0 |" in text
    )
