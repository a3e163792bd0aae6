"""The honest evaluation of a sub-model: every stage of making it, and the control arms it has to beat.

Shapes: n test images, C classes, k chosen classes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..core.find import find_neurons
from ..core.hold import masked
from ..data import Data
from ..errors import TorchsliceError
from ..slices import Slice
from .controls import random_like, reinitialised
from .costs import Cost, Latency, cost, latency_ms
from .evaluate import Accuracy, accuracy, accuracy_of, device_of, predict_logits, restrict_logits
from .extract import extract
from .finetune import finetune
from .recalibrate import recalibrate

STAGES = {
    "full": "the whole model, answering with any of its classes",
    "restricted": "the whole model, answering with one of the chosen classes",
    "masked": "the whole model with the neurons outside the slice held at zero",
    "extracted": "the sub-model, as cut",
    "recalibrated": "the sub-model with batch-norm statistics of the chosen classes",
    "fine-tuned": "the sub-model, recalibrated, then trained on the chosen classes",
    "random slice, recalibrated": "as recalibrated, for a random slice with as many neurons per layer",
    "random slice, fine-tuned": "as fine-tuned, for a random slice with as many neurons per layer",
    "full, fine-tuned": "the whole rival cut to the chosen classes, recalibrated, then trained on them as long",
    "from scratch": "an untrained network of the sub-model's size, trained on the chosen classes",
}


@dataclass(frozen=True)
class Stage:
    """One row: how good a network is on the test images of the chosen classes, and what it costs.

    `neuron_retention` counts the neurons of the slice, None where no slice is used; `param_retention` and
    `mac_retention` count what the network really has, as shares of the whole model. `epochs` is the training spent at
    this stage, `best_epoch` the one kept by its validation accuracy (0 is before training).
    """

    name: str
    accuracy: float
    class_accuracy: dict[str, float | None]
    neuron_retention: float | None
    param_retention: float
    mac_retention: float
    parameters: int
    macs: int
    latency: dict[int, Latency] | None
    epochs: int = 0
    best_epoch: int | None = None


@dataclass(frozen=True)
class Stages:
    """The rows of `evaluate_stages` for some classes, and the networks behind them. Prints as a table."""

    classes: tuple[str, ...]
    rows: tuple[Stage, ...]
    models: dict[str, nn.Module] = field(repr=False, compare=False)

    def __getitem__(self, name: str) -> Stage:
        """Return the row of a stage."""
        for row in self.rows:
            if row.name == name:
                return row
        raise TorchsliceError(f"there is no stage {name!r}; there are: {', '.join(row.name for row in self.rows)}.")

    def to_plain(self) -> dict[str, Any]:
        """Return classes and rows as JSON-able data."""
        return {"classes": list(self.classes), "stages": [asdict(row) for row in self.rows]}

    def __rich__(self) -> Table:
        sizes = sorted({size for row in self.rows for size in row.latency or {}})
        table = Table(title=f"{len(self.classes)} classes: {', '.join(self.classes)}", title_justify="left")
        for heading in ("stage", "accuracy", "neurons", "parameters", "MACs", *(f"ms, batch {size}" for size in sizes)):
            table.add_column(heading, justify="left" if heading == "stage" else "right")
        for row in self.rows:
            times = [_spread(row.latency[size]) if row.latency else "-" for size in sizes]
            neurons = "-" if row.neuron_retention is None else f"{row.neuron_retention:.1%}"
            name = row.name + (f", epoch {row.best_epoch} of {row.epochs}" if row.epochs else "")
            table.add_row(
                name, f"{row.accuracy:.2%}", neurons, f"{row.param_retention:.1%}", f"{row.mac_retention:.1%}", *times
            )
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=140)
        console.print(self)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _spread(time: Latency) -> str:
    return f"{time.median_ms:.2f} ({time.lower_quartile_ms:.2f} to {time.upper_quartile_ms:.2f})"


@dataclass(frozen=True)
class _Arm:
    """A network, its score, and the network of its shape whose latency is measured."""

    network: nn.Module
    score: Accuracy
    timed: str | None
    neuron_retention: float | None = None
    epochs: int = 0
    best_epoch: int | None = None


def evaluate_stages(
    model: nn.Module,
    data: Data,
    *,
    part: Slice,
    classes: Sequence[str],
    epochs: int = 10,
    learning_rate: float = 0.01,
    scratch_epochs: int | None = None,
    scratch_learning_rate: float = 0.05,
    controls: bool = True,
    rival: nn.Module | None = None,
    recalibration_images: int = 5000,
    latency_repeats: int = 21,
    seed: int = 0,
    **training: Any,
) -> Stages:
    """Evaluate the sub-model of some classes at every stage of its making, beside the control arms (see STAGES).

    All rows are scored on the test images of the chosen classes. Statistics and training use their training images, and
    the epoch of every trained network is chosen on their validation images. Every arm is recalibrated and trained with
    the same settings. Latencies are measured in one run, in turns.

    Args:
        model: the trained model; it is not changed.
        data: the data it was trained on, all classes.
        part: the slice of the chosen classes, such as the union of theirs.
        classes: names of at least two classes; the rows have them in the model's order.
        epochs: of fine-tuning; 0 leaves the fine-tuned rows out.
        learning_rate: of fine-tuning, at its start.
        scratch_epochs: of training from scratch, which is fair when it is as long as the model's own training; by
            default as long as fine-tuning; 0 leaves the row out.
        scratch_learning_rate: of training from scratch, at its start.
        controls: whether to run the control arms.
        rival: the whole model of the arm "full, fine-tuned", such as one trained without any thought of slices; by
            default `model` itself.
        recalibration_images: at most so many training images give the batch-norm statistics.
        latency_repeats: measurements per network and batch size (1 and 64).
        seed: of the random slice, the untrained network, and every training.
        training: further settings of every training, see `finetune`: batch_size, device, precision, progress, ...

    >>> stages = evaluate_stages(model, data, part=slices["cat"] | slices["dog"], classes=["cat", "dog"])
    >>> stages["fine-tuned"].accuracy, stages.models["fine-tuned"]
    """
    indices = sorted(data.class_indices(classes))
    task = data.restrict([data.classes[i] for i in indices])
    example = data.example.to(device_of(model))
    labels = task.test.labels.cpu()
    sample = task.normalise(task.train.limit(recalibration_images, seed=seed).images)
    neurons = find_neurons(model, example)
    arms: dict[str, _Arm] = {}

    def cut(kept: Slice) -> nn.Module:
        return extract(model, kept, example, classes=indices, neurons=neurons)

    def measured(network: nn.Module, timed: str, **rest: Any) -> _Arm:
        return _Arm(network, accuracy(network, task), timed, **rest)

    def tuned(start: nn.Module, timed: str, count: int, rate: float, **rest: Any) -> _Arm:
        tuning = finetune(start, task, epochs=count, learning_rate=rate, seed=seed, **training)
        return measured(tuning.model, timed, epochs=count, best_epoch=tuning.best_epoch, **rest)

    logits = predict_logits(model, task)  # [n, C]
    whole = cut(neurons.full())
    score = accuracy_of(logits, torch.tensor(indices)[labels])
    arms["full"] = _Arm(model, Accuracy(score.overall, tuple(score.per_class[i] for i in indices)), "full", 1.0)
    arms["restricted"] = _Arm(whole, accuracy_of(restrict_logits(logits, indices), labels), "restricted", 1.0)
    with masked(model, part, example):
        logits = restrict_logits(predict_logits(model, task), indices)  # [n, k]
    share = part.neuron_retention
    arms["masked"] = _Arm(model, accuracy_of(logits, labels), None, share)
    small = cut(part)
    arms["extracted"] = measured(small, "extracted", neuron_retention=share)
    calibrated = recalibrate(small, sample, seed=seed)
    arms["recalibrated"] = measured(calibrated, "extracted", neuron_retention=share)
    if epochs:
        arms["fine-tuned"] = tuned(calibrated, "extracted", epochs, learning_rate, neuron_retention=share)
    if controls:
        other = recalibrate(cut(random_like(part, seed=seed)), sample, seed=seed)
        random = "random slice, recalibrated"
        arms[random] = measured(other, random, neuron_retention=share)
        if epochs:
            arms["random slice, fine-tuned"] = tuned(other, random, epochs, learning_rate, neuron_retention=share)
            uncut = model if rival is None else rival
            uncut = extract(uncut, find_neurons(uncut, example).full(), example, classes=indices)
            start = recalibrate(uncut, sample, seed=seed)
            arms["full, fine-tuned"] = tuned(start, "restricted", epochs, learning_rate, neuron_retention=1.0)
        if count := epochs if scratch_epochs is None else scratch_epochs:
            start = reinitialised(small, seed=seed)
            arms["from scratch"] = tuned(start, "extracted", count, scratch_learning_rate)

    full = cost(model, example)
    timed = {arm.timed: arms[arm.timed].network for arm in arms.values() if arm.timed}
    times = latency_ms(timed, example, repeats=latency_repeats)
    rows = (
        _row(name, arm, task.classes, full, cost(arm.network, example), times[arm.timed] if arm.timed else None)
        for name, arm in arms.items()
    )
    return Stages(task.classes, tuple(rows), {name: arm.network for name, arm in arms.items()})


def _row(
    name: str, arm: _Arm, classes: Sequence[str], full: Cost, mine: Cost, times: dict[int, Latency] | None
) -> Stage:
    """Put a network's score and costs into a row."""
    return Stage(
        name=name,
        accuracy=arm.score.overall,
        class_accuracy=dict(zip(classes, arm.score.per_class, strict=True)),
        neuron_retention=arm.neuron_retention,
        param_retention=mine.parameters / full.parameters,
        mac_retention=mine.macs / full.macs,
        parameters=mine.parameters,
        macs=mine.macs,
        latency=times,
        epochs=arm.epochs,
        best_epoch=arm.best_epoch,
    )
