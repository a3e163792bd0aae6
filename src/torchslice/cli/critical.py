"""What restructure and readapt start from: the network of a run, and its critical neurons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import TorchsliceError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data import Data
    from ..runs import Run
    from ..semantic import Contributions
    from ..slices import Slice

METRIC = "taylor"
Share = Annotated[
    float | None,
    typer.Option(help="Critical is this share of every layer's neurons, by contribution (default: the run's slices)."),
]
Metric = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of the contributions, see torchslice slice.", show_default=METRIC)
]


def open_plain(run: Path, data_dir: Path | None, device: str) -> tuple[Run, Data, nn.Module]:
    """Return a finished run, its data and its network without gates."""
    from ..runs import Run
    from ..submodel import without_gates

    opened = Run.open(run)
    data = opened.load_data(data_dir)
    return opened, data, without_gates(opened.network(data, device=device), data, device=device)


def metric_of(given: str | None, used: bool, by: str) -> str:
    """Return the metric of the contributions; raise if one was given and no contribution is used."""
    if given is not None and not used:
        raise TorchsliceError(f"--metric plays no part without {by}; leave it out, or give {by}.")
    return METRIC if given is None else given


def critical_of(opened: Run, contributed: Callable[[], Contributions], *, share: float | None, metric: str) -> Slice:
    """Return the union of a run's slices, or the `share` of every layer's neurons that contributes most."""
    from ..semantic import Rule, slices_from
    from ..slices import union

    if share is None:
        return union(opened.slices().values())
    rule = Rule(metric, "global", share=share)  # says what is wrong with it before long work
    return slices_from(contributed(), rule).critical


def mean_scores(contributed: Contributions, metric: str) -> dict[str, Tensor]:
    """Return the mean contribution of every neuron over the classes, {layer: [N]}."""
    return {layer: score.mean(0) for layer, score in contributed[metric].items()}
