"""The largest part of a network that a budget allows: of multiply-accumulates, of parameters, or of time.

Shapes: N neurons of a layer.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .cut.extract import extract, retention
from .errors import TorchsliceError
from .graph.neurons import Neurons
from .inputs import device_of
from .rankings import Ranking, by_score, widths
from .slices import Slice
from .training.costs import latency
from .training.ranks import current_ranks

SHARES = 2**12  # parts into which the widths of a network are divided
BUDGETS = ("mac_retention", "param_retention", "latency_ms")


def fit_budget(
    neurons: Neurons,
    ranking: Ranking,
    *,
    classes: Sequence[str | int] | None = None,
    mac_retention: float | None = None,
    param_retention: float | None = None,
    latency_ms: float | None = None,
    powers: tuple[float, float] = (1.0, 1.0),
    round_to: int = 8,
) -> Slice:
    """Return the longest prefixes of a ranking whose network fits a budget.

    All layers grow together, see `rankings.widths`; where the next step of all is too much, as many layers take it as
    fit, the first ones first. The last layer keeps at least as many neurons as there are logits. Neurons that leave
    together are kept together, see `Neurons.closed`.

    Args:
        ranking: of these neurons; for some classes, such as `rankings.by_mean_score` makes.
        classes: names or indices of the logits that remain; all by default.
        mac_retention, param_retention: fraction in (0, 1] of the MACs of the convolutions and linear layers, or of the
            parameters, that the network that is built may have. Give one of these, or `latency_ms`.
        latency_ms: most milliseconds of a forward pass of one sample, measured here and now on the networks that are
            tried.
        powers: how widths spread over depth, see `rankings.widths`.
        round_to: widths are multiples of it, rounded up, for odd ones are slow. They are counted in rows of the weight,
            so that layers of wide heads lose one head at a time.

    Raises TorchsliceError for a budget that the smallest such network exceeds; it says what that one needs.

    >>> from torchslice.rankings import by_mean_score
    >>> slice_ = fit_budget(neurons, by_mean_score(scores["taylor"]), mac_retention=0.5)
    >>> 0.4 < ts.retention(neurons, slice_).built_mac <= 0.5
    True
    """
    name, most = the_budget(mac_retention, param_retention, latency_ms)
    if round_to < 1:
        raise TorchsliceError(f"round_to must be at least 1, got {round_to}.")
    logits = neurons.num_classes if classes is None else len(classes)
    layers, last, steps = list(neurons.layers), list(neurons.layers)[-1], neurons.steps(round_to)

    def part(share: int, wider: int = 0) -> Slice:
        """Return the prefixes at a share of the widths, the first `wider` layers one step of all larger."""
        counts, more = (
            widths(ranking.layers, min(1, max(step, 0.5) / SHARES), powers=powers, steps=steps)
            for step in (share, share + 1)
        )
        counts |= {layer: more[layer] for layer in layers[:wider]}
        counts[last] = min(ranking.layers[last], max(counts[last], -(-logits // steps[last]) * steps[last]))
        return neurons.closed(ranking.prefix(counts))

    def needs(slice_: Slice) -> float:
        """Measure what is limited."""
        if name == "latency_ms":
            small = extract(neurons, slice_, classes=classes)
            time = torch.tensor(latency(small, neurons.example, batch_sizes=(1,))[1].median_ms, device=device_of(small))
            current_ranks(time.device).copy_from_first([time])  # all processes choose alike
            return time.item()
        kept = retention(neurons, slice_, classes=classes)
        return kept.built_mac if name == "mac_retention" else kept.built_param

    if (least := needs(part(0))) > most:
        smaller = ", or a smaller round_to" if round_to > 1 else ""
        raise TorchsliceError(
            f"no sub-model fits {name}={most:g}: the smallest, of {round_to} rows in every layer or all it has, "
            f"needs {least:.3g}. Give {name}={_rounded_up(least):.3g} or more{smaller}."
        )
    share = _largest(SHARES, lambda share: needs(part(share)) <= most)
    return part(share, _largest(len(layers), lambda wider: needs(part(share, wider)) <= most))


def check_budget(neurons: Neurons, **budget: Any) -> None:
    """Raise for a budget that no slice meets, whichever neurons it keeps; see `fit_budget`.

    >>> check_budget(neurons, classes=["3", "8"], mac_retention=0.5)
    """
    by_set = by_score({name: -of.double() for name, of in neurons.sets.items()})  # what leaves together comes together
    fit_budget(neurons, by_set, **budget)


def the_budget(
    mac_retention: float | None, param_retention: float | None, latency_ms: float | None
) -> tuple[str, float]:
    """Return name and value of the one budget that is given; raise unless it is one, and can be."""
    given = zip(BUDGETS, (mac_retention, param_retention, latency_ms), strict=True)
    budgets = {name: value for name, value in given if value is not None}
    if len(budgets) != 1:
        raise TorchsliceError(f"give one budget, such as mac_retention=0.2; got {', '.join(budgets) or 'none'}.")
    (name, most), *_ = budgets.items()
    if not (most > 0 and (name == "latency_ms" or most <= 1)):
        allowed = "above 0" if name == "latency_ms" else "in (0, 1]"
        raise TorchsliceError(f"{name} must be {allowed}, got {most}.")
    return name, most


def _rounded_up(number: float) -> float:
    """Return the next number of three digits, a hundredth more at most.

    >>> _rounded_up(0.02712), _rounded_up(1.5)
    (0.0272, 1.5)
    """
    unit = 10.0 ** (math.floor(math.log10(number)) - 2)
    return round(math.ceil(number / unit - 1e-9) * unit, 12)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number in 0..most that fits, where 0 does and all below one that fits do."""
    return bisect_right(range(1, most + 1), False, key=lambda number: not fits(number))
