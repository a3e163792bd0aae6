"""The page of the slicing benchmark: figures by hand, and curves that end early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.slicing import RANDOM, RANDOM_WIDTHS, at_compression, largest, losses, ranked, write_page

WHOLE = {"compression": 0.0, "neuron_retention": 1.0, "validation": 0.8, "test": 0.9}


def line(strategy: str, metric: str, compression: float, validation: float, test: float) -> dict[str, Any]:
    """One measured point; with the whole network it makes a curve that is a straight line."""
    found = {"compression": compression, "neuron_retention": 0.5, "validation": validation, "test": test}
    return {"strategy": strategy, "metric": metric, "point": 0.5, **found}


def run(seed: int, *points: dict[str, Any]) -> dict[str, Any]:
    """A run with random slices: they lose 80 points on the way to 100 %, 24 on average of 10 to 50 %, or half."""
    controls = [line(RANDOM, "-", 1.0, 0.0, 0.1), line(RANDOM_WIDTHS, "avg", 1.0, 0.4, 0.5)]
    return {"data": "digits", "model": "lenet", "seed": seed, "whole": WHOLE, "points": [*points, *controls]}


@pytest.fixture
def runs() -> list[dict[str, Any]]:
    """Two seeds: one arm loses 10 or 20 points to 50 %, another 30 to 100 %, a third nothing, but ends at 25 %."""
    return [
        run(
            seed,
            line("PerLayer", "avg", 1.0, 0.5, 0.6),
            line("ReachTheta, mass", "avg", 0.5, 0.7 - seed / 10, 0.7),
            line("PerClass", "avg", 0.25, 0.8, 0.9),
        )
        for seed in (0, 1)
    ]


def page(runs: list[dict[str, Any]], path: Path) -> str:
    about = {"command": "x", "processor": "abacus", "accelerator": None, "torch": "2", "python": "3"}
    networks = [{"data": "digits", "model": "lenet"}]
    settings = {"seeds": 2, "samples_per_class": 16, "networks": networks}
    return write_page({"manifest": {**about, "settings": settings}, "runs": runs}, path / "x")


def test_curves_are_read_at_a_compression() -> None:
    points = [{"compression": 0.4, "test": 0.5, "validation": 0.4}, {"compression": 0.2, "test": 0.895}]
    curve = [{"compression": 0.0, "test": 0.9, "validation": 0.8}, *points]
    assert at_compression(curve, 0.1) == pytest.approx(0.8975)
    assert at_compression(curve, 0.3) == pytest.approx(0.6975)
    assert at_compression(curve, 0.4) == 0.5 and at_compression(curve, 0.41) is None
    assert at_compression(curve[:2], 0.1, "validation") == pytest.approx(0.7)
    assert largest(curve) == 0.2 and largest(curve, 0.5) == 0.4 and largest(curve[:2]) == 0


def test_arms_are_ranked_by_what_they_lose_and_those_that_end_early_come_last(runs: list[dict[str, Any]]) -> None:
    seeds = [losses(runs, seed) for seed in (0, 1)]
    order = [arm for arm, _ in ranked(seeds, 5)]
    assert order == ["PerLayer", "ReachTheta, mass", RANDOM_WIDTHS, RANDOM, "PerClass"]  # 9, 9, 12, 24, and early
    assert seeds[1]["validation"]["ReachTheta, mass", "avg"]["digits", "lenet", 0.5] == pytest.approx(0.2)


def test_the_page_says_what_was_found(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    text = page(runs, tmp_path)
    # the compressions are 30 % on average: 0.3 of the loss at 100 %, 0.6 of that at 50 %
    assert "**PerLayer, avg**: 9.0 ± 0.0 points, 9.0 ± 0.0 on test images" in text and "(x.png)" in text
    assert "| PerLayer | avg | 100% | 9.0 ± 0.0 | 9.0 ± 0.0 | 0.0 ± 0.0 | 15.0 ± 0.0 | 3.0 ± 0.0 |" in text
    assert "| ReachTheta, mass | avg | 100% | 9.0 ± 4.2 | 12.0 ± 0.0 | 0.0 ± 4.2 | 12.0 ± 0.0 | 0.0 ± 0.0 |" in text
    # 10 and 20 % alone: random slices lose 8 and 16 points there
    assert "| PerClass | avg | 40% | 0.0 ± 0.0 | 0.0 ± 0.0 | 4.5 ± 0.0 | 12.0 ± 0.0 | 6.0 ± 0.0 |" in text
    assert f"| {RANDOM} | - | 100% | 24.0 ± 0.0 |" in text
    alone = text.partition("## lenet on digits\n\nUncut: 90.00 ± 0.00 %.")[2]
    assert "| PerClass | avg | 90.0 ± 0.0 | 90.0 ± 0.0 | - | - | - | 25.0 ± 0.0 |" in alone
    assert "| ReachTheta, mass | avg | 86.0 ± 0.0 | 82.0 ± 0.0 |" in alone


def test_an_arm_that_reaches_nothing(tmp_path: Path) -> None:
    text = page([run(0, line("PerLayer", "avg", 0.05, 0.7, 0.7))], tmp_path)
    assert "**PerLayer, avg**: - points" in text and "| PerLayer | avg | 0% | - | - | - | - | - |" in text
