"""torchslice extract."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Annotated, Any

import typer

from ..artefact import save
from ..budget import the_budget
from ..errors import TorchsliceError
from ..runs.source import Opening
from ..submodel import reuse
from ..training import Training
from . import common
from .options import Part


def extract(
    context: typer.Context,
    source: common.SourceName,
    classes: common.Classes,
    out: common.Out,
    data: common.SourceData = None,
    opening: Opening = Opening(),
    mac_retention: Annotated[
        float | None,
        typer.Option(show_default=False, help="Budget: fraction of the multiply-accumulates, such as 0.2."),
    ] = None,
    param_retention: Annotated[
        float | None, typer.Option(show_default=False, help="Budget: fraction of the parameters.")
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option(show_default=False, help="Budget: milliseconds for one sample, measured here.")
    ] = None,
    round_to: Annotated[int, typer.Option(min=1, help="With a budget, widths are multiples of this.")] = 8,
    finetune: Annotated[
        int | None,
        typer.Option(
            metavar="EPOCHS",
            min=0,
            help="Epochs of tuning on images of the classes; 0 is none.",
            show_default="about a minute on one core",
        ),
    ] = None,
    training: Annotated[Training, Part(skip=("epochs", "progress"))] = Training(),
    gates: common.GatesOption = "fold",
) -> common.Shown:
    """Cut the sub-model of some classes out of a trained network and save it as one file.

    With a budget, the neurons that serve these classes best are kept, as many as it allows. Without one, the class
    slices of the run or of a file are; if there are none, they are found first. Accuracies printed here are on
    validation samples; torchslice evaluate looks at the test samples.

    Example:  torchslice extract runs/r18 --classes cat,dog --mac-retention 0.2 --out pets.safetensors
    """
    common.check_training(context, training)
    of_tuning = {entry.name for entry in fields(training)} - {"seed", "device"}
    common.check_needs(context, dict.fromkeys(of_tuning, ("finetune", ())))
    if limited := any(most is not None for most in (mac_retention, param_retention, latency_ms)):
        the_budget(mac_retention, param_retention, latency_ms)  # says what is wrong with it
        if opening.slices:
            raise TorchsliceError("class slices have no order by which a budget could choose; leave out slices=.")
    if "round_to" in common.given_options(context) and not limited:
        raise TorchsliceError("round_to= plays no part without a budget; leave it out, or give mac_retention=.")
    opened = opening.open(source, data, seed=training.seed, device=training.device)
    common.check_gates(context, opened)
    wanted = common.names(classes)
    opened.task.sub_task_labels(wanted)  # says what is wrong with them
    found: Any = opened.rankings() if limited else opened.slices(seed=training.seed)
    common.say(f"sub-model of {', '.join(wanted)} from {source}")
    made = reuse(
        opened.network,
        opened.task,
        found,
        classes=wanted,
        mac_retention=mac_retention,
        param_retention=param_retention,
        latency_ms=latency_ms,
        round_to=round_to,
        gates=gates,
        tune=finetune != 0,
        training=replace(training, epochs=finetune) if finetune else None,
        seed=training.seed,
    )
    save(made, out)
    result: dict[str, Any] = {"artefact": str(out), **made.to_plain()}
    text = f"{made}\n{common.next_evaluate(out, opened, opened.data)}"
    return result, text
