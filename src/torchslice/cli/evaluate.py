"""torchslice evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated

from ..artefact.hub import KEPT
from ..judge import calibration_error
from ..maintain import Extended
from ..runs.source import Opening
from ..tables import percent, table
from ..training import accuracy, accuracy_of, cost, latency, predict
from . import common
from .options import Part


def evaluate(
    source: common.SourceName,
    data: common.SourceData = None,
    opening: Annotated[Opening, Part(skip=("slices",))] = Opening(),
    seed: common.Seed = 0,
    device: common.DeviceOption = "auto",
) -> common.Shown:
    """Say what a network is worth on the test samples of its classes: accuracy, size, latency.

    A network that was extended answers with all its classes here, and with those of each task where that is given.

    Example:  torchslice evaluate pets.safetensors cifar10 --data-dir data
    """
    opened = opening.open(source, data, seed=seed, device=device)
    task, model = opened.task, opened.model
    common.say(f"{source} on the {len(task.test):,} test samples of its {len(task.classes)} classes")
    extended = None
    if opened.extension is not None:
        extended = Extended.of(opened.neurons(), opened.extension)
    logits = predict(model if extended is None else extended.joined(), task)
    score, error = accuracy_of(logits, task.test.labels), calibration_error(logits, task.test.labels)
    given = {}
    if extended is not None:
        for known, answering in zip(extended.tasks, extended.networks(), strict=True):
            given[", ".join(known.classes)] = accuracy(answering, task.restrict(known.classes)).overall
    size, times = cost(model, task.example), latency(model, task.example)
    kept = {key: opened.metrics[key] for key in KEPT if isinstance(opened.metrics.get(key), float | int)}
    made = {key: opened.metrics[key] for key in ("validation_accuracy", "kept", "warnings") if key in opened.metrics}
    made = made if isinstance(made.get("validation_accuracy"), dict) else {}
    per_class = dict(zip(task.classes, score.per_class, strict=True))
    result = {
        "source": source,
        "data": opened.data[0],
        "accuracy": score.overall,
        "calibration_error": error,
        "class_accuracy": per_class,
        **({"task_accuracy": given} if given else {}),
        **asdict(size),
        **kept,
        **made,
        "latency": {str(batch): asdict(time) for batch, time in times.items()},
    }
    lines = [
        table(("class", "accuracy"), [*((name, percent(s)) for name, s in per_class.items()), ("all", score)]),
        f"{percent(error)} calibration error: how far the confidence of its answers is from their accuracy",
        *(f"{percent(correct)} of {known} where it is known to be one of them" for known, correct in given.items()),
        str(size),
        *([", ".join(f"{percent(value)} {key.replace('_', ' ')}" for key, value in kept.items())] if kept else []),
        *map(str, times.values()),
        *([_when_made(**made)] if len(made) == 3 else []),
    ]
    return result, "\n".join(lines)


def _when_made(validation_accuracy: Mapping[str, float], kept: str, warnings: Sequence[str]) -> str:
    """Write what was known of a sub-model when it was made."""
    own, whole = percent(validation_accuracy[kept]), percent(validation_accuracy["whole"])
    first = f"when it was made: {own} of the validation samples, the whole network on these classes {whole}"
    return "\n".join([first, *(f"Warning: {warning}" for warning in warnings)])
