"""What training minimises. An objective is any function of this shape; parts are shown and recorded.

Shapes: B batch, b samples of it that were looked at, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TorchsliceError
from ..inputs import Inputs, Output, describe, run


class Objective(Protocol):
    """A function that runs the model on a batch and says what to minimise.

    Args:
        model: the network to train.
        inputs: a tensor [B, ...], or a tuple or dictionary of tensors.
        labels: int64 [B].

    Returns:
        The loss to minimise (a scalar), which answers were correct, bool [b], and the parts of the loss to record by
        name (scalars).
    """

    def __call__(
        self, model: nn.Module, inputs: Inputs, labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]: ...


class Step(Objective, Protocol):
    """The objective of one step, and the classes that its batch is about."""

    @property
    def classes(self) -> Sequence[int]:
        """Their labels, in rising order."""


class Drawn(Protocol):
    """What `fit` minimises if it is another objective at every step: each is drawn, and then its batch."""

    def draw(self, generator: torch.Generator) -> Step: ...


@dataclass(frozen=True)
class CrossEntropy:
    """The cross entropy in nats, the default objective of `fit`.

    Attributes:
        label_smoothing: in [0, 1).
        output: picks the logits from what the model returns, see `find_neurons`.

    >>> loss, correct, parts = CrossEntropy()(model, task.example, torch.tensor([0, 1]))
    >>> correct.shape
    torch.Size([2])
    """

    label_smoothing: float = 0.0
    output: Output = None

    def __call__(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logits = run(model, inputs, self.output)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        return loss, logits.argmax(1) == labels, {}


def checked(found: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return what an objective returned; raise unless it has the form that `Objective` describes."""
    if isinstance(found, tuple) and len(found) == 3:
        loss, correct, parts = found
        if (
            isinstance(loss, Tensor)
            and loss.dim() == 0
            and loss.requires_grad
            and isinstance(correct, Tensor)
            and correct.numel()
            and isinstance(parts, dict)
            and not {*parts} & {"loss", "train_accuracy"}
        ):
            return loss, correct, {name: torch.as_tensor(value) for name, value in parts.items()}
    raise TorchsliceError(
        "an objective must return (loss, correct, parts): a scalar that requires a gradient, bool [b], and a "
        f"dictionary of scalars with names other than loss and train_accuracy; it returned {describe(found)}."
    )


def describe_objective(objective: Objective | Drawn) -> str:
    """Return a text that is the same for the same objective in every process: its repr, or its qualified name."""
    text = repr(objective)
    if " at 0x" not in text:
        return text
    named = objective if hasattr(objective, "__qualname__") else type(objective)
    return f"{named.__module__}.{named.__qualname__}"
