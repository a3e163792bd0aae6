"""torchslice extract."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..tables import percent, table
from .common import (
    DataDir,
    Device,
    DeviceOption,
    Gates,
    Json,
    RunFolder,
    Seed,
    check_writable,
    class_names,
    emit,
    say,
)


def extract(
    run: RunFolder,
    classes: Annotated[str, typer.Option(metavar="A,B,...", help="Names of at least two classes.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Artefact to write, such as pets.safetensors.")],
    finetune: Annotated[int, typer.Option(metavar="EPOCHS", min=0, help="Epochs of fine-tuning; 0 is none.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Of fine-tuning, at its start.")] = 0.01,
    gates: Annotated[
        Gates, typer.Option(help="Of an mwt run: fold their mean into the weights, or drop them as published.")
    ] = Gates.fold,
    data_dir: DataDir = None,
    seed: Seed = 0,
    device: DeviceOption = Device.auto,
    as_json: Json = False,
) -> None:
    """Cut the sub-model of some classes out of a run and save it as one file.

    Accuracies printed here are on validation images; torchslice evaluate looks at the test images.

    Example:  torchslice extract runs/r20 --classes cat,dog --out pets.safetensors --finetune 5
    """
    check_writable(out)
    from ..runs import Run
    from ..submodel import reuse, without_gates
    from ..use import accuracy, accuracy_of, cost, predict_logits, restrict_logits, save

    opened = Run.open(run)
    slices = opened.slices()
    data = opened.load_data(data_dir)
    names = [data.classes[i] for i in sorted(data.class_indices(class_names(classes)))]
    network = opened.network(data, device=device.value)
    task = data.restrict(names)
    tuning = f", {finetune} epochs of fine-tuning" if finetune else ""
    say(f"sub-model of {', '.join(names)} from {run}: {len(task.train):,} training images{tuning}; result in {out}")
    made = reuse(
        network,
        data,
        slices=slices,
        classes=names,
        gates=gates.value,
        epochs=finetune,
        learning_rate=learning_rate,
        seed=seed,
        device=device.value,
    )
    whole = restrict_logits(predict_logits(network, task, split="validation"), data.class_indices(names))
    scores = {"whole, restricted": accuracy_of(whole, task.validation.labels).overall}
    scores |= {step: accuracy(net, task, split="validation").overall for step, net in made.networks.items()}
    full = cost(without_gates(network, data, gates="drop"), data.example)
    small = cost(made.model, data.example)
    kept = {
        "neuron_retention": made.part.neuron_retention,
        "param_retention": small.parameters / full.parameters,
        "mac_retention": small.macs / full.macs,
    }
    metrics = {"validation_accuracy": scores, "kept": made.kept, "temperature": made.temperature, **kept}
    save(made.model, out, classes=names, preprocessing=data.preprocessing, slice=made.part, metrics=metrics)
    used = gates.value if opened.recipe.method == "mwt" else None
    result: dict[str, Any] = {"artefact": str(out), "classes": names, "gates": used, "epochs": finetune}
    result |= {"best_epoch": made.best_epoch, **metrics, "full": asdict(full), "sub_model": asdict(small)}
    scaled = "" if made.temperature is None else f", scores divided by {made.temperature:.2f}"
    text = "\n".join(
        [
            table(("step", "validation accuracy"), [(step, percent(score)) for step, score in scores.items()]),
            f"{out}, {made.kept}{scaled}: {small}; {', '.join(f'{percent(v)} {name}' for name, v in kept.items())}",
            f"Next:  torchslice evaluate {out} {opened.recipe.data}",
        ]
    )
    emit(result, text, as_json=as_json)
