"""torchslice readapt."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from .. import maintain
from ..artefact import save
from ..find.semantic import contributions
from ..maintain.readapt import TRAINING
from ..runs.source import Opening
from ..training import Training
from . import common
from .critical import check_critical, mean_scores
from .options import Part


def readapt(
    context: typer.Context,
    source: common.SourceName,
    new: Annotated[str, typer.Option(metavar="DATA", help="Data set whose training samples are the new ones.")],
    out: common.Out,
    data: common.SourceData = None,
    opening: Opening = Opening(),
    param_fraction: Annotated[
        float | None,
        typer.Option(
            help="Train the neurons that contribute most per parameter, up to this fraction of all parameters "
            "(default: the class slices).",
            show_default=False,
        ),
    ] = None,
    metric: common.Metric = "taylor",
    classifier: Annotated[bool, typer.Option("--classifier", help="Train the rows of the logits too.")] = False,
    replay: Annotated[
        str, typer.Option(metavar="R,S,...", help="Old samples per new one; of several values the best is kept.")
    ] = "1",
    training: Annotated[Training, Part(skip=("progress",))] = TRAINING,
) -> common.Shown:
    """Adapt a network to new samples of its classes by training its critical neurons only.

    The new samples are the training samples of --new, which needs the classes of the network by name. Accuracies
    printed here are on validation samples; torchslice evaluate looks at the test samples.

    Example:  torchslice readapt runs/r20 --new folder:tonight --param-fraction 0.2 --out adapted.safetensors
    """
    ratios = maintain.check_readapting(common.numbers(replay, "--replay"))
    check_critical(context, "param_fraction", all_of_them="train a smaller part")
    common.check_training(context, training)
    opened = opening.open(source, data, seed=training.seed, device=training.device, new=new)
    neurons, task = opened.neurons(), opened.task
    given = opening.load(new, seed=training.seed)
    samples = given.train.relabelled(torch.tensor(task.class_indices(given.classes))[given.train.labels])
    maintain.check_samples(samples, task)
    if param_fraction is None:
        critical = opened.critical(seed=training.seed)
    else:
        scores = mean_scores(contributions(neurons, task, metric=metric, seed=training.seed))
        critical = maintain.top_by_score_per_parameter(neurons, scores, param_fraction)
    common.say(
        f"training {critical.neuron_retention:.1%} of the neurons of {source} on {len(samples):,} new samples of {new}"
    )
    made = maintain.readapt(neurons, task, critical, samples, replay=ratios, classifier=classifier, training=training)
    metrics = {"neuron_retention": critical.neuron_retention, **made.to_plain()}
    save(made, out, classes=task.classes, preprocessing=task.preprocessing, slice=critical, metrics=metrics)
    next_line = common.next_evaluate(out, opened, opening.words(new))
    return {"artefact": str(out), **metrics}, f"{made}\n{next_line}"
