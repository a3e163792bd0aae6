"""Figures draw what the groups say, on the axes that they are given."""

from __future__ import annotations

import pytest
import torch

import torchslice as ts
from torchslice import TorchsliceError
from torchslice.find.semantic import Contributions, groups
from torchslice.show import figures

NAMES = ("cat", "dog", "car")
SCORES = {"early": [[1, 1, 1], [1, 1, 0], [0, 0, 0]], "late": [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]}


@pytest.fixture
def found():
    plain = {layer: torch.tensor(rows, dtype=torch.float64).T for layer, rows in SCORES.items()}
    scores = Contributions(NAMES, {"avg": plain}, torch.arange(1), torch.ones(3, dtype=torch.int64))
    return groups(None, scores, tied=False)


@pytest.fixture
def axes():
    return pytest.importorskip("matplotlib.figure").Figure().subplots()


def test_overlaps_by_hand(found):
    late = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert figures.overlaps(found, "late").tolist() == late
    # cat and dog share two of their four neurons, cat and car one of five
    assert figures.overlaps(found).tolist() == [[1, 1 / 2, 1 / 5], [1 / 2, 1, 1 / 5], [1 / 5, 1 / 5, 1]]
    assert figures.sharing_of(found) == {"early": [0, 1, 1, 1], "late": [4, 0, 0, 0]}


def test_overlap_is_drawn_in_the_order_of_the_tree(found, axes):
    assert figures.overlap(axes, found, "early") is axes and axes.get_title() == "early"
    assert tuple(text.get_text() for text in axes.get_xticklabels()) == found.order
    at = [NAMES.index(name) for name in found.order]
    assert axes.images[0].get_array().tolist() == figures.overlaps(found, "early")[at][:, at].tolist()


def test_tree_sharing_and_training(found, axes):
    assert figures.tree(axes, found) is axes
    assert tuple(text.get_text() for text in axes.get_yticklabels()) == found.order
    axes.clear()
    assert figures.sharing(axes, found) is axes
    assert [bar.get_width() for bar in axes.patches[:2]] == [0, 1]  # one class: of early, of late
    axes.clear()
    rows = [{"epoch": 1, "train_accuracy": 0.5, "validation_accuracy": 0.4}, {"epoch": 2, "train_accuracy": 0.7}]
    assert figures.training(axes, rows) is axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0.5, 0.7], [0.4]]


def test_what_cannot_be_drawn(found, axes):
    with pytest.raises(TorchsliceError, match="no finished epoch"):
        figures.training(axes, [])
    with pytest.raises(TorchsliceError, match="unknown layer 'lat'. Did you mean 'late'"):
        figures.overlap(axes, found, "lat")


def test_one_class_has_no_tree(axes):
    scores = Contributions(("a",), {"avg": {"x": torch.ones(1, 2)}}, torch.arange(1), torch.ones(1, dtype=torch.int64))
    assert figures.tree(axes, groups(None, scores, tied=False)) is axes and ts.report is not None
