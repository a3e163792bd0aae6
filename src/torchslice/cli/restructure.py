"""torchslice restructure."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from .. import maintain
from ..artefact import save
from ..errors import TorchsliceError
from ..find.semantic import contributions
from ..runs.source import Opening
from ..training import Training
from . import common
from .critical import check_critical, critical_of, mean_scores
from .options import Part

Removal = Literal["lamp", "global", "uniform+", "erk", "structured"]


def restructure(
    context: typer.Context,
    source: common.SourceName,
    out: common.Out,
    data: common.SourceData = None,
    opening: Opening = Opening(),
    method: Annotated[
        Removal, typer.Option(help="Which weights to remove; structured removes the least critical neurons.")
    ] = "lamp",
    param_retention: Annotated[float | None, typer.Option(help="Target: fraction of the parameters that stay.")] = None,
    mac_retention: Annotated[
        float | None, typer.Option(help="Target: fraction of the multiply-accumulates, zeros left out.")
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Target of structured: milliseconds for one sample, on this machine.")
    ] = None,
    no_slice: Annotated[bool, typer.Option("--no-slice", help="Keep all neurons and only compress.")] = False,
    neuron_fraction: common.NeuronFraction = None,
    metric: common.Metric = "taylor",
    prune_fraction: Annotated[
        float, typer.Option(help="Fraction of the surviving weights that an iteration removes.")
    ] = 0.2,
    max_accuracy_loss: Annotated[
        float, typer.Option(help="Stop where more validation accuracy is lost to the whole network; 1 is never.")
    ] = 0.01,
    patience: Annotated[int, typer.Option(min=0, help="Further trainings of an iteration to win accuracy back.")] = 0,
    training: Annotated[Training, Part(skip=("progress",))] = Training(epochs=3, learning_rate=0.01),
) -> common.Shown:
    """Compress a network: keep its critical neurons, then remove more and retrain, step by step.

    Name one target. Accuracies printed here are on validation samples; torchslice evaluate looks at the test samples.

    Example:  torchslice restructure runs/r20 --method lamp --param-retention 0.05 --out small.safetensors
    """
    structured = method == "structured"
    if no_slice and (neuron_fraction is not None or opening.slices is not None):
        raise TorchsliceError("--no-slice keeps all neurons, so --neuron-fraction and --slices play no part.")
    check_critical(context, "neuron_fraction", scored=structured, all_of_them="give --no-slice to keep them")
    common.check_training(context, training)
    targets: dict[str, Any] = {
        "param_retention": param_retention,
        "mac_retention": mac_retention,
        "latency_ms": latency_ms,
    }
    maintain.check_restructuring(method, targets, prune_fraction, max_accuracy_loss, patience)
    opened = opening.open(source, data, seed=training.seed, device=training.device)
    neurons, task, seed, found, kept = opened.neurons(), opened.task, training.seed, None, None
    if structured or neuron_fraction is not None:
        found = contributions(neurons, task, metric=metric, seed=seed)
    if not no_slice:
        kept = critical_of(opened, found, neuron_fraction=neuron_fraction, seed=seed)
    start = "the whole network" if kept is None else f"{kept.neuron_retention:.1%} of the neurons"
    common.say(f"{method} from {start} of {source}: {training.epochs} epochs in every iteration; result in {out}")
    made = maintain.restructure(
        neurons,
        task,
        kept,
        method=method,
        **targets,
        scores=mean_scores(found) if structured and found is not None else None,
        prune_fraction=prune_fraction,
        max_accuracy_loss=max_accuracy_loss,
        patience=patience,
        training=training,
    )
    retentions = {name: made.best[name] for name in ("param_retention", "mac_retention")}
    metrics = {**retentions, **made.to_plain()}
    save(made, out, classes=task.classes, preprocessing=task.preprocessing, slice=kept, metrics=metrics)
    next_line = common.next_evaluate(out, opened, opened.data)
    return {"artefact": str(out), **metrics}, f"{made}\n{next_line}"
