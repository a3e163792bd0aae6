"""The honest evaluation of a sub-model: every stage of making it, and the control arms it has to beat.

Shapes: n test samples, C classes, k chosen classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..cut.extract import extract, masked
from ..data import Task
from ..errors import TorchsliceError
from ..graph.neurons import Neurons
from ..registry import unknown
from ..slices import Slice
from ..tables import percent, table
from ..training import Outcome, Training, finetune
from ..training.costs import Latency, cost, latency_ms
from ..training.evaluate import Accuracy, accuracy_of, predict
from .baselines import random_like, reinitialised
from .recalibrate import recalibrate

FINE_TUNING = Training(learning_rate=0.01)
SCRATCH_LEARNING_RATE = 0.05
STAGES = {
    "full": "the whole model, answering with any of its classes",
    "restricted": "the whole model, answering with one of the chosen classes",
    "masked": "the whole model with the neurons outside the slice held at zero",
    "extracted": "the sub-model, as cut",
    "recalibrated": "the sub-model with batch-norm statistics of the chosen classes",
    "fine-tuned": "the sub-model, recalibrated, then trained on the chosen classes",
    "random slice, recalibrated": "as recalibrated, for a random slice with as many neurons per layer",
    "random slice, fine-tuned": "as fine-tuned, for a random slice with as many neurons per layer",
    "full, fine-tuned": "the whole baseline cut to the chosen classes, recalibrated, then trained on them as long",
    "from scratch": "an untrained network of the sub-model's size, trained on the chosen classes",
}


@dataclass(frozen=True)
class Stage:
    """One row: how good a network is on the test samples of the chosen classes, and what it costs.

    `neuron_retention` counts the neurons of the slice, None where no slice is used; `param_retention` and
    `mac_retention` count what the network really has, as fractions of the whole model. `epochs` is the training spent
    at this stage, `best_epoch` the one kept by its validation accuracy (0 is before training). `latency` maps batch
    sizes to times.
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
        raise unknown("stage", name, [row.name for row in self.rows])

    def to_plain(self) -> dict[str, Any]:
        """Return classes and rows as JSON-able data."""
        return {"classes": list(self.classes), "stages": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        sizes = sorted({size for row in self.rows for size in row.latency or {}})
        headings = ("stage", "accuracy", "neurons", "parameters", "MACs", *(f"ms, batch {size}" for size in sizes))
        rows = []
        for row in self.rows:
            name = row.name + (f", epoch {row.best_epoch} of {row.epochs}" if row.epochs else "")
            retention = (row.neuron_retention, row.param_retention, row.mac_retention)
            times = [_spread(row.latency[size]) if row.latency else "-" for size in sizes]
            rows.append((name, f"{row.accuracy:.2%}", *map(percent, retention), *times))
        return f"{len(self.classes)} classes: {', '.join(self.classes)}\n{table(headings, rows)}"


def _spread(time: Latency) -> str:
    return f"{time.median_ms:.2f} ({time.lower_quartile_ms:.2f} to {time.upper_quartile_ms:.2f})"


@dataclass(frozen=True)
class _Arm:
    """A network, its score, the arm with its shape whose latency is measured, and how it was trained."""

    network: nn.Module
    score: Accuracy
    timed: str | None
    neuron_retention: float | None
    outcome: Outcome | None = None


def evaluate_stages(
    neurons: Neurons,
    task: Task,
    slice_: Slice,
    *,
    classes: Sequence[str],
    training: Training | None = FINE_TUNING,
    scratch: Training | None = None,
    controls: bool = True,
    baseline: Neurons | None = None,
    recalibration_samples: int = 5000,
    latency_repeats: int = 21,
) -> Stages:
    """Evaluate the sub-model of some classes at every stage of its making, beside the control arms (see STAGES).

    All rows are scored on the test samples of the chosen classes. Statistics and training use their training samples,
    and the epoch of every trained network is chosen on their validation samples. Every arm is recalibrated and trained
    with the same settings. Latencies are measured in one run, in turns.

    Args:
        neurons: of the trained model, which is not changed.
        task: what it was trained on, all classes.
        slice_: the slice of the chosen classes, such as the union of theirs.
        classes: names of at least two classes; the rows have them in the model's order.
        training: of fine-tuning; its seed also draws samples, random slice and untrained network. None leaves the
            fine-tuned rows out.
        scratch: of training from scratch, which is fair when it is as long as the model's own training; by default
            `training` at a learning rate of 0.05.
        controls: whether to run the control arms.
        baseline: the whole model of the arm "full, fine-tuned", such as one trained without any thought of slices; by
            default the model itself.
        recalibration_samples: at most so many training samples give the batch-norm statistics.
        latency_repeats: measurements per network and batch size (1 and 64).

    >>> stages = ts.judge.evaluate_stages(
    ...     neurons, task, slices["3"] | slices["8"], classes=["3", "8"], training=quick, latency_repeats=1
    ... )
    >>> stages["fine-tuned"].epochs
    1
    """
    indices = sorted(task.class_indices(classes))
    if len(indices) < 2:
        raise TorchsliceError(f"a sub-model needs at least two classes, got {classes[0]!r} alone; add one to it.")
    if scratch is None and training is not None:
        scratch = replace(training, learning_rate=SCRATCH_LEARNING_RATE)
    seed = (training or scratch or FINE_TUNING).seed
    sub_task = task.restrict([task.classes[i] for i in indices])
    labels, retention = sub_task.test.labels, slice_.neuron_retention
    arms: dict[str, _Arm] = {}

    def prepared(source: Neurons, kept: Slice) -> nn.Module:
        return recalibrated(extract(source, kept, classes=indices))

    def recalibrated(network: nn.Module) -> nn.Module:
        return recalibrate(network, sub_task, samples=recalibration_samples, seed=seed)

    def add(name: str, network: nn.Module, timed: str | None, neuron_retention: float | None, **rest: Any) -> None:
        score = accuracy_of(predict(network, sub_task, output=neurons.output), labels)
        arms[name] = _Arm(network, score, timed, neuron_retention, **rest)

    def add_trained(
        name: str, start: nn.Module, settings: Training, timed: str, neuron_retention: float | None = None
    ) -> None:
        outcome = finetune(start, sub_task, settings, output=neurons.output)
        add(name, outcome.model, timed, neuron_retention, outcome=outcome)

    whole, small = (extract(neurons, kept, classes=indices) for kept in (neurons.full(), slice_))
    models = (neurons.model, masked(neurons, slice_))
    logits, held = (predict(model, sub_task, output=neurons.output) for model in models)  # [n, C]
    score = accuracy_of(logits, torch.tensor(indices)[labels])
    score = Accuracy(score.overall, tuple(score.per_class[i] for i in indices))
    arms["full"] = _Arm(neurons.model, score, "full", 1.0)
    arms["restricted"] = _Arm(whole, accuracy_of(logits[:, indices], labels), "restricted", 1.0)
    arms["masked"] = _Arm(neurons.model, accuracy_of(held[:, indices], labels), None, retention)
    add("extracted", small, "extracted", retention)
    add("recalibrated", recalibrated(small), "extracted", retention)
    if training:
        add_trained("fine-tuned", arms["recalibrated"].network, training, "extracted", retention)
    if controls:
        random = prepared(neurons, random_like(slice_, seed=seed))
        add("random slice, recalibrated", random, "random slice, recalibrated", retention)
        if training:
            add_trained("random slice, fine-tuned", random, training, "random slice, recalibrated", retention)
            uncut = prepared(baseline or neurons, (baseline or neurons).full())
            add_trained("full, fine-tuned", uncut, training, "restricted", 1.0)
        if scratch:
            add_trained("from scratch", reinitialised(small, seed=seed), scratch, "extracted")

    full = cost(neurons.model, neurons.example)
    timed = {arm.timed: arms[arm.timed].network for arm in arms.values() if arm.timed}
    times = latency_ms(timed, neurons.example, repeats=latency_repeats)
    rows = []
    for name, arm in arms.items():
        mine = cost(arm.network, neurons.example)
        rows.append(
            Stage(
                name=name,
                accuracy=arm.score.overall,
                class_accuracy=dict(zip(sub_task.classes, arm.score.per_class, strict=True)),
                neuron_retention=arm.neuron_retention,
                param_retention=mine.parameters / full.parameters,
                mac_retention=mine.macs / full.macs,
                parameters=mine.parameters,
                macs=mine.macs,
                latency=times[arm.timed] if arm.timed else None,
                epochs=len(arm.outcome.log) - 1 if arm.outcome else 0,
                best_epoch=arm.outcome.kept if arm.outcome else None,
            )
        )
    return Stages(tuple(sub_task.classes), tuple(rows), {name: arm.network for name, arm in arms.items()})
