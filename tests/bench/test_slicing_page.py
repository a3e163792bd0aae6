"""The page of bench slicing: figures by hand, curves that end early, and no matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from torchslice.bench.slicing_page import (
    RANDOM,
    RANDOM_WIDTHS,
    at_compression,
    best,
    largest,
    markdown,
    page,
    summarise,
)

WHOLE = {"compression": 0.0, "neuron_retention": 1.0, "validation": 0.8, "test": 0.9}


def line(slicer: str, metric: str, compression: float, validation: float, test: float) -> dict[str, Any]:
    """One measured point; with the whole network it makes a curve that is a straight line."""
    found = {"compression": compression, "neuron_retention": 0.5, "validation": validation, "test": test}
    return {"slicer": slicer, "metric": metric, "point": 0.5, **found}


def run(seed: int, *points: dict[str, Any]) -> dict[str, Any]:
    return {"data": "digits", "model": "lenet", "seed": seed, "whole": WHOLE, "points": list(points)}


def controls(metric: str) -> list[dict[str, Any]]:
    """Random slices lose 80 points on the way to 100 %: 24 on average of 10 to 50 %; the others half as much."""
    return [line(RANDOM, "-", 1.0, 0.0, 0.1), line(RANDOM_WIDTHS, metric, 1.0, 0.4, 0.5)]


@pytest.fixture
def result() -> dict[str, Any]:
    """Two seeds: one arm loses 10 or 20 points to 50 %, another 30 to 100 %, a third nothing, but ends at 25 %."""
    runs = [
        run(
            seed,
            line("global", "avg", 1.0, 0.5, 0.6),
            line("semantic, mass", "avg", 0.5, 0.7 - seed / 10, 0.7),
            line("category", "avg", 0.25, 0.8, 0.9),
            *controls("avg"),
        )
        for seed in (0, 1)
    ]
    about = {
        "command": "torchslice bench slicing",
        "processor": "abacus",
        "accelerator": None,
        "torch": "2",
        "python": "3",
    }
    settings = {"seeds": 2, "samples_per_class": 16}
    return {"manifest": {**about, "settings": settings}, "runs": runs, "summary": summarise(runs)}


def test_curves_are_read_at_a_compression() -> None:
    points = [{"compression": 0.4, "test": 0.5, "validation": 0.4}, {"compression": 0.2, "test": 0.895}]
    curve = [{"compression": 0.0, "test": 0.9, "validation": 0.8}, *points]
    assert at_compression(curve, 0.1) == pytest.approx(0.8975)
    assert at_compression(curve, 0.3) == pytest.approx(0.6975)
    assert at_compression(curve, 0.4) == 0.5 and at_compression(curve, 0.41) is None
    assert at_compression(curve[:2], 0.1, "validation") == pytest.approx(0.7)
    assert largest(curve) == 0.2 and largest(curve, 0.5) == 0.4 and largest(curve[:2]) == 0


def test_the_summary_by_hand(result: dict[str, Any]) -> None:
    rows = {row["slicer"]: row for row in result["summary"]}
    assert list(rows) == ["global", "semantic, mass", RANDOM_WIDTHS, RANDOM, "category"]  # 9, 9, 12, 24, and early
    assert best(result["summary"]) is rows["global"]
    # the compressions are 30 % on average: 0.3 of the loss at 100 %, 0.6 of that at 50 %
    assert rows["global"]["lost"]["validation"] == pytest.approx([0.09, 0.09])
    assert rows["semantic, mass"]["lost"]["validation"] == pytest.approx([0.06, 0.12])
    assert rows["semantic, mass"]["lost"]["test"] == pytest.approx([0.12, 0.12])
    assert rows["semantic, mass"]["ahead_of"]["best"] == pytest.approx([0.03, -0.03])
    assert rows["semantic, mass"]["ahead_of"]["random"] == pytest.approx([0.12, 0.12])
    assert rows["semantic, mass"]["ahead_of"]["random_widths"] == pytest.approx([0, 0])
    assert rows[RANDOM]["ahead_of"]["random_widths"] == [] and rows["global"]["reached"] == 1


def test_a_curve_that_ends_early_counts_where_it_gets_to_and_stands_last(result: dict[str, Any]) -> None:
    early = result["summary"][-1]
    assert early["slicer"] == "category" and early["reached"] == pytest.approx(0.4)  # 10 and 20 %
    assert early["lost"]["validation"] == pytest.approx([0, 0])
    assert early["ahead_of"]["random"] == pytest.approx([0.12, 0.12])  # 8 and 16 points, those at 30 to 50 % left out
    assert early["ahead_of"]["best"] == pytest.approx([0.045, 0.045])


def test_an_arm_that_reaches_nothing_and_runs_without_any_that_reach_all() -> None:
    rows = summarise([run(0, line("global", "avg", 0.05, 0.7, 0.7), *controls("avg"))])
    last = rows[-1]
    assert last["slicer"] == "global" and last["reached"] == 0 and last["lost"] == {"validation": [], "test": []}
    assert best(rows) is last


def test_the_page_says_what_was_found(result: dict[str, Any]) -> None:
    page = markdown(result, "![Test accuracy](curves.png)")
    assert "**global, avg**: 9.0 ± 0.0 points" in page and "![Test accuracy](curves.png)" in page
    assert "| category | avg | 40% | 0.0 ± 0.0 | 0.0 ± 0.0 | 4.5 ± 0.0 | 12.0 ± 0.0 | 6.0 ± 0.0 |" in page
    assert "| control: random, widths of CKA of maps | avg | 100% |" in page
    alone = page.partition("## lenet on digits: 90.00 ± 0.00 uncut")[2]
    assert "| category | avg | 90.0 ± 0.0 | 90.0 ± 0.0 | - | - | - | 25.0 ± 0.0 |" in alone
    assert "| semantic, mass | avg | 86.0 ± 0.0 | 82.0 ± 0.0 |" in alone


def test_the_picture_has_a_panel_per_network(result: dict[str, Any], tmp_path: Path) -> None:
    text = page({key: result[key] for key in ("manifest", "runs")}, tmp_path / "x")
    assert "(x.png)" in text and "## All networks together" in text
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
