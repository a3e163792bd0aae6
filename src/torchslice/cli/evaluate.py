"""torchslice evaluate."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import TorchsliceError
from ..tables import percent, table
from .common import (
    DataDir,
    DataOptions,
    DataSet,
    Device,
    DeviceOption,
    Json,
    Seed,
    emit,
    pairs,
    say,
)

if TYPE_CHECKING:
    from torch import nn

    from ..data import Data


def evaluate(
    artefact: Annotated[Path, typer.Argument(metavar="ARTEFACT", help="File that torchslice saved.")],
    data: DataSet,
    allow_import: Annotated[
        bool, typer.Option("--allow-import", help="Permit a network that is built by a module of your own.")
    ] = False,
    data_option: DataOptions = None,
    data_dir: DataDir = None,
    seed: Seed = 0,
    device: DeviceOption = Device.auto,
    as_json: Json = False,
) -> None:
    """Say what a saved network is worth on the test images of its classes: accuracy, size, latency.

    A network that was extended answers with all its classes here, and with those of each task where that is given.

    Example:  torchslice evaluate pets.safetensors cifar10 --data-dir data
    """
    from .. import data as data_sets
    from ..training import choose_placement
    from ..use import (
        Extended,
        accuracy,
        accuracy_of,
        calibration_error,
        cost,
        latency,
        load,
        predict_logits,
        read_record,
    )

    place = choose_placement(device.value).device
    model = load(artefact, allow_import=allow_import).to(place)
    task = task_of(artefact, model, data_sets.load(data, data_dir, seed=seed, **pairs(data_option)))
    say(f"{artefact} on the {len(task.test):,} test images of its {len(task.classes)} classes")
    extended = None if model.extension is None else Extended.of(model, task.example.to(place))
    logits = predict_logits(model if extended is None else extended.joined(), task)
    score, error = accuracy_of(logits, task.test.labels), calibration_error(logits, task.test.labels)
    given = {}
    for number, known in enumerate(extended.tasks if extended else ()):
        only = task.restrict(known.classes)
        given[", ".join(known.classes)] = accuracy(extended.network(number), only).overall
    size = cost(model, task.example)
    times = latency(model, task.example)
    metrics = read_record(artefact).get("metrics") or {}
    kept = {key: metrics[key] for key in ("neuron_retention", "param_retention", "mac_retention") if key in metrics}
    per_class = dict(zip(task.classes, score.per_class, strict=True))
    result = {
        "artefact": str(artefact),
        "data": data,
        "accuracy": score.overall,
        "calibration_error": error,
        "class_accuracy": per_class,
        **({"task_accuracy": given} if given else {}),
        **asdict(size),
        **kept,
        "latency": {str(batch): asdict(time) for batch, time in times.items()},
    }
    lines = [
        table(("class", "accuracy"), [*((name, percent(s)) for name, s in per_class.items()), ("all", score)]),
        f"{percent(error)} calibration error: how far the confidence of its answers is from their accuracy",
        *(f"{percent(right)} of {names} where it is known to be one of them" for names, right in given.items()),
        str(size),
        *([", ".join(f"{percent(share)} {key.replace('_', ' ')}" for key, share in kept.items())] if kept else []),
        *map(str, times.values()),
    ]
    emit(result, "\n".join(lines), as_json=as_json)


def task_of(artefact: Path, model: nn.Module, data: Data) -> Data:
    """Return the data of a saved network's classes, in its order, normalised as it was trained."""
    classes: tuple[str, ...] | None = model.classes  # type: ignore[assignment]
    task = data if classes is None else data.restrict(classes)
    known: dict[str, Any] | None = model.preprocessing  # type: ignore[assignment]
    if known is None:
        return task
    shape = list(data.train.images.shape[1:])
    if known["input_shape"] != shape:
        given, needed = ("x".join(map(str, sizes)) for sizes in (shape, known["input_shape"]))
        raise TorchsliceError(
            f"{artefact} takes images of {needed}, and those of {data.name} are {given}; give its data."
        )
    return replace(task, mean=tuple(known["mean"]), std=tuple(known["std"]))
