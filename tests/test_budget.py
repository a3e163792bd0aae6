"""The largest part of a network within a budget: counted by hand, checked on built networks, refused where none is."""

from __future__ import annotations

import pytest
import torch

from tests.battery.zoo import prepared
from tests.nets import Tiny, lively
from torchslice import budget
from torchslice.budget import fit_budget
from torchslice.cut.extract import extract, retention
from torchslice.errors import TorchsliceError
from torchslice.graph.find import find_neurons
from torchslice.rankings import Ranking
from torchslice.training.costs import Latency, cost

WHOLE = 64 * 8 * 9 + 64 * 6 * 8 * 9 + 6 * 3  # MACs of Tiny


def backwards(neurons):
    """Rank the last neuron of every layer first."""
    return Ranking({name: torch.arange(layer.count).flip(0) for name, layer in neurons.layers.items()})


@pytest.fixture
def neurons():
    return find_neurons(
        lively(Tiny()), torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8), classes=["red", "green", "blue"]
    )


def counts(slice_):
    return [int(mask.sum()) for mask in slice_.masks.values()]


def test_the_layers_grow_together_and_the_first_ones_take_what_is_left(neurons):
    ranking = backwards(neurons)

    def macs(first, second):
        return (64 * first * 9 + 64 * second * first * 9 + second * 3) / WHOLE

    def found(most, **options):
        return counts(fit_budget(neurons, ranking, mac_retention=most, round_to=2, **options))

    assert found(macs(4, 4)) == [4, 4]
    assert found(macs(6, 4)) == [6, 4]  # the second layer as well would be too much
    assert found(macs(6, 4) - 1e-9) == [4, 4]
    assert found(1.0) == [8, 6]
    assert found(macs(2, 4)) == [2, 4]  # 4 are the least multiple of 2 for 3 logits
    assert found(macs(2, 2), classes=["red", "blue"]) == [2, 2]
    assert fit_budget(neurons, ranking, mac_retention=0.6, round_to=2)["conv1"].tolist() == [False] * 2 + [True] * 6


def test_parameters_by_hand(neurons):
    whole = 8 * (9 + 1 + 2) + 6 * (72 + 1 + 2) + 3 * 7
    most = (4 * 12 + 4 * (36 + 3) + 3 * 5) / whole
    assert counts(fit_budget(neurons, backwards(neurons), param_retention=most, round_to=4)) == [4, 4]
    with pytest.raises(TorchsliceError, match=r"no sub-model fits param_retention=0.3: the smallest.* needs 0.386"):
        fit_budget(neurons, backwards(neurons), param_retention=0.3, round_to=4)
    with pytest.raises(TorchsliceError, match=r"or more\.$"):
        fit_budget(neurons, backwards(neurons), param_retention=0.01, round_to=1)


@pytest.mark.parametrize("name", ["gated", "preactivation", "tokens", "vgg16", "resnet18", "mobilenet_v2"])
def test_the_built_network_fits_and_a_larger_budget_contains_it(name):
    neurons = prepared(name)
    whole, ranking, smaller = cost(neurons.model, neurons.example).macs, backwards(neurons), neurons.none()
    least = retention(neurons, ranking.prefix(dict.fromkeys(neurons.layers, 1))).built_mac
    for most in (least + (1 - least) * part for part in (0.3, 0.6)):
        slice_ = fit_budget(neurons, ranking, mac_retention=most, round_to=1)
        assert cost(extract(neurons, slice_), neurons.example).macs <= most * whole
        kept = retention(neurons, slice_)
        assert kept.built_mac == pytest.approx(kept.mac)  # what leaves together was chosen together
        assert smaller <= slice_ and slice_ != smaller
        smaller = slice_


def test_a_time_is_measured_on_the_networks_that_are_cut(neurons, monkeypatch):
    def measured(model, example, *, batch_sizes):
        return {1: Latency(1, float(model.conv1.out_channels + model.conv2.out_channels), 0.0, 0.0, 1)}

    monkeypatch.setattr(budget, "latency", measured)
    assert counts(fit_budget(neurons, backwards(neurons), latency_ms=9, round_to=2)) == [4, 4]
    with pytest.raises(TorchsliceError, match=r"no sub-model fits latency_ms=5: .* needs 6"):
        fit_budget(neurons, backwards(neurons), latency_ms=5, round_to=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one budget, such as mac_retention=0.2; got none"),
        ({"mac_retention": 0.5, "latency_ms": 1}, "got mac_retention, latency_ms"),
        ({"mac_retention": 1.5}, r"mac_retention must be in \(0, 1\], got 1.5"),
        ({"latency_ms": 0}, "latency_ms must be above 0, got 0"),
        ({"mac_retention": 0.5, "round_to": 0}, "round_to must be at least 1, got 0"),
    ],
)
def test_bad_budgets(neurons, options, message):
    with pytest.raises(TorchsliceError, match=message):
        fit_budget(neurons, backwards(neurons), **options)


def test_rows_are_rounded_so_that_heads_leave_one_by_one():
    heads = prepared("heads")  # 4 heads of 6 rows
    assert heads.steps(8) == {"qkv": 4} and heads.steps(3)["qkv"] == 1
    assert prepared("vit").steps(8)["blocks.0.attn.qkv"] < 8
