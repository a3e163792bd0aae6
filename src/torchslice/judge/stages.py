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
from ..data import Task, check_task
from ..graph.neurons import Neurons, check_neurons
from ..registry import unknown
from ..slices import Slice
from ..tables import percent, table
from ..training import Accuracy, Latency, Training, accuracy_of, cost, finetune, latency_ms, predict
from .baselines import random_like, reinitialised
from .repair import repair

STAGES = {
    "full": "the whole model, answering with any of its classes",
    "restricted": "the whole model, answering with one of the chosen classes",
    "masked": "the whole model with the neurons outside the slice held at zero",
    "extracted": "the sub-model, as cut",
    "repaired": "the sub-model, what remains making up for what left, see `judge.repair`",
    "fine-tuned": "the sub-model, repaired, then trained on the chosen classes",
    "random slice, repaired": "as repaired, for a random slice with as many neurons per layer",
    "random slice, fine-tuned": "as fine-tuned, for a random slice with as many neurons per layer",
    "full, fine-tuned": "the whole baseline cut to the chosen classes, repaired, then trained on them as long",
    "from scratch": "an untrained network of the sub-model's size, trained on the chosen classes",
}


@dataclass(frozen=True)
class Stage:
    """One row: how good a network is on the test samples of the chosen classes, and what it costs.

    `neuron_retention` counts the neurons of the slice, None where no slice is used; `param_retention` and
    `mac_retention` count what the network really has, as fractions of the whole model. `latency` maps batch sizes to
    times. `epochs` were trained at this stage, `best_epoch` is the one that was kept (0 is before training).
    """

    name: str
    accuracy: float
    class_accuracy: dict[str, float | None]
    neuron_retention: float | None
    param_retention: float
    mac_retention: float
    parameters: int
    macs: int
    latency: dict[int, Latency] | None = None
    epochs: int = 0
    best_epoch: int | None = None


@dataclass(frozen=True)
class Stages:
    """The rows of `evaluate_stages` for some classes, and the networks behind them. Prints as a table."""

    classes: tuple[str, ...]
    rows: tuple[Stage, ...]
    models: dict[str, nn.Module] = field(repr=False, compare=False)

    def __getitem__(self, name: str) -> Stage:
        rows = {row.name: row for row in self.rows}
        if name not in rows:
            raise unknown("stage", name, rows)
        return rows[name]

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
            times = ["-"] * len(sizes)
            if row.latency:
                found = [row.latency[size] for size in sizes]
                times = [f"{t.median_ms:.2f} ({t.lower_quartile_ms:.2f} to {t.upper_quartile_ms:.2f})" for t in found]
            rows.append((name, f"{row.accuracy:.2%}", *map(percent, retention), *times))
        return f"{len(self.classes)} classes: {', '.join(self.classes)}\n{table(headings, rows)}"


