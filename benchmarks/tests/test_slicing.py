"""The slicing benchmark by hand: slices of a compression, what is spread over layers, and what the page says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import slicing
from benchmarks.experiment import neurons_of
from benchmarks.slicing import AS_CUT, MAGNITUDE, RANDOM, SEMANTIC, STATISTICS, TUNED, WIDTHS, best_arms, write_page
from torchslice import Slice, retention

from .nets import Tiny, lively, stripes

TASK = stripes()


def test_the_largest_slice_that_is_compressed_enough() -> None:
    neurons = neurons_of(lively(Tiny()), TASK)
    tried: list[float] = []

    def points(point: float) -> Slice:
        tried.append(point)
        counts = {layer: max(1, round(point * width)) for layer, width in neurons.full().layers.items()}
        return Slice({layer: torch.arange(width) < counts[layer] for layer, width in neurons.full().layers.items()})

    found = slicing.compressed(neurons, points, 0.4)
    sizes = {retention(neurons, points(step / 200)).param for step in range(1, 201)}
    assert retention(neurons, found).param == max(size for size in sizes if size <= 0.6) and len(tried) < 220


def test_a_point_of_slices_that_become_smaller() -> None:
    path = [Slice({"conv": torch.arange(3) < count}) for count in (3, 2, 1)]
    assert [len(slicing.point_of(path, point)) for point in (1.0, 0.6, 0.4, 0.0)] == [3, 2, 2, 1]


def row(slicer: str, at: float, test: float, **about: Any) -> dict[str, Any]:
    keys = {"slicer": slicer, "metric": "-", "allocation": "-", "at": at, "repair": AS_CUT}
    return {**keys, "compression": at + 0.01, "validation": test, "test": test, **about}


@pytest.fixture
def runs() -> list[dict[str, Any]]:
    """Two seeds: semantic slices lose 5 points as cut, or 20 with another metric, and none when tuned; others 10."""
    found = []
    for seed in (0, 1):
        rows = [row(SEMANTIC, at, 0.9 - 0.05, metric="taylor", allocation="sloped") for at in (0.1, 0.3)]
        rows += [row(SEMANTIC, at, 0.7, metric="avg", allocation="even") for at in (0.1, 0.3)]
        rows += [row(SEMANTIC, 0.3, 0.9, metric="taylor", allocation="sloped", repair=r) for r in (STATISTICS, TUNED)]
        rivals = [slicer for slicer in slicing.SLICERS if slicer != SEMANTIC]
        rows += [row(slicer, at, 0.8 + seed / 100) for slicer in rivals for at in (0.1, 0.3)]
        repaired = {STATISTICS: 0.85, TUNED: 0.95}
        rows += [row(slicer, 0.3, test, repair=repair) for slicer in rivals for repair, test in repaired.items()]
        whole = {"validation": 0.9, "test": 0.9}
        found.append({"data": "digits", "model": "lenet", "seed": seed, "whole": whole, "rows": rows})
    return found


def test_the_best_arm_of_a_slicer_is_chosen_on_validation_images_as_cut(runs: list[dict[str, Any]]) -> None:
    best = best_arms(runs[0]["rows"])
    assert best[SEMANTIC] == (SEMANTIC, "taylor", "sloped") and best[RANDOM] == (RANDOM, "-", "-")
    assert list(best) == list(slicing.SLICERS)


def test_the_page_says_what_was_found(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    about = {"command": "x", "processor": "abacus", "accelerator": None, "torch": "2", "python": "3"}
    networks = [{"data": "digits", "model": "lenet", "epochs": 2, "train_images": None}]
    settings = {"networks": networks, "repaired": [0.3], "scored_validation_images": 500, "tuning_steps": 100}
    text = write_page({"manifest": {**about, "settings": settings}, "runs": runs}, tmp_path / "x")
    first = text.splitlines()[2]
    assert (
        "5.0 points as cut (best rival, category-wise: 9.5; ahead of all rivals everywhere on lenet on digits)" in first
    )
    assert "0.0 points recalibrated (best rival, category-wise: 5.0; ahead of all rivals everywhere on lenet" in first
    assert "0.0 points tuned (best rival, category-wise: -5.0; ahead of all rivals everywhere on no network)" in first
    assert f"| {SEMANTIC} | 5.0 ± 0.0 | 5.0 ± 0.0 | 0.0 ± 0.0 | 0.0 ± 0.0 |" in text and "(x.png)" in text
    assert f"| {MAGNITUDE} | 9.5 ± 0.7 | 9.5 ± 0.7 | 5.0 ± 0.0 | -5.0 ± 0.0 |" in text
    alone = text.partition("## lenet on digits\n\n2 epochs, all training images. Uncut: 90.00 ± 0.00 %.")[2]
    assert (
        f"| {SEMANTIC} | taylor, sloped; taylor, sloped | 85.0 ± 0.0 | 85.0 ± 0.0 | 90.0 ± 0.0 | 90.0 ± 0.0 |" in alone
    )
    assert f"| {SEMANTIC}, avg, even | 70.0 ± 0.0 | 70.0 ± 0.0 |" in alone and f"| {WIDTHS}, - | 80.5 ± 0.7 |" in alone
