"""torchslice groups."""

from __future__ import annotations

from typing import Annotated

import typer

from ..find import semantic
from ..find.semantic import METRICS
from ..find.semantic.groups import OUTSIDE, check_count, check_outside
from ..runs.source import Opening
from . import common
from .options import Part


def groups(
    source: common.SourceName,
    data: common.SourceData = None,
    opening: Annotated[Opening, Part(skip=("slices",))] = Opening(),
    metric: common.Metric = "taylor",
    samples_per_class: common.SamplesPerClass = 256,
    outside: Annotated[
        float, typer.Option(help="What a neuron may contribute to others, of what it contributes to its classes.")
    ] = OUTSIDE,
    count: Annotated[
        int | None, typer.Option(min=1, help="So many families of classes are the finest.", show_default="every class")
    ] = None,
    seed: common.Seed = 0,
    device: common.DeviceOption = "auto",
) -> common.Shown:
    """Show what a network shares: sets of classes, with the neurons of all layers that serve just them.

    Example:  torchslice groups runs/r20
    """
    check_outside(outside)
    _ = METRICS[metric]  # says which there are
    opened = opening.open(source, data, seed=seed, device=device)
    neurons, task = opened.neurons(), opened.task
    check_count(count, len(task.classes))
    common.say(f"semantic groups by {metric} from training samples of {task.name}")
    scores = semantic.contributions(neurons, task, metric=metric, samples_per_class=samples_per_class, seed=seed)
    found = semantic.groups(neurons, scores, outside=outside, count=count)
    result = {"source": source, "metric": metric, "outside": outside, **found.to_plain()}
    file = [] if opened.run is not None else ["--out", "slices.json"]
    chosen = ["--by", "contribution", "--strategy", "by-group", "--outside", outside, *file]
    step = common.next_step("slice", *opening.again(opened), *chosen)
    return result, f"{found}\n{step}"
