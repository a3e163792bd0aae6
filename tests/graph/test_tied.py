"""Neurons that leave together: their sets, their scores, and networks as small as their slices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.battery.zoo import NETWORKS, prepared
from tests.graph.nets import IMAGE
from torchslice.cut.extract import extract, retention
from torchslice.graph.find import find_neurons
from torchslice.graph.neurons import Neurons
from torchslice.graph.tied import closed, mean_scores
from torchslice.slices import Slice

SETS = {"a": torch.tensor([0, 1]), "b": torch.tensor([1, 2, 1])}


class Groups(nn.Module):
    """Two convolutions that are added, and one of two groups."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(outputs, 5)
        self.grouped = nn.Conv2d(4, outputs, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.grouped(torch.relu(self.a(x) + self.b(x))).mean((2, 3)))


def neurons_of(outputs: int) -> Neurons:
    torch.manual_seed(0)
    return find_neurons(Groups(outputs).eval(), IMAGE)


def groups_of(sets: Tensor) -> list[int]:
    """Number the sets by their first neuron."""
    return [sets.tolist().index(number) for number in sets.tolist()]


def test_sets_by_hand() -> None:
    sets = neurons_of(6).sets
    assert torch.equal(sets["a"], sets["b"]) and not set(sets["a"].tolist()) & set(sets["grouped"].tolist())
    assert groups_of(sets["a"]) == [0, 1, 0, 1]  # the first and the second channel of both groups
    assert groups_of(sets["grouped"]) == [0, 1, 2, 0, 1, 2]


def test_groups_of_one_channel_leave_whole() -> None:
    sets = neurons_of(2).sets
    assert groups_of(sets["a"]) == [0, 0, 2, 2] and sets["grouped"].tolist() == sets["a"][[0, 2]].tolist()


def test_scores_by_hand() -> None:
    scores = {"a": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "b": torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 4.0]])}
    # a / 5, b / 5; the set of number 1 has a[1], b[0] and b[2]
    shared = mean_scores(SETS, scores)
    assert torch.allclose(shared["a"], torch.tensor([[0.6, 0.2], [0.0, 8 / 15]], dtype=torch.float64))
    assert torch.allclose(shared["b"], torch.tensor([[0.2, 0.4, 0.2], [8 / 15, 0.0, 8 / 15]], dtype=torch.float64))
    alone = mean_scores({"a": SETS["a"]}, {"a": scores["a"][0]})
    assert torch.allclose(alone["a"], torch.tensor([1.0, 0.0], dtype=torch.float64))


def test_closing_by_hand() -> None:
    slice_ = Slice({"a": torch.tensor([False, False]), "b": torch.tensor([False, False, True])})
    expected = Slice({"a": torch.tensor([False, True]), "b": torch.tensor([True, False, True])})
    assert closed(SETS, slice_) == expected == closed(SETS, expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_as_small_as_its_tied_slice(name: str) -> None:
    neurons = prepared(name)
    slice_ = neurons.random(0.4, seed=3)
    assert slice_ == neurons.closed(slice_) and len(slice_) < len(neurons)
    kept = retention(neurons, slice_)
    assert kept.built_param == pytest.approx(kept.param) and kept.built_mac == pytest.approx(kept.mac)
    own = neurons.random(0.4, tied=False, seed=3)
    assert own <= neurons.closed(own) == neurons.closed(neurons.closed(own))


@pytest.mark.parametrize(("name", "largest"), [("resnet18", 0.27), ("resnext50", 0.3), ("mobilenet_v2", 0.35)])
def test_half_of_the_neurons_leaves_about_a_quarter_of_the_parameters(name: str, largest: float) -> None:
    neurons = prepared(name)
    small = extract(neurons, neurons.random(0.5))
    assert sum(p.numel() for p in small.parameters()) < largest * sum(p.numel() for p in neurons.model.parameters())
    assert retention(neurons, neurons.random(0.5, tied=False)).built_param > 1.05 * largest
