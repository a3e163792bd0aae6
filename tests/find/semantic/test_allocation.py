"""A compression spread over the layers: the path, step by step, against a slow search, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchslice as ts
from tests.graph.nets import IMAGE
from tests.nets import Tiny, lively, stripes
from torchslice import Slice, TorchsliceError, find_neurons, masked, models, retention
from torchslice.data import load
from torchslice.graph.tied import together
from torchslice.inputs import run

TASK = stripes()


def first(neurons: ts.graph.neurons.Neurons, count: int) -> Slice:
    """Return the first neurons of every layer."""
    return Slice({layer: torch.arange(width) < count for layer, width in neurons.full().layers.items()})


def inputs_of(task: ts.data.Task) -> Tensor:
    return next(iter(task.train.read([torch.arange(len(task.train))])))


@torch.no_grad()
def slow_path(neurons: ts.graph.neurons.Neurons, levels: Sequence[Slice], most: float) -> list[tuple[int, ...]]:
    """Take the step that was cheapest when it was measured last, once it is measured anew; the levels of all layers."""
    names, inputs = list(neurons.layers), inputs_of(TASK)

    def at(depths: Sequence[int]) -> Slice:
        return Slice({name: levels[depth][name] for name, depth in zip(names, depths, strict=True)})

    def figures(depths: Sequence[int]) -> tuple[float, float]:
        logits = run(masked(neurons, at(depths)), inputs)
        return float(F.cross_entropy(logits, TASK.train.labels)), retention(neurons, at(depths)).param

    path, prices, fresh = [(0,) * len(names)], [-math.inf] * len(names), set[int]()
    while figures(path[-1])[1] > most:
        loss, kept = figures(path[-1])
        unit = min((unit for unit in range(len(names)) if path[-1][unit] + 1 < len(levels)), key=prices.__getitem__)
        deeper = tuple(depth + (other == unit) for other, depth in enumerate(path[-1]))
        if unit in fresh:
            path.append(deeper)
            fresh.clear()
        else:
            after, left = figures(deeper)
            prices[unit] = (after - loss) / (kept - left)
            fresh.add(unit)
    return path


def test_the_layer_goes_on_in_which_it_costs_least() -> None:
    model = lively(Tiny())
    with torch.no_grad():
        model.conv2.weight[:, 4:] = 0  # half of the first layer is read by nothing
    neurons = find_neurons(model, inputs_of(TASK)[:2])
    levels = [first(neurons, count) for count in (4, 2, 1)]
    path = ts.semantic.allocate(neurons, TASK, levels, param_retention=0.1, samples=1000, progress=False)
    widths = {"conv1": [8, 4, 2, 1], "conv2": [6, 4, 2, 1]}
    depths = [tuple(widths[layer].index(int(slice_[layer].sum())) for layer in neurons.layers) for slice_ in path]
    assert depths[:2] == [(0, 0), (1, 0)]  # what nothing reads costs nothing
    assert all(sum(after) == sum(before) + 1 for before, after in pairwise(depths))
    assert retention(neurons, path[-1]).param <= 0.1 < retention(neurons, path[-2]).param
    assert depths == slow_path(neurons, [neurons.full(), *levels], 0.1)


def test_levels_need_not_be_parts_of_each_other() -> None:
    neurons = find_neurons(lively(Tiny()), inputs_of(TASK)[:2])
    levels = [first(neurons, 4), ~first(neurons, 4) & first(neurons, 6), first(neurons, 1)]
    path = ts.semantic.allocate(neurons, TASK, levels, param_retention=0.1, samples=1000, progress=False)
    every = [neurons.full(), *levels]
    depths = slow_path(neurons, every, 0.1)
    assert [[slice_[layer].tolist() for layer in neurons.layers] for slice_ in path] == [
        [every[depth][layer].tolist() for layer, depth in zip(neurons.layers, at, strict=True)] for at in depths
    ]


def test_layers_whose_neurons_leave_together_go_on_together() -> None:
    task = load("digits")
    neurons = find_neurons(models.create("resnet20", channels=1, width=0.25), task.example)
    units = together(neurons.sets)
    assert sorted(layer for layers in units for layer in layers) == sorted(neurons.layers)
    assert sorted(map(len, units)) == [1] * 9 + [4, 4, 4]  # the insides of nine blocks, and three residual streams
    levels = [first(neurons, count) for count in (2, 1)]
    path = ts.semantic.allocate(neurons, task, levels, param_retention=0.2, samples=20, progress=False)
    every = [neurons.full(), *map(neurons.closed, levels)]
    for slice_ in path:
        assert slice_ == neurons.closed(slice_)
        for layers in units:
            assert any(all(torch.equal(slice_[layer], level[layer]) for layer in layers) for level in every)
    assert all(after <= before and after != before for before, after in pairwise(path))


def test_where_neurons_leave_alone_every_layer_is_its_own() -> None:
    assert together(find_neurons(lively(Tiny()), inputs_of(TASK)[:2]).sets) == [["conv1"], ["conv2"]]


def test_the_model_is_left_as_it_is() -> None:
    model = lively(Tiny())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    neurons = find_neurons(model, inputs_of(TASK)[:2])
    ts.semantic.allocate(neurons, TASK, [first(neurons, 1)], param_retention=0.5, samples=12, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("counts", "param_retention", "message"),
    [
        ((4, 2), 0.0, r"param_retention must be in \(0, 1\), got 0"),
        ((4, 2), 1.0, r"param_retention must be in \(0, 1\), got 1"),
        ((2, 4), 0.5, "no level may be larger than the one before; give slices from large to small"),
        ((7, 6), 0.5, "the smallest level keeps 0.* of the parameters, more than param_retention=0.5"),
        ((), 0.5, "the smallest level keeps 1 of the parameters, more than param_retention=0.5"),
        ((0,), 0.5, "the slice is empty"),
    ],
)
def test_what_is_refused(counts: tuple[int, ...], param_retention: float, message: str) -> None:
    neurons = find_neurons(lively(Tiny()), inputs_of(TASK)[:2])
    levels = [first(neurons, count) for count in counts]
    with pytest.raises(TorchsliceError, match=message):
        ts.semantic.allocate(neurons, TASK, levels, param_retention=param_retention, progress=False)


def test_slices_of_another_model_are_refused() -> None:
    neurons = find_neurons(lively(Tiny()), inputs_of(TASK)[:2])
    other = find_neurons(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 64, 3)), IMAGE)
    with pytest.raises(TorchsliceError, match="layer"):
        ts.semantic.allocate(neurons, TASK, [first(other, 1)], param_retention=0.5, progress=False)
    with pytest.raises(TorchsliceError, match="several slices, from large to small"):
        ts.semantic.allocate(neurons, TASK, first(neurons, 1), param_retention=0.5, progress=False)
