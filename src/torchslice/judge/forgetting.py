"""Has a network forgotten a class? Its answers beside those of a network that never knew it, and what is left inside.

Shapes: n samples, k classes that are left, N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cut.widen import grow, last_wire
from ..data import Split, Task, check_task, limit
from ..data.task import SPLITS
from ..errors import TorchsliceError
from ..graph.activations import find_activations, reading
from ..graph.neurons import Neurons, check_neurons
from ..graph.record import evaluating
from ..inputs import device_of
from ..tables import percent, table
from ..training import Training, accuracy, accuracy_of, finetune, predict
from .calibrate import likeliest

RELEARNING = Training(epochs=20, learning_rate=0.01, batch_size=32, warmup_fraction=0.0, progress=False)


@dataclass(frozen=True)
class Traces:
    """What networks know of classes that they should not; one row for each, the control first. Prints as a table.

    Attributes:
        kept_accuracy: on the test samples of the classes that are left.
        distance: of the answers to test samples of the removed classes from the control's: mean total variation of the
            probabilities, in [0, 1].
        probe: by layer, how many test samples a linear classifier on its neurons tells right, of the removed classes
            and of the others, as many of both; 0.5 is chance.
        steps: of training with new rows for the removed classes until half of their validation samples are answered
            right, and half of the others; None if that was not reached.
    """

    rows: dict[str, dict[str, Any]]

    def to_plain(self) -> dict[str, dict[str, Any]]:
        """Return the rows as JSON-able data."""
        return self.rows

    def __str__(self) -> str:
        headings = ("network", "kept accuracy", "distance from the control", "probe, mean", "last layer", "steps")
        lines = []
        for name, row in self.rows.items():
            probes = [*row["probe"].values()]
            figures = (row["kept_accuracy"], row["distance"], fmean(probes), probes[-1])
            lines.append((name, *map(percent, figures), "never" if row["steps"] is None else row["steps"]))
        return table(headings, lines)


def forgetting(
    networks: Mapping[str, Neurons],
    task: Task,
    *,
    classes: Sequence[str],
    samples: int = 1000,
    relearning: Training = RELEARNING,
) -> Traces:
    """Look for what networks still know of removed classes, beside a control that was trained without them.

    A network that has forgotten is like the control in all figures, not only in its accuracy ("Unlearning isn't
    forgetting"). How far two controls of different seeds are apart says what is like; give a second one.

    Args:
        networks: without the removed classes, their logits in the order of `task`; the first is the control.
        task: samples of all classes.
        classes: that were removed.
        samples: at most so many of each split and kind are probed, half of them for relearning.
        relearning: how the classes are learned again.

    >>> control = ts.find_neurons(ts.models.create("convnet", 9, channels=1, width=0.25), task.example)
    >>> found = forgetting({"control": control}, task, classes=["7"], relearning=quick)
    >>> found.rows["control"]["distance"]
    0.0
    """
    check_task(task)
    gone, left = task.class_indices(classes), [name for name in task.classes if name not in classes]
    for name, neurons in networks.items():
        check_neurons(neurons)
        if neurons.num_classes != len(left) or not neurons.head:
            raise TorchsliceError(
                f"{name} has {neurons.num_classes} logits; needed are {len(left)}, of {', '.join(left)}, that come "
                "straight from a layer."
            )
    if not networks:
        raise TorchsliceError("give at least the control: a network that was trained without the classes.")
    removed, kept = task.restrict(classes), task.restrict(left)
    splits: dict[str, Any] = {name: _balanced(task, name, gone, samples) for name in SPLITS}
    two = replace(task, classes=("removed", "kept"), **splits)
    again = task.restrict([*left, *classes]).limit(train=samples // 2, seed=relearning.seed)
    rows: dict[str, dict[str, Any]] = {}
    expected: Tensor | None = None
    for name, neurons in networks.items():
        found = predict(neurons.model, removed, output=neurons.output).softmax(1)  # [n, k]
        expected = found if expected is None else expected
        rows[name] = {
            "kept_accuracy": accuracy(neurons.model, kept, output=neurons.output).overall,
            "distance": float((found - expected).abs().sum(1).mean() / 2),
            "probe": _probed(neurons, two),
            "steps": _steps(neurons, again, len(left), relearning),
        }
    return Traces(rows)


def _balanced(task: Task, name: str, gone: Sequence[int], samples: int) -> Split:
    """Return as many samples of removed classes (label 0) as of the others (1)."""
    split = task.split(name)
    split = split.relabelled((~torch.isin(split.labels, torch.tensor(gone))).long())
    return limit(split, min(samples, 2 * int(split.labels.bincount(minlength=2).min())))


def _probed(neurons: Neurons, two: Task) -> dict[str, float]:
    """Return the accuracy of a linear classifier on the mean activations of every layer."""
    train, test = (_activations(neurons, two, name) for name in ("train", "test"))
    found = {}
    for layer, of in train.items():
        middle, spread = of.mean(0), of.std(0).clamp(min=1e-6)
        width = of.shape[1]

        def row(values: Tensor, width: int = width) -> tuple[Tensor, Tensor]:
            return F.pad(values[None, :width], (0, 0, 0, 1)), F.pad(values[width:], (0, 1))

        probe = likeliest(row, torch.zeros(width + 1), (of - middle) / spread, two.train.labels)
        found[layer] = accuracy_of(probe((test[layer] - middle) / spread), two.test.labels).overall
    return found


@torch.no_grad()
def _activations(neurons: Neurons, task: Task, split: str) -> dict[str, Tensor]:
    """Return the mean activation of every neuron over its positions, {layer: float32 [n, N]}."""
    model, where = neurons.model, find_activations(neurons)
    found: dict[str, list[Tensor]] = {layer: [] for layer in where.chains}
    for inputs, _ in task.batches(split, 256, device=device_of(model)):
        with evaluating(model), reading(model, where) as seen:
            neurons.logits(inputs)
        for layer, uses in seen.values.items():
            values = uses[-1].float().movedim(where.axis[layer], 1)
            found[layer].append(values.reshape(*values.shape[:2], -1).mean(2).cpu())
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def _steps(neurons: Neurons, task: Task, left: int, training: Training) -> int | None:
    """Return the steps of training until half of the validation samples are right, of the last classes and the rest."""
    rows = {last_wire(neurons, neurons.head[0]): len(task.classes) - left}
    grown = grow(neurons, rows, seed=training.seed)

    def look(network: nn.Module) -> dict[str, float]:
        score = accuracy(network, task, "validation", output=neurons.output)
        sides = [[a for a in side if a is not None] for side in (score.per_class[:left], score.per_class[left:])]
        return {"validation_accuracy": score.overall, "worse_accuracy": min(map(fmean, sides))}

    log = finetune(grown, task, training, output=neurons.output, look=look).log
    return next((row["steps"] for row in log if row["worse_accuracy"] >= 0.5), None)
