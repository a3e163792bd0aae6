"""How a network is trained: one object of settings for everything that trains."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..errors import TorchsliceError
from ..registry import unknown

OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class Training:
    """Settings of a training; `dataclasses.replace(training, epochs=3)` changes one of them.

    Attributes:
        epochs: Passes over the training samples.
        learning_rate: Highest learning rate; from it, the rate falls in a straight line to zero.
        batch_size: Samples per step, over all processes.
        optimizer: sgd (with Nesterov momentum) or adamw.
        momentum: Of sgd, in [0, 1).
        weight_decay: On weights only, not on biases and norms.
        warmup_fraction: Fraction of the steps in which the learning rate rises to its highest, in [0, 1).
        label_smoothing: Of the cross entropy, in [0, 1); an objective that is given has its own.
        seed: Of the order, the augmentation and dropout; of the weights too where the network is made anew.
        device: auto (a GPU if there is one), cpu or cuda.
        precision: fp32, bf16 (autocast, with float32 weights) or auto: bf16 where it is faster.
        progress: Whether to show a progress bar.

    >>> Training(epochs=3).learning_rate
    0.1
    """

    epochs: int = 10
    learning_rate: float = 0.1
    batch_size: int = 128
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-3
    warmup_fraction: float = 0.2
    label_smoothing: float = 0.1
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value < 2**63:
                what = f"at least {least}" if isinstance(value, int) else f"a whole number, at least {least}"
                what = "below 2**63" if isinstance(value, int) and value > least else what
                raise TorchsliceError(f"{name} must be {what}, got {value!r}.")
        for name in ("learning_rate", "momentum", "weight_decay", "warmup_fraction", "label_smoothing"):
            if not isinstance(getattr(self, name), int | float):
                raise TorchsliceError(f"{name} must be a number, got {getattr(self, name)!r}.")
        if not 0 < self.learning_rate < math.inf:
            raise TorchsliceError(f"learning_rate must be a number above 0, got {self.learning_rate}.")
        for name, known in (("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        for name in ("momentum", "warmup_fraction", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise TorchsliceError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if not 0 <= self.weight_decay < math.inf:
            raise TorchsliceError(f"weight_decay must be 0 or more, got {self.weight_decay}.")

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of the parameters that require a gradient, of which there must be some."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise TorchsliceError("no parameter of the model requires a gradient; unfreeze what is to be trained.")
        weights, others = ([p for p in trained if (p.dim() > 1) is matrix] for matrix in (True, False))
        groups: list[Any] = [{"params": weights, "weight_decay": self.weight_decay}, {"params": others}]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=0.0)
        return torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum, nesterov=self.momentum > 0)

    def rate(self, step: int, steps_per_epoch: int, *, first_epoch: int = 0) -> float:
        """Return the learning rate of a step, counted from 0, of a schedule that began after `first_epoch` epochs.

        >>> Training(epochs=2, learning_rate=0.1, warmup_fraction=0).rate(10, 10)
        0.05
        """
        step, total = step - first_epoch * steps_per_epoch, (self.epochs - first_epoch) * steps_per_epoch
        warmup = self.warmup_fraction * total
        return self.learning_rate * min((step + 1) / (warmup + 1), (total - step) / (total - warmup))

    def to_plain(self) -> dict[str, Any]:
        """Return what decides the result as JSON-able data: all but device and progress."""
        return {name: value for name, value in asdict(self).items() if name not in ("device", "progress")}
