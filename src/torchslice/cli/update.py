"""torchslice update."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from .. import maintain
from ..artefact import save
from ..maintain.readapt import TRAINING
from ..runs.source import Opening
from ..training import Training
from . import common
from .options import Part


def update(
    context: typer.Context,
    source: common.SourceName,
    class_: Annotated[str, typer.Option("--class", metavar="NAME", help="Name of the class.")],
    new: Annotated[str, typer.Option(metavar="DATA", help="Data set whose training samples of it are the new ones.")],
    out: common.Out,
    data: common.SourceData = None,
    opening: Opening = Opening(),
    replay: Annotated[float, typer.Option(help="Old samples of all classes per new one.")] = 5.0,
    training: Annotated[Training, Part(skip=("progress",))] = TRAINING,
) -> common.Shown:
    """Learn one class anew from new samples, through its slice; all other logits stay as they are.

    Accuracies printed here are on validation samples; torchslice evaluate looks at the test samples.

    Example:  torchslice update runs/r20 --class cat --new folder:cats --out newcat.safetensors
    """
    common.check_training(context, training)
    opened = opening.open(source, data, seed=training.seed, device=training.device, new=new)
    task, given = opened.task, opening.load(new, seed=training.seed).restrict([class_])
    (label,) = task.class_indices([class_])
    samples = given.train.relabelled(torch.full_like(given.train.labels, label))
    slice_ = opened.slices(seed=training.seed)[class_]
    made = maintain.update(opened.neurons(), task, slice_, samples, replay=replay, training=training)
    save(made, out)
    result = {"artefact": str(out), "class": class_, **made.metrics}
    return result, f"{made}\n{common.next_evaluate(out, opened, opened.data)}"
