"""Pruning methods against hand-computed numbers, slow formulas and PyTorch; and the order in which neurons go."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tests.battery.zoo import prepared
from tests.nets import Tiny, lively
from torchslice.cut.extract import extract
from torchslice.errors import TorchsliceError
from torchslice.graph.find import find_neurons
from torchslice.maintain import PRUNING, Partial, top_by_score_per_parameter
from torchslice.maintain.pruning import erk_counts, lamp_scores, removal_order, uniform_plus_counts
from torchslice.slices import Slice


def weights(seed: int = 0, zeros: float = 0.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv": (6, 3, 3, 3), "middle": (8, 6, 3, 3), "hidden": (20, 30), "last": (5, 20)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: w * (torch.rand(w.shape, generator=generator) >= zeros) for name, w in made.items()}


def test_lamp_scores_by_hand() -> None:
    # squares 9, 1, 4, 4: 9/9, 1/18, 4/17, 4/17 (both fours are as large as each other)
    scores = lamp_scores(torch.tensor([[3.0, -1.0], [2.0, -2.0]]))
    assert scores.flatten().tolist() == pytest.approx([1, 1 / 18, 4 / 17, 4 / 17])
    assert lamp_scores(torch.tensor([0.0, 2.0])).tolist() == [0, 1]
    assert lamp_scores(torch.zeros(3)).tolist() == [0, 0, 0]


def test_lamp_scores_are_the_formula() -> None:
    weight = torch.randn(4, 3, 2, 2).round(decimals=1)  # with ties
    flat = weight.flatten().tolist()
    assert len({abs(u) for u in flat}) < len(flat)
    slow = [u**2 / sum(v**2 for v in flat if abs(v) >= abs(u)) for u in flat]
    assert lamp_scores(weight).flatten().tolist() == pytest.approx(slow)


def test_lamp_does_not_depend_on_the_scale_of_a_layer_and_keeps_its_largest_weight() -> None:
    given = weights()
    scaled = {name: w * 10**n for n, (name, w) in enumerate(given.items())}
    for count in (4, 50, 700):
        masks = PRUNING["lamp"](given, count)
        assert all(torch.equal(mask, PRUNING["lamp"](scaled, count)[name]) for name, mask in masks.items())
        assert all(mask.flatten()[given[name].abs().argmax()] for name, mask in masks.items())
    assert not all(mask.any() for mask in PRUNING["global"](scaled, 50).values())  # what global does not promise


@pytest.mark.parametrize("count", [1, 137, 600, 1200])
def test_global_is_that_of_torch(count: int) -> None:
    given = weights()
    layers = {name: nn.Module() for name in given}
    for name, layer in layers.items():
        layer.weight = nn.Parameter(given[name])
    amount = sum(w.numel() for w in given.values()) - count
    prune.global_unstructured([(layer, "weight") for layer in layers.values()], prune.L1Unstructured, amount=amount)
    masks = PRUNING["global"](given, count)
    assert all(torch.equal(mask, layers[name].weight_mask.bool()) for name, mask in masks.items())


@pytest.mark.parametrize("method", PRUNING.names())
def test_masks_shrink_never_hold_a_zero_and_keep_as_many_as_asked(method: str) -> None:
    given = weights(zeros=0.3)
    alive = sum(int(w.count_nonzero()) for w in given.values())
    assert alive < 0.8 * sum(w.numel() for w in given.values())
    before = {name: w != 0 for name, w in given.items()}
    for count in (900, 700, 500, 350):
        masks = PRUNING[method](given, count)
        kept = sum(int(mask.sum()) for mask in masks.values())
        assert kept <= count and all(not (mask & ~before[name]).any() for name, mask in masks.items())
        if method in ("lamp", "global"):
            assert kept == min(count, alive)
        assert all((mask & (given[name] != 0)).sum() == mask.sum() for name, mask in masks.items())
        before = masks
    assert torch.equal(masks["middle"], PRUNING[method](given, 350)["middle"])


@pytest.mark.parametrize("method", ["uniform+", "erk"])
def test_within_a_layer_the_largest_stay(method: str) -> None:
    given = weights()
    for name, mask in PRUNING[method](given, 500).items():
        taken, left = given[name][mask].abs(), given[name][~mask].abs()
        assert len(taken) and (not len(left) or taken.min() > left.max()), name


def test_uniform_plus_by_hand() -> None:
    shapes = {"conv": torch.Size([2, 1, 3, 3]), "a": torch.Size([5, 8]), "b": torch.Size([2, 5])}
    # conv 18 of 18; 20 left for 40 + 10 at density 0.4
    assert uniform_plus_counts(shapes, 38) == {"conv": 18, "a": 16, "b": 4}
    # 6 left: density 0.12 would leave 1.2 of the last 10, so it gets 2, and the middle 4
    assert uniform_plus_counts(shapes, 24) == {"conv": 18, "a": 4, "b": 2}
    assert uniform_plus_counts(shapes, 5) == {"conv": 18, "a": 0, "b": 2}  # what it never takes away
    assert uniform_plus_counts(shapes, 68) == {"conv": 18, "a": 40, "b": 10}
    del shapes["conv"]  # no convolution, nothing is dense
    assert uniform_plus_counts(shapes, 25) == {"a": 20, "b": 5}


def slow_erk(shapes: dict[str, torch.Size], count: int) -> dict[str, float]:
    """Raise the scale in small steps, layers filling up on the way, until `count` weights are there."""
    low, high = 0.0, 1e6
    for _ in range(200):
        scale = (low + high) / 2
        numbers = {n: min(math.prod(s), scale * sum(s)) for n, s in shapes.items()}
        low, high = (scale, high) if sum(numbers.values()) < count else (low, scale)
    return numbers


@pytest.mark.parametrize("count", [10, 200, 800, 1200, 1294])
def test_erk_is_proportional_until_layers_are_full(count: int) -> None:
    shapes = {name: w.shape for name, w in weights().items()}
    slow, fast = slow_erk(shapes, count), erk_counts(shapes, count)
    assert all(0 <= slow[name] - fast[name] + 1e-4 < 1 + 1e-3 for name in shapes), (slow, fast)
    assert sum(fast.values()) <= count


def test_erk_by_hand() -> None:
    shapes = {"a": torch.Size([100, 50]), "b": torch.Size([10, 100]), "c": torch.Size([2, 3, 1, 1])}
    # parts 150, 110, 7: at scale 1 the last would get 7 of its 6 weights, so it is full and the others fraction 260
    assert erk_counts(shapes, 266) == {"a": 150, "b": 110, "c": 6}
    assert erk_counts(shapes, 10**6) == {"a": 5000, "b": 1000, "c": 6}


def without_first(order: dict[str, Tensor], removed: int) -> Slice:
    return Slice({layer: place >= removed for layer, place in order.items()})


def test_least_critical_neurons_go_first_and_the_best_of_a_layer_stays() -> None:
    neurons = find_neurons(lively(Tiny()), torch.zeros(2, 1, 8, 8))
    scores = {"conv1": torch.arange(8.0), "conv2": torch.tensor([3.0, 0.0, 0.0, 4.0, 0.0, 0.0])}
    order = removal_order(neurons, scores)
    # conv1 / sqrt(140): 0, .08, .17, ..., best .59; conv2 / 5: .6, 0, 0, best .8, 0, 0
    assert order["conv1"].tolist() == [0, 5, 6, 7, 8, 9, 10, 12]
    assert order["conv2"].tolist() == [11, 1, 2, 12, 3, 4]
    assert len(without_first(order, 0)) == 14 and len(without_first(order, 12)) == 2
    part = without_first(order, 6)
    assert part["conv1"].tolist() == [False] * 2 + [True] * 6 and part["conv2"].nonzero().flatten().tolist() == [0, 3]
    assert removal_order(neurons, {"conv1": torch.zeros(8), "conv2": torch.zeros(6)})["conv1"].max() == 12


@pytest.mark.parametrize("name", ["reused", "preactivation", "rescnn", "mobilenet_v2", "gated"])
def test_coupled_neurons_go_together(name: str) -> None:
    neurons = prepared(name)
    generator = torch.Generator().manual_seed(1)
    scores = {layer: torch.rand(found.count, generator=generator) for layer, found in neurons.layers.items()}
    order = removal_order(neurons, scores)
    places: dict[int, set[int]] = {}
    for layer in neurons.layers:
        wires = neurons.wires[neurons.flow.ports[layer].outs]
        for wire, place in zip(wires.tolist(), order[layer].tolist(), strict=True):
            places.setdefault(wire, set()).add(place)
    assert any(layer.coupled or layer.followers for layer in neurons.layers.values())
    assert all(len(found) == 1 for found in places.values())
    half = without_first(order, max(int(o.max()) for o in order.values()) // 2)
    assert not half.empty_layers() and len(half) < len(neurons)
    extract(neurons, half)


def test_neurons_worth_their_parameters_by_hand() -> None:
    neurons = find_neurons(lively(Tiny()), torch.zeros(2, 1, 8, 8))
    scores = {"conv1": torch.tensor([3.0, 4.0] + [0.0] * 6), "conv2": torch.tensor([0.0, 12.0, 5.0, 0.0, 0.0, 0.0])}
    # a neuron of conv1 has 9 + 1 + 2 parameters, one of conv2 72 + 1 + 2; 4 / 5 / 12 is worth most, then 3 / 5 / 12,
    # 12 / 13 / 75, 5 / 13 / 75, and then nothing
    for budget, kept in ((11, []), (12, [1]), (24, [0, 1]), (98, [0, 1]), (99, [0, 1, 9]), (174, [0, 1, 9, 10])):
        part = top_by_score_per_parameter(neurons, scores, (budget + 0.5) / 567)
        assert torch.cat([part["conv1"], part["conv2"]]).nonzero().flatten().tolist() == list(kept), budget
    assert top_by_score_per_parameter(neurons, scores, 1.0) == neurons.full()
    for fraction in (0, 1.5):
        with pytest.raises(TorchsliceError, match=rf"param_fraction must be in \(0, 1\], got {fraction}"):
            top_by_score_per_parameter(neurons, scores, fraction)
    with pytest.raises(TorchsliceError, match=r"layer 'conv2' needs scores \[6\] of at least 0, .*; got none"):
        top_by_score_per_parameter(neurons, {"conv1": scores["conv1"]}, 0.5)


@pytest.mark.parametrize("name", ["mlp", "gated", "preactivation", "convnet", "vit", "fast"])
def test_what_is_chosen_fits_into_its_fraction(name: str) -> None:
    neurons = prepared(name)
    scores = {layer: torch.rand(found.count) for layer, found in neurons.layers.items()}
    fraction = Partial(neurons, top_by_score_per_parameter(neurons, scores, 0.2)).param_fraction
    assert 0.15 < fraction <= 0.2
