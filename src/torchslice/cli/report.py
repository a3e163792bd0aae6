"""torchslice report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..find.semantic import METRICS, contributions
from ..graph.find import find_neurons
from ..imports import import_optional
from ..judge import evaluate_stages
from ..runs.run import Run
from ..runs.source import Opening
from ..show import report as make_report
from ..slices import union
from ..training import accuracy
from . import common


def report(
    context: typer.Context,
    source: common.SourceName,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write, such as report.html.")],
    data: common.SourceData = None,
    opening: Opening = Opening(),
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Show also what the class slices of these are worth at every stage, beside controls.",
            show_default=False,
        ),
    ] = None,
    metric: common.Metric = "taylor",
    samples_per_class: common.SamplesPerClass = 128,
    seed: common.Seed = 0,
    device: common.DeviceOption = "auto",
) -> common.Shown:
    """Write one page about a network: what can be cut, what classes share, what a part of any of them costs.

    The page is one file, for any browser, without a network. Of a run that is not trained to its end it shows what
    there is.

    Example:  torchslice report runs/r20 --out report.html
    """
    common.check_needs(context, {"slices": ("classes", ())})
    _ = METRICS[metric]  # says which there are
    import_optional("matplotlib.figure", extra="report")
    run = Run.open(source) if Path(source).is_dir() else None
    rows = [] if run is None else run.rows
    shown: dict[str, Any] = {"title": source, "rows": rows}
    if run is not None and len(rows) < run.recipe.training.epochs:
        task, done = run.load_task(opening.data_dir), f"{len(rows)} of {run.recipe.training.epochs}"
        neurons = find_neurons(run.recipe.make_model(task), task.example, classes=task.classes)
        shown["notes"] = [
            f"This run is not trained to its end: {done} epochs. Groups and parts are shown when it is; the command "
            "that began it goes on with it."
        ]
        scores = None
    else:
        opened = opening.open(source, data, seed=seed, device=device)
        neurons, task = opened.neurons(), opened.task
        chosen = [] if classes is None else common.names(classes)
        if chosen:
            task.sub_task_labels(chosen)  # says what is wrong with them
            slices = opened.slices(seed=seed)
        common.say(f"contributions of {len(neurons):,} neurons to {len(task.classes)} classes of {task.name}")
        scores = contributions(neurons, task, metric=metric, samples_per_class=samples_per_class, seed=seed)
        shown |= {"metrics": opened.metrics, "words": opening.again(opened)}
        shown["accuracy"] = accuracy(neurons.model, task, "validation")
        if chosen:
            slice_ = union(slices[name] for name in chosen)
            shown["stages"] = evaluate_stages(neurons, task, slice_, classes=chosen, training=None).to_plain()
    page = make_report(neurons, task, scores, **shown)
    page.save(out)
    size = len(page.html.encode())
    return {"source": source, "report": str(out), "bytes": size}, f"{out}: {size:,} bytes"
