"""Adapt a trained network to new samples of its classes by training its critical neurons only."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Split, Task, check_task, hold_out, limit
from ..errors import TorchsliceError
from ..graph.neurons import Neurons, check_neurons
from ..graph.tied import of_unit_length
from ..inputs import Output
from ..slices import Slice
from ..training import Outcome, Training, accuracy, finetune
from .partial import Computed, Partial, moving_parameters
from .pruning import checked_scores

# Gradients of critical neurons are far larger than those of others; AdamW adjusts its steps to their size.
TRAINING = Training(epochs=10, learning_rate=0.005, batch_size=64, optimizer="adamw")


def readapt(
    neurons: Neurons,
    task: Task,
    critical: Slice,
    new_samples: Split,
    *,
    replay: float | Sequence[float] = 1.0,
    classifier: bool = False,
    batch_statistics: bool = True,
    validation_fraction: float = 0.2,
    training: Training = TRAINING,
) -> Outcome:
    """Adapt a network to new samples by training its critical neurons only; all others stay as they are, bit for bit.

    Part of the new samples and the validation split of `task` choose the epoch, by the mean of both accuracies. The
    model is not changed, and the test split is never looked at. The idea is NeuSemSlice's (arXiv 2407.20281,
    re-adaptation).

    Args:
        task: what the model was trained on.
        critical: the neurons that are trained, such as those of `top_by_score_per_parameter`.
        new_samples: of the classes of `task`, at least two of each; for instance under a new light. Their inputs are
            prepared as those of `task`.
        replay: training samples of `task` per new sample to train on as well; of several values, each is tried and the
            best on validation is kept.
        classifier: whether the rows of the logits are trained too.
        batch_statistics: whether norms of critical neurons go with the new samples, see `Partial`.
        validation_fraction: of the new samples, to choose the epoch by, in (0, 1).

    Returns:
        The network after its best epoch, plain. The log has `new_accuracy` and `clean_accuracy` of every epoch, both on
        validation, and their mean as `validation_accuracy`; `about` says replay and param_fraction (what was trained).

    Raises TorchsliceError for a slice that covers nothing or everything, and for samples of unknown classes or shape.

    >>> darker = ts.data.Images(task.train.images[:100] // 2, task.train.labels[:100])
    >>> adapted = readapt(neurons, task, critical, darker, training=quick)
    >>> {"new_accuracy", "clean_accuracy", "validation_accuracy"} <= adapted.best.keys()
    True
    """
    ratios = check_readapting(replay)
    check_neurons(neurons)
    check_task(task, neurons)
    if neurons.full() & critical == neurons.full():
        raise TorchsliceError(
            "the slice covers every neuron, so nothing would be spared; choose a smaller one, or use finetune."
        )
    classes = range(neurons.num_classes) if classifier else ()
    student = Partial(neurons, critical, classes=classes, batch_statistics=batch_statistics)
    options: dict[str, Any] = {"validation_fraction": validation_fraction, "training": training}
    tried = [adapt(student, task, new_samples, replay=ratio, output=neurons.output, **options) for ratio in ratios]
    best = max(tried, key=lambda found: found.best["validation_accuracy"])
    network: Any = best.model
    return replace(best, model=network.merged())


def adapt(
    network: nn.Module,
    task: Task,
    new_samples: Split,
    *,
    replay: float = 1.0,
    validation_fraction: float = 0.2,
    training: Training = TRAINING,
    output: Output = None,
) -> Outcome:
    """Train what can be trained in a copy of a network on new samples and some old ones, and keep its best epoch.

    This is the training of `readapt`, for comparison with other ways to choose what is trained. Parameters that require
    no gradient stay as they are.

    >>> everything = adapt(model, task, task.train, replay=0, training=quick)
    """
    check_readapting(replay)
    new, held = hold_out(check_samples(new_samples, task), validation_fraction, seed=training.seed)
    validation, count = replace(task, validation=held), round(replay * len(new))
    both = new.join(limit(task.train, count, seed=training.seed)) if count else new

    def look(network: nn.Module) -> dict[str, float]:
        new, clean = (accuracy(network, part, "validation", output=output).overall for part in (validation, task))
        return {"new_accuracy": new, "clean_accuracy": clean, "validation_accuracy": (new + clean) / 2}

    tuned = finetune(network, replace(task, train=both), training, output=output, look=look)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in (network.network if isinstance(network, Computed) else network).parameters())
    return replace(tuned, about={**tuned.about, "replay": float(replay), "param_fraction": trained / whole})


def top_by_score_per_parameter(neurons: Neurons, scores: Mapping[str, Tensor], param_fraction: float) -> Slice:
    """Return the neurons with the highest scores per parameter, as many as fit into a fraction of all parameters.

    Scores are divided by the Euclidean norm of their layer. The parameters of a neuron are those that move with it, see
    `Partial`: its rows of the weights, its bias, and those of a norm of its own, without what is frozen. So cheap
    neurons come first, such as those of early convolutions.

    Args:
        scores: how critical each neuron is, float [N] per layer, at least 0.
        param_fraction: of all parameters of the model, in (0, 1].

    >>> mean = {layer: of_classes.mean(0) for layer, of_classes in scores["taylor"].items()}
    >>> cheap = top_by_score_per_parameter(neurons, mean, 0.2)
    >>> 0 < len(cheap) < len(neurons)
    True
    """
    check_neurons(neurons)
    check_readapting(param_fraction=param_fraction)
    scores = checked_scores(neurons, scores)
    most = param_fraction * sum(parameter.numel() for parameter in neurons.model.parameters())
    worth, none = {}, neurons.none().masks
    for name, layer in neurons.layers.items():
        cost = moving_parameters(neurons, Slice(none | {name: torch.ones(layer.count, dtype=torch.bool)}))
        worth[name] = of_unit_length(scores[name]) * layer.count / max(1, cost)
    place = torch.cat([*worth.values()]).argsort(descending=True, stable=True).argsort()
    places = dict(zip(worth, place.split([len(of) for of in worth.values()]), strict=True))

    def first(count: int) -> Slice:
        return Slice({name: place < count for name, place in places.items()})

    def too_many(count: int) -> bool:
        return moving_parameters(neurons, first(count)) > most

    return first(bisect_left(range(len(place) + 1), True, lo=1, key=too_many) - 1)


def check_readapting(replay: float | Sequence[float] = 1.0, *, param_fraction: float = 1.0) -> tuple[float, ...]:
    """Return the values of `replay` to try; raise for settings that cannot be."""
    ratios = (replay,) if isinstance(replay, int | float) else tuple(replay)
    if not ratios or not all(0 <= ratio < math.inf for ratio in ratios):
        raise TorchsliceError(f"replay must be 0 or more, or several such numbers; got {replay}.")
    if not 0 < param_fraction <= 1:
        raise TorchsliceError(f"param_fraction must be in (0, 1], got {param_fraction:g}.")
    return ratios


def check_samples(samples: Split, task: Task) -> Split:
    """Return new samples as they are prepared and augmented in a task; raise where they are none of it."""
    if type(samples) is not type(task.train):
        kind, given = type(task.train).__name__, type(samples).__name__
        raise TorchsliceError(
            f"the new samples are a {given}, and those of {task.name} are {kind}; give a split of a task that is made "
            "alike, such as ts.data.task(loader, classes=...).train."
        )
    if len(samples) < 4:
        raise TorchsliceError(f"{len(samples)} new samples are too few to train on and to choose by; give at least 4.")
    if int(samples.labels.max()) >= len(task.classes):
        raise TorchsliceError(
            f"a new sample has label {int(samples.labels.max())}, and {task.name} has {len(task.classes)} classes "
            f"(labels 0 to {len(task.classes) - 1}). For new classes use extend."
        )
    if task.preprocessing is not None:
        samples = samples.like(task.preprocessing)
    return task.train.take(torch.tensor([], dtype=torch.int64)).join(samples)
