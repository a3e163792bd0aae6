"""The critical neurons that restructure, readapt and extend start from."""

from __future__ import annotations

import typer
from torch import Tensor

from ..errors import TorchsliceError
from ..find.semantic import METRICS, Contributions, PerLayer
from ..runs.source import Source
from ..slices import Slice
from .common import check_needs, flag, given_options


def check_critical(context: typer.Context, option: str, *, scored: bool = False, all_of_them: str = "") -> None:
    """Check the options that say which neurons are critical, before any work.

    Args:
        option: name of the fraction that is chosen by contribution; without it, critical are the class slices.
        scored: whether contributions are measured anyway.
        all_of_them: what to do instead of a fraction of 1, where that makes no sense.
    """
    check_needs(context, {} if scored else {"metric": (option, ())})
    _ = METRICS[context.params["metric"]]  # says which there are
    fraction = context.params[option]
    if fraction is None:
        return
    if "slices" in given_options(context):
        raise TorchsliceError(
            f"{flag(option)} chooses neurons by contribution, so --slices plays no part; leave one out."
        )
    if not 0 < fraction <= 1:
        raise TorchsliceError(f"{option} must be in (0, 1], got {fraction:g}.")
    if fraction == 1 and all_of_them:
        raise TorchsliceError(f"{flag(option)} 1 makes every neuron critical; {all_of_them}.")


def critical_of(source: Source, found: Contributions | None, *, neuron_fraction: float | None, seed: int) -> Slice:
    """Return what the class slices need together, or the fraction of every layer's neurons that contributes most."""
    if neuron_fraction is None or found is None:
        return source.critical(seed=seed)
    return PerLayer(neuron_fraction).choose(found).critical


def mean_scores(found: Contributions) -> dict[str, Tensor]:
    """Return the mean contribution of every neuron over the classes, {layer: [N]}."""
    return {layer: of.mean(0) for layer, of in found[found.metrics[0]].items()}
