"""torchslice plot."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import TorchsliceError
from ..files import atomic_write
from ..find.semantic import METRICS, contributions, groups
from ..imports import import_optional
from ..runs.run import Run
from ..runs.source import Opening
from ..show import figures
from . import common
from .options import Part

#: What an option needs to play a part: another one, and its values.
OPENED = (*(entry.name for entry in fields(Opening)), "metric", "samples_per_class")
NEEDS = {"layer": ("what", ("overlap",)), **dict.fromkeys(OPENED, ("what", ("tree", "overlap", "sharing")))}


def plot(
    context: typer.Context,
    source: common.SourceName,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write: .png, .svg or .pdf.")],
    data: common.SourceData = None,
    opening: Annotated[Opening, Part(skip=("slices",))] = Opening(),
    what: Annotated[
        Literal["tree", "overlap", "sharing", "training"],
        typer.Option(
            help="The tree of the classes, which classes share neurons, how many neurons of each layer serve how many "
            "classes, or the training of a run."
        ),
    ] = "tree",
    layer: Annotated[str | None, typer.Option(help="overlap: in this layer.", show_default="all layers")] = None,
    metric: common.Metric = "taylor",
    samples_per_class: common.SamplesPerClass = 128,
    seed: common.Seed = 0,
    device: common.DeviceOption = "auto",
) -> common.Shown:
    """Draw one figure about a network into a file.

    Example:  torchslice plot runs/r20 --what sharing --out sharing.png
    """
    common.check_needs(context, NEEDS)
    _ = METRICS[metric]  # says which there are
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise TorchsliceError(f"a figure is written as .png, .svg or .pdf, not as {out.name!r}; name another file.")
    figure = import_optional("matplotlib.figure", extra="report").Figure(layout="constrained", dpi=150)
    if what == "training":
        if not Path(source).is_dir():
            raise TorchsliceError(f"{source} is no run, so nothing is known of its training; choose another --what.")
        figures.training(figure.subplots(), Run.open(source).rows)
    else:
        opened = opening.open(source, data, seed=seed, device=device)
        neurons = opened.neurons()
        if layer is not None:
            figures.check_layer(layer, neurons.layers)
        scores = contributions(neurons, opened.task, metric=metric, samples_per_class=samples_per_class, seed=seed)
        found = groups(neurons, scores)
        axes = figure.subplots()
        if what == "overlap":
            figures.overlap(axes, found, layer)
        else:
            (figures.tree if what == "tree" else figures.sharing)(axes, found)
    atomic_write(out, lambda path: figure.savefig(path, format=out.suffix[1:]))
    return {"source": source, "figure": str(out)}, f"drawn: {out}"
