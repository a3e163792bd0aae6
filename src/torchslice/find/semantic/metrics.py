"""Contribution metrics: what is averaged over the samples of a class, and how the means become scores.

Shapes: B batch, C classes, N neurons of a layer, P positions (pixels or tokens; those of all uses of the layer).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import TorchsliceError
from ...registry import Registry

ROUNDING = 1e-6  # smaller relative differences between float32 activations cannot be told from rounding

Term = Callable[..., Tensor]


@dataclass(frozen=True)
class Metric:
    """How much a neuron contributes to a class, from means over the samples of the class.

    Args:
        terms: functions of one batch of one layer, each -> [B, N]. They read what their parameters are named after,
            float [B, N, P]: `activation` a; `gradient` dL/da, L = cross entropy on the true class; `contribution`, by
            DeepLIFT, to the logit of the true class. `kept` is bool [B, N, P] where positions are tokens: those that
            are no padding; else None.
        score: turns the means of the terms, float64 [C, N] each, into scores [C, N]; that of a single term is one.

    >>> peak = Metric((lambda activation: activation.amax(-1),))  # METRICS.register("peak")(peak) makes it known
    """

    terms: tuple[Term, ...]
    score: Callable[..., Tensor] = lambda mean: mean

    def __post_init__(self) -> None:
        apart = {"gradient", "contribution"}
        for term in self.terms:
            names = reads(term)
            if names <= {"kept"} or not names <= {"activation", "kept", *apart} or names >= apart:
                raise TorchsliceError(
                    f"term {term.__name__!r} of a metric has the parameters ({', '.join(sorted(names))}); they may be "
                    "activation, gradient, contribution, kept, but not gradient and contribution at once: use two "
                    "terms for that."
                )


METRICS: Registry[Metric] = Registry("metric")


def reads(term: Term) -> set[str]:
    """Return the names of the parameters of a term."""
    return set(inspect.signature(term).parameters)


def spatial_mean(activation: Tensor, kept: Tensor | None = None) -> Tensor:
    """Return s, the mean over the positions, or over those that are kept.

    >>> spatial_mean(torch.tensor([[[1.0, 2.0, 9.0]]]), torch.tensor([[[True, True, False]]]))
    tensor([[1.5000]])
    """
    return activation.mean(-1) if kept is None else torch.where(kept, activation, 0).sum(-1) / kept.sum(-1)


def magnitude(activation: Tensor, kept: Tensor | None = None) -> Tensor:
    """Return abs(s)."""
    return spatial_mean(activation, kept).abs()


def square(activation: Tensor, kept: Tensor | None = None) -> Tensor:
    """Return s^2 in float64."""
    return spatial_mean(activation, kept).double().square()


def sensitivity(activation: Tensor, gradient: Tensor, kept: Tensor | None = None) -> Tensor:
    """Return the size of the loss's first-order change when the neuron is held at zero: abs(mean of a * dL/da)."""
    return spatial_mean(activation * gradient, kept).abs()


def logit_change(contribution: Tensor) -> Tensor:
    """Return the size of what the neuron adds to the logit: abs(sum of its contributions over the positions)."""
    return contribution.sum(-1).abs()


def variance(mean: Tensor, mean_square: Tensor) -> Tensor:
    """Return the population variance from the means of s and s^2; 0 where rounding could make it, NaN stays NaN."""
    spread = mean_square - mean.square()
    return spread.masked_fill(spread <= ROUNDING**2 * mean_square, 0)


def ensemble(mean_magnitude: Tensor, mean: Tensor, mean_square: Tensor) -> Tensor:
    """Return the mean of avg and var after both are scaled to [0, 1] within a layer and class."""
    return (min_max(mean_magnitude) + min_max(variance(mean, mean_square))) / 2


def min_max(values: Tensor) -> Tensor:
    """Scale rows of values >= 0 [C, N] so that the smallest is 0 and the largest 1; rows of equal values become 0."""
    low, high = values.aminmax(dim=1, keepdim=True)
    span = high - low
    return ((values - low) / span).masked_fill(span <= ROUNDING * high, 0)


# Our definitions: the method's paper names the metrics and leaves open what exactly they are.
METRICS.register("avg")(Metric((magnitude,)))
METRICS.register("var")(Metric((spatial_mean, square), variance))
METRICS.register("ens")(Metric((magnitude, spatial_mean, square), ensemble))
METRICS.register("taylor")(Metric((sensitivity,)))
METRICS.register("deeplift")(Metric((logit_change,)))
