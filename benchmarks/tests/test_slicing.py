"""The slicing benchmark by hand: slices of a compression, what is spread over layers, and what the page says."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import slicing
from benchmarks.experiment import inputs_of, neurons_of
from benchmarks.slicing import AS_CUT, MAGNITUDE, RANDOM, SEMANTIC, STATISTICS, TUNED, WIDTHS, best_arms, write_page
from torchslice import Slice, models, retention
from torchslice.cut.extract import masked
from torchslice.data import load

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


@torch.no_grad()
def test_the_layer_goes_on_in_which_it_costs_least() -> None:
    model = lively(Tiny())
    model.conv2.weight[:, 4:] = 0  # half of the first layer is read by nothing
    neurons, labels = neurons_of(model, TASK), TASK.train.labels
    full, inputs = neurons.full(), inputs_of(TASK.train, torch.device("cpu"))
    levels = [full, *(Slice({n: torch.arange(w) < k for n, w in full.layers.items()}) for k in (4, 2, 1))]

    def price(depths: tuple[int, int], unit: int) -> float:
        slices = [
            Slice(
                {n: levels[d + step * (i == unit)][n] for i, (n, d) in enumerate(zip(full.layers, depths, strict=True))}
            )
            for step in (0, 1)
        ]
        losses = [float(F.cross_entropy(masked(neurons, slice_)(inputs), labels)) for slice_ in slices]
        kept = [retention(neurons, slice_).param for slice_ in slices]
        return (losses[1] - losses[0]) / (kept[0] - kept[1])

    points = slicing.by_measured_loss(neurons, TASK, levels, most=0.99)
    path = list(dict.fromkeys(points(step / 1000) for step in range(1000, -1, -1)))
    depths = [
        tuple(
            [8, 4, 2, 1].index(int(slice_["conv1"].sum()))
            if n == "conv1"
            else [6, 4, 2, 1].index(int(slice_["conv2"].sum()))
            for n in full.layers
        )
        for slice_ in path
    ]
    assert depths[0] == (0, 0) and depths[-1] == (3, 3) and len(path) == 7
    unit = [int(after[1] > before[1]) for before, after in pairwise(depths)]
    assert all(sum(after) == sum(before) + 1 for before, after in pairwise(depths)) and len({*unit[:4]}) == 2
    first = [price((0, 0), unit) for unit in (0, 1)]
    assert first[0] == pytest.approx(0, abs=1e-5) and unit[0] == first.index(min(first))


def test_layers_whose_neurons_leave_together_are_one() -> None:
    neurons = neurons_of(models.create("resnet20", channels=1, width=0.25), load("digits"))
    found = slicing.together(neurons)
    assert sorted(layer for layers in found for layer in layers) == sorted(neurons.layers)
    assert sorted(map(len, found)) == [1] * 9 + [4, 4, 4]  # the insides of nine blocks, and three residual streams
    assert slicing.together(neurons_of(lively(Tiny()), TASK)) == [["conv1"], ["conv2"]]


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
