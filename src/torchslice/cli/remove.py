"""torchslice remove."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

import typer

from .. import maintain
from ..artefact import save
from ..cut.extract import extract
from ..graph.find import find_neurons
from ..judge import forgetting, reinitialised
from ..runs.source import Opening
from ..training import Training, cost, fit
from . import common
from .options import Part


def remove(
    context: typer.Context,
    source: common.SourceName,
    classes: common.Classes,
    out: common.Out,
    data: common.SourceData = None,
    opening: Opening = Opening(),
    control: Annotated[
        bool, typer.Option("--control", help="Train a network without the classes, and look for what is left of them.")
    ] = False,
    training: Annotated[Training, Part(skip=("progress",))] = Training(),
) -> common.Shown:
    """Remove classes from a network: their logits, and the neurons that only they need.

    With --control, test samples say what it still knows, beside a network that never knew the classes.

    Example:  torchslice remove runs/r20 --classes cat --control --epochs 30 --out nocat.safetensors
    """
    common.check_training(context, training)
    of_training = {entry.name for entry in fields(training)} - {"seed", "device"}
    common.check_needs(context, dict.fromkeys(of_training, ("control", ())))
    opened = opening.open(source, data, seed=training.seed, device=training.device)
    neurons, task, gone = opened.neurons(), opened.task, common.names(classes)
    left = maintain.classes_left(task.classes, gone)
    made = maintain.remove(neurons, opened.slices(seed=training.seed), classes=gone)
    save(made, out, classes=left, preprocessing=task.preprocessing)
    result: dict[str, Any] = {"artefact": str(out), "classes": left}
    text = [f"{cost(made, task.example)}; of the whole network: {cost(neurons.model, task.example)}"]
    if control:
        rest, whole = task.restrict(left), extract(neurons, neurons.full(), classes=left)
        new = reinitialised(whole, seed=training.seed)
        fit(new, rest, training)
        networks = {"control": new, "row removed": whole, "row and neurons": made}
        known = {name: find_neurons(network, rest.example) for name, network in networks.items()}
        found = forgetting(known, task, classes=gone)
        result["forgetting"] = found.to_plain()
        text.append(str(found))
    text.append(common.next_evaluate(out, opened, opened.data))
    return result, "\n".join(text)
