"""Metrics: numbers computed by hand, and what may be registered."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from torchslice.data import Data, Split
from torchslice.errors import TorchsliceError
from torchslice.semantic import METRICS, Metric, contributions
from torchslice.semantic.metrics import ensemble, min_max, variance

QUIET = {"device": "cpu", "progress": False}


def pixel_data(pixels, labels):
    """Images of one pixel whose normalised value is the pixel itself."""
    split = Split(torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 1, 1), torch.tensor(labels))
    return Data("pixels", ("one", "two"), split, split, split, mean=(0.0,), std=(1 / 255,))


def pixel_net():
    """Three neurons relu(x), relu(2 - x), relu(x / 2 + 1); scores (ln 2 times the first, 0)."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0], [-1.0], [0.5]]))
        net[1].bias.copy_(torch.tensor([0.0, 2.0, 1.0]))
        net[3].weight.copy_(torch.tensor([[math.log(2), 0.0, 0.0], [0.0, 0.0, 0.0]]))
        net[3].bias.zero_()
    return net


def test_all_metrics_by_hand():
    """Class one: x = 1, 3, neurons (1, 1, 1.5) and (3, 0, 2.5), p(one) = 2/3 and 8/9; class two: x = 2 twice."""
    data = pixel_data([1, 3, 2, 2], [0, 0, 1, 1])
    found = contributions(pixel_net(), data, metric=METRICS.names(), correct_only=False, **QUIET)
    ln2 = math.log(2)
    expected = {
        "avg": [[2.0, 0.5, 2.0], [2.0, 0.0, 2.0]],
        "var": [[1.0, 0.25, 0.25], [0.0, 0.0, 0.0]],
        "ens": [[1.0, 0.0, 0.5], [0.5, 0.0, 0.5]],
        "taylor": [[ln2 / 3, 0.0, 0.0], [2 * ln2 * 4 / 5, 0.0, 0.0]],
        "deeplift": [[ln2, 0.0, 0.0], [0.0, 0.0, 0.0]],  # the mean image is 2
    }
    assert found.metrics == list(expected)
    for metric, scores in expected.items():
        torch.testing.assert_close(found[metric]["1"], torch.tensor(scores, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert found.counts.tolist() == [2, 2]


def test_neurons_that_rounding_alone_tells_apart_are_equal():
    noisy = torch.tensor([[3.0, 3.0 + 1e-7, 3.0]], dtype=torch.float64)
    assert min_max(noisy).tolist() == [[0, 0, 0]]
    assert variance(noisy, noisy.square() * (1 + 1e-13)).tolist() == [[0, 0, 0]]
    assert ensemble(noisy, noisy, noisy.square()).tolist() == [[0, 0, 0]]
    assert variance(torch.tensor([[1e3]]), torch.tensor([[1e6 + 1.0]])).item() == 1.0  # small, but no rounding


@pytest.fixture
def registered():
    """Forget metrics that a test registers."""
    before = dict(METRICS._entries)
    yield METRICS.register
    METRICS._entries.clear()
    METRICS._entries.update(before)


def peak(activation):
    return activation.amax(-1)


def weighted(activation, contribution):
    return (activation * contribution).sum(-1)


def test_a_metric_of_the_users_own(registered):
    registered("peak")(Metric((peak,), lambda mean_peak: mean_peak))
    registered("gain")(Metric((weighted, peak), lambda first, second: first - second))
    found = contributions(pixel_net(), pixel_data([1, 3, 2, 2], [0, 0, 1, 1]), metric=["peak", "gain"],
                          correct_only=False, **QUIET)  # fmt: skip
    assert found["peak"]["1"][0].tolist() == pytest.approx([2.0, 0.5, 2.0])
    assert found["gain"]["1"][0].tolist() == pytest.approx([(3 - 1) * math.log(2) / 2 - 2, -0.5, -2])


def test_a_metric_that_cannot_be(registered):
    with pytest.raises(TorchsliceError, match=r"term 'odd' of a metric has the parameters \(loss\); they may be act"):

        def odd(loss): ...

        Metric((odd,), torch.abs)
    with pytest.raises(TorchsliceError, match="not gradient and contribution at once"):
        Metric((lambda gradient, contribution: gradient,), torch.abs)
    registered("maps")(Metric((lambda activation: activation,), torch.abs))
    registered("mean")(Metric((peak,), lambda mean: mean.mean(1)))
    data = pixel_data([1, 2], [0, 1])
    with pytest.raises(TorchsliceError, match=r"one value per sample and neuron, \[1, 3\]; it returned \[1, 3, 1\]"):
        contributions(pixel_net(), data, metric="maps", correct_only=False, **QUIET)
    with pytest.raises(TorchsliceError, match=r"metric 'mean' must score layer '1' as \[2, 3\], got \[2\]"):
        contributions(pixel_net(), data, metric="mean", correct_only=False, **QUIET)


def test_an_unknown_metric_lists_the_known():
    with pytest.raises(
        TorchsliceError, match=r"unknown metric 'taylr'. Did you mean 'taylor'\? Known: avg, var, ens, taylor, deeplift"
    ):
        contributions(pixel_net(), pixel_data([1, 2], [0, 1]), metric="taylr", **QUIET)