def evaluate_stages(
    neurons: Neurons,
    task: Task,
    slice_: Slice,
    *,
    classes: Sequence[str],
    training: Training | None = Training(learning_rate=0.01),
    scratch: Training | None = None,
    controls: bool = True,
    baseline: Neurons | None = None,
    recalibration_samples: int = 5000,
    latency_repeats: int = 21,
) -> Stages:
    """Evaluate the sub-model of some classes at every stage of its making, beside the control arms (see STAGES).

    All rows are scored on the test samples of the chosen classes. Statistics and training use their training samples,
    and the step of every repair and the epoch of every training are chosen on their validation samples. Every arm is
    repaired and trained with the same settings. Latencies are measured in one run, in turns.

    Args:
        task: what the model was trained on, all classes.
        classes: names of at least two; the rows have them in the model's order.
        training: of fine-tuning; its seed also draws samples, random slice and untrained network. None leaves the
            fine-tuned rows out.
        scratch: of training from scratch, which is fair when it is as long as the model's own training; by default
            `training` at a learning rate of 0.05.
        controls: whether to run the control arms.
        baseline: the whole model of the arm "full, fine-tuned", such as one trained without any thought of slices; by
            default the model itself.
        latency_repeats: measurements per network and batch size (1 and 64).

    >>> stages = ts.judge.evaluate_stages(
    ...     neurons, task, slices["3"] | slices["8"], classes=["3", "8"], training=quick, latency_repeats=1
    ... )
    >>> stages["fine-tuned"].epochs
    1
    """
    other = neurons if baseline is None else baseline
    for of in (neurons, other):
        check_neurons(of)
        check_task(task, of)
    indices = task.sub_task_labels(classes)
    if scratch is None and training is not None:
        scratch = replace(training, learning_rate=0.05)
    seed = (training or scratch or Training()).seed
    sub_task = task.restrict([task.classes[i] for i in indices])
    labels, full = sub_task.test.labels, cost(neurons.model, neurons.example)
    models: dict[str, nn.Module] = {}
    rows: dict[str, Stage] = {}
    timed: dict[str, str] = {}  # name of a stage -> the one of the same shape whose latency is measured

    def add(name: str, network: nn.Module, kept: float | None, like: str, score: Accuracy | None = None) -> None:
        score = score or accuracy_of(predict(network, sub_task, output=neurons.output), labels)
        models[name], timed[name], mine = network, like, cost(network, neurons.example)
        rows[name] = Stage(
            name=name,
            accuracy=score.overall,
            class_accuracy=dict(zip(sub_task.classes, score.per_class, strict=True)),
            neuron_retention=kept,
            param_retention=mine.parameters / full.parameters,
            mac_retention=mine.macs / full.macs,
            parameters=mine.parameters,
            macs=mine.macs,
        )

    def add_trained(name: str, start: nn.Module, settings: Training, kept: float | None, like: str) -> None:
        found = finetune(start, sub_task, settings, output=neurons.output)
        add(name, found.model, kept, like)
        rows[name] = replace(rows[name], epochs=len(found.log) - 1, best_epoch=found.kept)

    def repaired(neurons: Neurons, slice_: Slice) -> nn.Module:
        return repair(neurons, slice_, sub_task, classes=indices, samples=recalibration_samples, seed=seed).model

    whole, small = (extract(neurons, part, classes=indices) for part in (neurons.full(), slice_))
    both = (neurons.model, masked(neurons, slice_))
    logits, held = (predict(model, sub_task, output=neurons.output) for model in both)  # [n, C]
    score = accuracy_of(logits, torch.tensor(indices)[labels])
    score = Accuracy(score.overall, tuple(score.per_class[i] for i in indices))
    kept = slice_.neuron_retention
    add("full", neurons.model, 1.0, "full", score)
    add("restricted", whole, 1.0, "restricted", accuracy_of(logits[:, indices], labels))
    add("masked", neurons.model, kept, "", accuracy_of(held[:, indices], labels))  # whose latency says nothing
    add("extracted", small, kept, "extracted")
    add("repaired", repaired(neurons, slice_), kept, "extracted")
    if training:
        add_trained("fine-tuned", models["repaired"], training, kept, "extracted")
    if controls:
        random = repaired(neurons, random_like(slice_, seed=seed))
        add("random slice, repaired", random, kept, "random slice, repaired")
        if training:
            add_trained("random slice, fine-tuned", random, training, kept, "random slice, repaired")
            like = "restricted" if other is neurons else "full, fine-tuned"
            add_trained("full, fine-tuned", repaired(other, other.full()), training, 1.0, like)
        if scratch:
            add_trained("from scratch", reinitialised(small, seed=seed), scratch, None, "extracted")
    alone = {name: models[name] for name in timed.values() if name}
    times = latency_ms(alone, neurons.example, repeats=latency_repeats)
    stages = tuple(replace(row, latency=times.get(timed[name])) for name, row in rows.items())
    return Stages(tuple(sub_task.classes), stages, models)
