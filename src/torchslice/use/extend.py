"""Teach a network new classes by training the neurons that those it knows do not need.

Shapes: C classes known before, k new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import nn

from ..core.find import find_neurons
from ..core.neurons import Neurons
from ..core.widen import grow, last_wire
from ..data import Data
from ..errors import TorchsliceError
from ..slices import Slice
from .controls import reinitialised
from .evaluate import accuracy, device_of
from .extended import Extended, Step, Task, answering, joint_data
from .finetune import finetune
from .joined import Joined, Known, Selected
from .partial import Partial
from .widen import check_same


def extend(
    model: nn.Module | Extended,
    critical: Slice,
    data: Data,
    *,
    classes: Sequence[str] | None = None,
    replay: Data | None = None,
    epochs: int = 10,
    learning_rate: float = 0.05,
    restart: bool = True,
    batch_statistics: bool = True,
    seed: int = 0,
    **training: Any,
) -> Extended:
    """Teach a network new classes by training its non-critical neurons and a row of the classifier for each new class.

    The rows of the known classes and the critical neurons stay as they are, bit for bit, so the known classes are
    answered through the slice `critical` as before. The model is not changed, and the test split is never looked at.
    After NeuSemSlice (arXiv 2407.20281, incremental development): the mask is applied for known classes, not for new.

    Args:
        model: a trained network; or what an earlier extension returned, whose slices must be in `critical`.
        critical: the neurons through which the known classes are answered; `settle` makes them better at it.
        data: of the new classes alone, at least two without `replay`; normalised as what the model was trained on, see
            `Data.restrict`.
        classes: names of the classes that the model knows, in the order of its scores; a loaded model's own by default.
        replay: data of the known classes, as few as there are. New scores then learn to stand beside the known ones,
            and bias and rule of `joined` are chosen by validation images. Without it, nothing compares the two.
        epochs: passes over the training images; the epoch is chosen by validation images.
        learning_rate: of the first step, see `finetune`.
        restart: draw the neurons that learn anew first, instead of going on from what they learned before.
        batch_statistics: see `Partial`.
        seed: of the new rows, of what is drawn anew, and of the training.
        training: as in `finetune`: batch_size, weight_decay, device, precision, progress, ...

    Raises TorchsliceError, before anything is trained, where no neuron is critical or none is not, for new classes that
    are known already, and for data that do not fit.

    >>> extended = extend(settled.model, critical, data.restrict(new), classes=old, replay=data.restrict(old))
    >>> accuracy(extended.joined(), data.restrict(extended.classes))
    """
    start = Extended.start(model, classes, data.example)
    data, replay = _alike(start, data, replay)
    example = data.example.to(device_of(start.model))
    neurons = find_neurons(start.model, example)
    _check(start, critical, data, replay, neurons)
    known, new = start.classes, data.classes
    rows = range(len(known), len(known) + len(new))
    tasks = tuple(replace(task, part=task.part or critical) for task in start.tasks)
    before = answering(start.model, tasks, example)

    grown = grow(start.model, neurons, {last_wire(neurons, neurons.head[0]): len(new)}, seed=seed)
    check_same(start.model, grown, example)
    partial = Partial(grown, ~critical, example, classes=rows, batch_statistics=batch_statistics)
    if restart:
        partial.take(reinitialised(grown, seed=seed))
    student: nn.Module = Selected(partial, rows)
    steps = list(start.steps)
    if replay is not None:
        biases = [task.bias for task in tasks]
        earlier = Joined(before, biases=biases, rule=start.rule)
        whole = Selected(start.model, range(len(known)))
        for name, network in (("known classes, whole network", whole), ("known classes, their slice", earlier)):
            steps.append(Step(name, accuracy(network, replay, split="validation").overall))
        student = Joined([Known(earlier), student], biases=[0.0, 0.0])
    started = perf_counter()
    task = data if replay is None else joint_data(replay, data)
    tuned = finetune(student, task, epochs=epochs, learning_rate=learning_rate, seed=seed, **training)
    seconds = perf_counter() - started
    last: Any = tuned.model.networks[-1] if isinstance(tuned.model, Joined) else tuned.model
    merged = last.network.merged()
    merged.classes = (*known, *new)

    extended = Extended(merged, (*tasks, Task(new, None)), example, start.rule)
    assert all(map(_same, before, answering(merged, tasks, example))), "a frozen value moved"
    score = accuracy(extended.network(), data, split="validation").overall
    steps.append(Step("new classes", score, partial.param_share, tuned.best_epoch, seconds))
    if replay is not None:
        extended = extended.calibrated(replay, data)
        score = accuracy(extended.joined(), joint_data(replay, data), split="validation").overall
        steps.append(Step("all classes, task not given", score))
    return replace(extended, steps=tuple(steps))


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two slices are the same bits."""
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def _check(start: Extended, critical: Slice, data: Data, replay: Data | None, neurons: Neurons) -> None:
    if len(start.classes) != neurons.classes or len(set(start.classes)) < neurons.classes:
        raise TorchsliceError(
            f"the model has {neurons.classes} class scores, and {len(set(start.classes))} different classes are named "
            f"({', '.join(start.classes)}); name each once, in the order of the scores: classes=."
        )
    if not neurons.head:
        raise TorchsliceError(
            "the class scores do not come straight from a layer, so no rows can be added for new classes."
        )
    if neurons.classes < 2:
        raise TorchsliceError("the model has a single class score; train it on two classes at least.")
    if twice := [name for name in data.classes if name in start.classes]:
        raise TorchsliceError(
            f"the model knows {', '.join(map(repr, twice))} already; give data of new classes alone: "
            "data.restrict([...]). For new samples of known classes use readapt."
        )
    if len(data.classes) < 2 and replay is None:
        raise TorchsliceError(
            f"a single new class ({data.classes[0]!r}) can only be told from the known ones by their images: replay=."
        )
    neurons.check(critical)
    if not ~critical:
        raise TorchsliceError(
            "every neuron is critical, so none is left to train. Add fresh ones with widen(model, example, "
            "factor=1.25), or choose a smaller slice."
        )
    start.check(critical)


def _alike(start: Extended, data: Data, replay: Data | None) -> tuple[Data, Data | None]:
    """Normalise all images as those the model was trained on: by its own record, else as those that are replayed."""
    known, classes = getattr(start.model, "preprocessing", None), start.classes
    like = replay or data
    mean, std = (tuple(known["mean"]), tuple(known["std"])) if known else (like.mean, like.std)
    return replace(data, mean=mean, std=std), replay and replace(replay.restrict(classes), mean=mean, std=std)
