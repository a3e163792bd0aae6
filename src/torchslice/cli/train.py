"""torchslice train."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..budget import check_budget
from ..errors import TorchsliceError
from ..runs.recipe import NEEDS, Method, Recipe, absolute
from ..runs.run import Run, settled
from ..runs.source import Opening
from ..training import Training
from . import common
from .options import Part


def train(
    context: typer.Context,
    model: common.Model,
    data: common.DataSet,
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder of the run: new, or one to go on with.")],
    method: Method = Method(),
    training: Annotated[Training, Part(skip=("progress",))] = Training(epochs=30),
    train_limit: Annotated[
        int | None, typer.Option(min=1, help="Use so many training samples (default: all).", show_default=False)
    ] = None,
    opening: Annotated[Opening, Part(only=("model_argument", "data_option", "data_dir"))] = Opening(),
) -> common.Shown:
    """Train a network so that it can be cut, or the usual way; the same command goes on where it stopped.

    With more epochs, the command continues a finished run from its last state, with a new learning rate schedule.

    Example:  torchslice train resnet20 cifar10 --data-dir data --epochs 60 --out runs/r20
    """
    common.check_folder(out / "run.json")
    common.check_needs(context, NEEDS)
    placement = common.check_training(context, training)
    training = replace(training, precision=placement.precision)
    options = opening.model_arguments, opening.data_options
    recipe = settled(out, Recipe(absolute(model), absolute(data), method, training, *options, train_limit))
    task = recipe.load_task(opening.data_dir)
    neurons = recipe.check(task)
    size = sum(parameter.numel() for parameter in neurons.model.parameters())
    step = ["slice", str(out)]
    if method.method != "gates":
        with suppress(TorchsliceError):  # raised where the network is too narrow for this budget
            check_budget(neurons, classes=task.classes[:2], mac_retention=0.4)
            part = ["--classes", ",".join(task.classes[:2]), "--mac-retention", "0.4", "--out", "part.safetensors"]
            step = ["extract", str(out), *part]
    del neurons  # no second network in memory while the first is trained
    run = Run.start(out, recipe, task, data_dir=opening.data_dir)
    done, epochs = run.epochs_done, training.epochs
    common.say(f"method {method.method}: {model}, {size:,} parameters, on {task!r}")
    how = f"{training.batch_size} samples a step on {placement.device}, {placement.precision}"
    common.say(f"{epochs} epochs of {how}; result in {out}")
    if done:
        common.say(
            f"{done} epochs are done" + ("; nothing is left to do" if done >= epochs else "; going on after them")
        )
    history = run.train(task, device=training.device, progress=done < epochs)
    last = history[-1]
    text = f"{out}: validation accuracy {last['validation_accuracy']:.2%} after {last['epoch']} epochs\n"
    result = {"run": str(out), "resumed_after": done, "history": history}
    return result, f"{text}{common.next_step(*step)}"
