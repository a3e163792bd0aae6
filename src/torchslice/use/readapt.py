"""Adapt a trained network to new samples of its classes by training its critical neurons only.

Shapes: N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..core.find import find_neurons
from ..data import Data, Split
from ..data.splits import hold_out
from ..errors import TorchsliceError
from ..slices import Slice
from ..tables import percent, table
from .evaluate import accuracy, device_of
from .finetune import best_of_epochs
from .partial import Partial


@dataclass(frozen=True)
class Epoch:
    """Validation accuracies after an epoch (0 is before training), and the steps and seconds of training so far."""

    new_accuracy: float
    clean_accuracy: float
    steps: int
    seconds: float

    @property
    def mean_accuracy(self) -> float:
        """What epochs are chosen by: the mean of both accuracies."""
        return (self.new_accuracy + self.clean_accuracy) / 2


@dataclass(frozen=True)
class Readapted:
    """The adapted network, and how it came about; prints as a table.

    Attributes:
        model: the network after its best epoch, plain and in eval mode.
        epochs: the log, the state before training first.
        best_epoch: the epoch that was kept.
        replay: old training images per new sample that were trained on.
        param_share: share of the model's parameters that were trained, in [0, 1].
    """

    model: nn.Module = field(repr=False)
    epochs: tuple[Epoch, ...]
    best_epoch: int
    replay: float
    param_share: float

    @property
    def best(self) -> Epoch:
        """The row of the epoch that was kept."""
        return self.epochs[self.best_epoch]

    def first_at(self, new_accuracy: float) -> Epoch | None:
        """Return the first row that reaches a validation accuracy on new samples, None if there is none."""
        return next((row for row in self.epochs if row.new_accuracy >= new_accuracy), None)

    def to_plain(self) -> dict[str, Any]:
        """Return all but the network as JSON-able data."""
        figures = {"best_epoch": self.best_epoch, "replay": self.replay, "param_share": self.param_share}
        return {**figures, "epochs": [asdict(row) for row in self.epochs]}

    def __str__(self) -> str:
        rows = [
            (
                f"{epoch}{' *' if epoch == self.best_epoch else ''}",
                *(percent(row.new_accuracy), percent(row.clean_accuracy), row.steps, f"{row.seconds:.1f}"),
            )
            for epoch, row in enumerate(self.epochs)
        ]
        trained = f"{percent(self.param_share)} of the parameters trained, {self.replay:g} old images per new one"
        return f"{table(('epoch', 'new samples', 'clean', 'steps', 'seconds'), rows)}\n* kept; {trained}"


def readapt(
    model: nn.Module,
    critical: Slice,
    new_samples: Split,
    data: Data,
    *,
    replay: float | Sequence[float] = 1.0,
    classifier: bool = False,
    batch_statistics: bool = True,
    **settings: Any,
) -> Readapted:
    """Adapt a network to new samples by training its critical neurons only; all others stay as they are, bit for bit.

    Part of the new samples and the validation images of `data` choose the epoch, by the mean of both accuracies. The
    model is not changed, and the test split is never looked at. The idea is NeuSemSlice's (arXiv 2407.20281,
    re-adaptation).

    Args:
        model: a trained network with the classes of `data`.
        critical: the neurons that are trained, such as `semantic.critical`, or the `worthiest`.
        new_samples: images and labels of the classes of `data`, at least two of each; for instance under a new light.
        data: what the model was trained on.
        replay: old training images per new sample to train on as well; of several values, each is tried and the
            best on validation is kept.
        classifier: whether the rows of the class scores are trained too.
        batch_statistics: whether norms of critical neurons go with the new samples, see `Partial`.
        settings: as in `adapt`.

    Raises TorchsliceError for a slice that covers nothing or everything, and for samples of unknown classes or shape.

    >>> adapted = readapt(model, semantic.critical, Split(images, labels), data, epochs=10)
    >>> print(adapted)
    """
    example = data.example.to(device_of(model))
    neurons = find_neurons(model, example)
    if len(critical & neurons.full()) == len(neurons):
        raise TorchsliceError(
            "the slice covers every neuron, so nothing would be spared; choose a smaller one, or use finetune."
        )
    classes = range(len(data.classes)) if classifier else ()
    student = Partial(model, critical, example, classes=classes, batch_statistics=batch_statistics, neurons=neurons)
    values = (replay,) if isinstance(replay, int | float) else tuple(replay)
    tried = [adapt(student, new_samples, data, replay=value, **settings) for value in values]
    best = max(tried, key=lambda found: found.best.mean_accuracy)
    return replace(best, model=best.model.merged(), param_share=student.param_share)  # type: ignore[operator]


def adapt(
    network: nn.Module,
    new_samples: Split,
    data: Data,
    *,
    replay: float = 1.0,
    epochs: int = 10,
    learning_rate: float = 0.005,
    weight_decay: float = 0.0,
    batch_size: int = 64,
    validation_share: float = 0.2,
    seed: int = 0,
    **running: Any,
) -> Readapted:
    """Train whatever can be trained in a copy of a network on new samples and some old ones, and keep its best epoch.

    This is the training of `readapt`, for comparison with other ways to choose what is trained.

    Args:
        network: any network; parameters that require no gradient stay as they are.
        new_samples: images and labels of the classes of `data`.
        data: what the network was trained on; gives the old images, and the validation images.
        replay: old training images per new sample.
        epochs: passes over the new samples and the old images.
        learning_rate: of AdamW in the first step; it falls to zero on half a cosine.
        batch_size: images per step.
        validation_share: of the new samples, to choose the epoch by, in (0, 1).
        seed: of the choice of images, their order, the augmentation, and dropout.
        running: device, precision, progress, as in `fit`.

    >>> adapt(model, new_samples, data, epochs=10)  # full fine-tuning
    """
    if epochs < 1 or not learning_rate > 0 or not replay >= 0:
        raise TorchsliceError(
            "adapting needs at least 1 epoch, a learning_rate above 0 and a replay of 0 or more, "
            f"got {epochs}, {learning_rate} and {replay}."
        )
    _check_samples(new_samples, data)
    new, held = hold_out(new_samples, validation_share, seed=seed)
    task = replace(data, train=_with_old(new, data.train, round(replay * len(new)), seed))
    validation = replace(data, validation=held)
    log: list[Epoch] = []

    def look(network: nn.Module, steps: int, seconds: float) -> float:
        new, clean = (accuracy(network, split, split="validation").overall for split in (validation, data))
        log.append(Epoch(new, clean, steps, seconds))
        return log[-1].mean_accuracy

    # Gradients of critical neurons are far larger than those of others; AdamW adjusts its steps to their size.
    adamw = partial(torch.optim.AdamW, lr=learning_rate, weight_decay=weight_decay)
    tuned = best_of_epochs(network, task, adamw, look, epochs=epochs, batch_size=batch_size, seed=seed, **running)
    trained = sum(parameter.numel() for parameter in tuned.model.parameters() if parameter.requires_grad)
    share = trained / sum(parameter.numel() for parameter in tuned.model.parameters())
    return Readapted(tuned.model, tuple(log), tuned.best_epoch, float(replay), share)


def _with_old(new: Split, old: Split, count: int, seed: int) -> Split:
    """Join new samples and `count` old ones."""
    if not count:
        return new
    drawn = old.limit(count, seed=seed)
    return Split(torch.cat([new.images, drawn.images]), torch.cat([new.labels, drawn.labels]))


def _check_samples(samples: Split, data: Data) -> None:
    given, needed = ("x".join(map(str, images.shape[1:])) for images in (samples.images, data.train.images))
    if given != needed:
        raise TorchsliceError(f"the new samples are images of {given}, and those of {data.name} are {needed}.")
    if len(samples) < 4:
        raise TorchsliceError(f"{len(samples)} new samples are too few to train on and to choose by; give at least 4.")
    if int(samples.labels.max()) >= len(data.classes):
        raise TorchsliceError(
            f"a new sample has label {int(samples.labels.max())}, and {data.name} has {len(data.classes)} classes "
            f"(labels 0 to {len(data.classes) - 1}). For new classes use extend."
        )
