"""Train a network a little longer and keep its best epoch, by the validation images alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from ..data import Data
from ..errors import TorchsliceError
from ..training import choose_placement, cross_entropy
from ..training.batches import TrainingBatches, epoch_seed
from ..training.fit import cosine, trainable
from ..training.progress import progress_bar
from .evaluate import accuracy, device_of


@dataclass(frozen=True)
class Tuned:
    """The network after its best epoch, and the validation accuracy before training (0) and after every epoch."""

    model: nn.Module = field(repr=False)
    best_epoch: int
    validation_accuracy: tuple[float, ...]


def finetune(
    model: nn.Module,
    data: Data,
    *,
    epochs: int = 10,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    batch_size: int = 128,
    seed: int = 0,
    device: str | torch.device = "auto",
    precision: str = "auto",
    progress: bool = True,
) -> Tuned:
    """Train a copy of a model as `fit` does, and return it as it was after the epoch with the best validation accuracy.

    Among equal epochs the latest is kept; epoch 0, the model as given, takes part. The test split is never looked at.
    The result is in eval mode, on the device of the given model.

    Args:
        model: a network with the classes of `data`, such as a sub-model; it is not changed.
        data: the task, for instance `data.restrict(["cat", "dog"])`.
        epochs: passes over the training split.
        learning_rate: of the first step; it falls to zero on half a cosine.
        seed: of the order, the augmentation, and dropout.
        precision: "fp32", "bf16" or "auto", as in `fit`.

    >>> tuned = finetune(small, data.restrict(["cat", "dog"]), epochs=5)
    >>> tuned.best_epoch, tuned.validation_accuracy[tuned.best_epoch]
    (4, 0.961)
    """
    if epochs < 1 or not learning_rate > 0:
        raise TorchsliceError(
            f"fine-tuning needs at least 1 epoch and a learning_rate above 0, got {epochs} and {learning_rate}."
        )

    def look(network: nn.Module, steps: int, seconds: float) -> float:
        return accuracy(network, data, split="validation").overall

    sgd = partial(SGD, lr=learning_rate, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0)
    running: dict[str, Any] = {"seed": seed, "device": device, "precision": precision, "progress": progress}
    return best_of_epochs(model, data, sgd, look, epochs=epochs, batch_size=batch_size, **running)


def best_of_epochs(
    model: nn.Module,
    data: Data,
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
    look: Callable[[nn.Module, int, float], float],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    device: str | torch.device = "auto",
    precision: str = "auto",
    progress: bool = True,
) -> Tuned:
    """Train a copy of a model and keep its best epoch by `look`, which takes network, steps and seconds of training."""
    placement, home = choose_placement(device, precision), device_of(model)
    batches = TrainingBatches(data, batch_size=batch_size, seed=seed, device=placement.device)
    model = copy.deepcopy(model)
    memory_format = placement.put(model, data.example)
    optimizer = make_optimizer(trainable(model))
    learning_rate = optimizer.param_groups[0]["lr"]
    total, done, seconds = epochs * len(batches), 0, 0.0
    history = [look(model, done, seconds)]
    best, best_epoch = copy.deepcopy(model.state_dict()), 0
    cuda = [placement.device] if placement.device.type == "cuda" else []
    with progress_bar(progress, total=total) as bar, torch.random.fork_rng(cuda):
        for epoch in range(1, epochs + 1):
            torch.manual_seed(epoch_seed(seed, epoch))  # dropout
            model.train()
            started = perf_counter()
            for images, labels in batches.epoch(epoch):
                optimizer.param_groups[0]["lr"] = cosine(learning_rate, done, total)
                images = images.clone(memory_format=memory_format)
                with placement.autocast():
                    loss, _, _ = cross_entropy(model, images, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
                bar.advance(f"epoch {epoch}/{epochs}", f"best validation accuracy {max(history):.1%}")
            seconds += perf_counter() - started
            history.append(look(model, done, seconds))
            if history[epoch] >= max(history):
                best, best_epoch = copy.deepcopy(model.state_dict()), epoch
    model.load_state_dict(best)
    model.to(device=home, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return Tuned(model.eval(), best_epoch, tuple(history))
