"""torchslice remove."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Annotated, Any

import typer

from .. import maintain
from ..artefact import save
from ..cut.extract import extract
from ..graph.find import find_neurons
from ..judge import forgetting, reinitialised
from ..runs.source import Opening
from ..training import Training, fit
from . import common
from .options import Part


def remove(
    context: typer.Context,
    source: common.SourceName,
    classes: common.Classes,
    out: common.Out,
    data: common.SourceData = None,
    opening: Opening = Opening(),
    finetune: Annotated[int, typer.Option(metavar="EPOCHS", min=0, help="Then tune on the classes that are left.")] = 0,
    control: Annotated[
        int,
        typer.Option(
            metavar="EPOCHS", min=0, help="Train a network without the classes, and look for what is left of them."
        ),
    ] = 0,
    training: Annotated[Training, Part(skip=("epochs", "progress"))] = Training(),
    force: common.Force = False,
    as_json: common.Json = False,
) -> None:
    """Remove classes from a network: their logits, and the neurons that only they need.

    With --control, test samples say what it still knows, beside a network that never knew the classes.

    Example:  torchslice remove runs/r20 --classes cat --control 30 --out nocat.safetensors
    """
    common.check_out(out, force=force)
    common.check_training(context, training)
    if not finetune and not control:
        of_training = {entry.name for entry in fields(training)} - {"seed", "device"}
        common.check_needs(context, dict.fromkeys(of_training, ("finetune", ())))
    opened = opening.open(source, data, seed=training.seed, device=training.device)
    neurons, task, gone = opened.neurons(), opened.task, common.names(classes)
    maintain.check_removing(task, gone)
    tuning = replace(training, epochs=finetune) if finetune else None
    made = maintain.remove(neurons, task, opened.slices(seed=training.seed), classes=gone, training=tuning)
    save(made, out)
    result: dict[str, Any] = {"artefact": str(out), "classes": made.classes, **made.to_plain()}
    text = [str(made)]
    if control:
        rest = task.restrict(made.classes)
        whole = extract(neurons, neurons.full(), classes=list(made.classes))
        new = reinitialised(whole, seed=training.seed)
        fit(new, rest, replace(training, epochs=control))
        networks = {"control": new, "row removed": whole, "removed": made.model}
        known = {name: find_neurons(network, rest.example) for name, network in networks.items()}
        found = forgetting(known, task, classes=gone)
        result["forgetting"] = found.to_plain()
        text.append(str(found))
    text.append(common.next_evaluate(out, opened, opened.data))
    common.emit(result, "\n".join(text), as_json=as_json)
