"""torchslice extract."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Annotated, Any

import typer

from ..artefact import save
from ..errors import TorchsliceError
from ..runs.source import Opening
from ..submodel import reuse
from ..tables import percent, table
from ..training import Training, accuracy, accuracy_of, cost, predict
from . import common
from .options import Part


def extract(
    context: typer.Context,
    source: common.SourceName,
    classes: common.Classes,
    out: common.Out,
    data: common.SourceData = None,
    opening: Opening = Opening(),
    finetune: Annotated[int, typer.Option(metavar="EPOCHS", min=0, help="Epochs of fine-tuning; 0 is none.")] = 0,
    training: Annotated[Training, Part(skip=("epochs", "progress", "warmup_fraction"))] = Training(learning_rate=0.01),
    gates: common.GatesOption = common.Gates.fold,
    force: common.Force = False,
    as_json: common.Json = False,
) -> None:
    """Cut the sub-model of some classes out of a trained network and save it as one file.

    Without class slices, of a run or a file, they are found first, by contribution. Accuracies printed here are on
    validation samples; torchslice evaluate looks at the test samples.

    Example:  torchslice extract torchvision:resnet18 cifar10 --weights mine.pt --classes cat,dog --out pets.safetensors
    """
    common.check_out(out, force=force)
    common.check_training(context, training)
    of_tuning = {entry.name for entry in fields(training)} - {"seed", "device"}
    common.check_needs(context, dict.fromkeys(of_tuning, ("finetune", ())))
    opened = opening.open(source, data, seed=training.seed, device=training.device)
    common.check_gates(context, opened)
    task, wanted = opened.task, common.names(classes)
    indices = sorted(task.class_indices(wanted))
    if len(indices) < 2:
        raise TorchsliceError(f"a sub-model needs at least two classes to tell apart: classes was {classes!r}.")
    chosen = [task.classes[i] for i in indices]
    sub_task, whole = task.restrict(chosen), opened.neurons(gates="drop")
    found = opened.slices(seed=training.seed)
    tuning = f", {finetune} epochs of fine-tuning" if finetune else ""
    common.say(f"sub-model of {', '.join(chosen)} from {source}: {len(sub_task.train):,} training samples{tuning}")
    made = reuse(
        opened.network,
        task,
        found,
        classes=chosen,
        gates=gates.value,
        training=replace(training, epochs=finetune) if finetune else None,
        seed=training.seed,
    )
    logits = predict(opened.model, sub_task, "validation")[:, indices]
    scores = {"whole, restricted": accuracy_of(logits, sub_task.validation.labels).overall}
    scores |= {step: accuracy(net, sub_task, "validation").overall for step, net in made.networks.items()}
    full, small = (cost(net, task.example) for net in (whole.model, made.model))
    kept = {
        "neuron_retention": made.slice.neuron_retention,
        "param_retention": small.parameters / full.parameters,
        "mac_retention": small.macs / full.macs,
    }
    metrics = {"validation_accuracy": scores, "kept": made.kept, "temperature": made.temperature, **kept}
    save(made, out, metrics=metrics)
    result: dict[str, Any] = {"artefact": str(out), "classes": chosen, "epochs": finetune}
    result |= {"best_epoch": made.best_epoch, **metrics, "full": asdict(full), "sub_model": asdict(small)}
    scaled = "" if made.temperature is None else f", logits divided by {made.temperature:.2f}"
    lines = [
        table(("step", "validation accuracy"), [(step, percent(score)) for step, score in scores.items()]),
        f"{out}, {made.kept}{scaled}: {small}",
        ", ".join(f"{percent(value)} {name.replace('_', ' ')}" for name, value in kept.items()),
        common.next_evaluate(out, opened, opened.data),
    ]
    common.emit(result, "\n".join(lines), as_json=as_json)
