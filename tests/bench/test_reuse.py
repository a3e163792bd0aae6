"""The bench of sub-models at its smallest scale, and its page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from torchslice.bench import BENCHES
from torchslice.bench.reuse import SETTINGS, answers, disjoint, draw_subsets, restricted
from torchslice.bench.reuse_page import ARMS
from torchslice.data import load


def test_every_arm_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = BENCHES["reuse"]("smoke", out=tmp_path, progress=False)
    assert json.loads((tmp_path / "reuse-smoke.json").read_text()) == json.loads(json.dumps(result))
    (run,) = result["runs"]
    (network,), found = SETTINGS["smoke"].networks, {}
    for row in run["arms"]:
        assert 0 <= row["accuracy"] <= 1 and 0 < row["retention"] <= 1
        found.setdefault((row["arm"], row["size"]), []).append(row["retention"])
    assert found.keys() == {(arm, size) for arm in ARMS for size in (2, 10)}
    assert found["ours", 2] == found["control: standard, sliced", 2] == pytest.approx(network.retentions, abs=0.03)
    assert found["control: random slices, trained", 2] == found["ours", 2][:1]
    assert [(s["size"], len(s["values"])) for s in run["subsets"]] == [(2, 2), (3, 2), (5, 2), (10, 1)]
    assert all(0 <= mine <= 1 and parent > 0.5 for s in run["subsets"] for mine, parent in s["values"])
    assert all(0 <= row[name] <= 1 for row in run["calibration"] for name in ("cut", "calibrated", "restricted"))
    assert all(seconds > 0 for seconds in (*run["seconds"].values(), *run["artefact_seconds"].values()))
    page = (tmp_path / "reuse-smoke.md").read_text()
    assert all(f"| {arm} |" in page for arm in ARMS) and "(reuse-smoke.png)" in page
    assert "| 1 set of 10 |" in page and "Training time over standard training: ours" in page

    monkeypatch.setattr("torchslice.bench.reuse.fit", None)  # what is finished is not run again
    assert BENCHES["reuse"]("smoke", out=tmp_path, progress=False)["runs"] == result["runs"]


def test_sub_tasks_by_hand() -> None:
    assert disjoint(5, (2, 5), 10, 0) == [(0, 1), (2, 3), (0, 1, 2, 3, 4)]
    few = disjoint(100, (2, 50), 4, 0)
    assert len(few) == 6 and set(few) < set(disjoint(100, (2, 50), 50, 0)) and few != disjoint(100, (2, 50), 4, 1)
    assert len(draw_subsets(10, 2, 45, 0)) == 45 and draw_subsets(10, 10, 45, 0) == [tuple(range(10))]
    drawn = draw_subsets(100, 3, 20, 1)
    assert len(set(drawn)) == 20 and drawn == draw_subsets(100, 3, 20, 1) != draw_subsets(100, 3, 20, 2)
    assert all(list(task) == sorted(set(task)) and max(task) < 100 for task in drawn)
    assert draw_subsets(100, 100, 20, 1) == [tuple(range(100))]


def test_restricted_answers_by_hand() -> None:
    data = load("digits")
    whole = torch.nn.functional.one_hot(data.test.labels, 10).float()
    logits, labels = answers(whole, data, (3, 8))
    only = data.restrict(["3", "8"])
    assert torch.equal(labels, only.test.labels) and logits.shape == (len(labels), 2)
    assert restricted(whole, data, (3, 8)) == 1 and restricted(-whole, data, (3, 8)) == 0
