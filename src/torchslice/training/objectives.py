"""What training minimises. An objective is any function of this shape; parts are shown and recorded.

Shapes: B batch, b images of it that were looked at, C classes.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn


class Objective(Protocol):
    """A function that runs the model on a batch and says what to minimise.

    Args:
        model: the network to train; under torchrun it is wrapped for distributed training, so call it.
        images: normalised, float [B, ch, H, W].
        labels: int64 [B].

    Returns:
        The loss to minimise (a scalar), which answers were right, bool [b], and the parts of the loss to record by
        name (scalars).
    """

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]: ...


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Run the model and return its cross entropy in nats, the default objective of `fit`."""
    logits = model(images)
    return F.cross_entropy(logits.float(), labels), logits.argmax(1) == labels, {}


def describe(objective: Objective) -> str:
    """Return a text that is the same for the same objective in every process: its repr, or its qualified name."""
    text = repr(objective)
    if " at 0x" not in text:
        return text
    named = objective if hasattr(objective, "__qualname__") else type(objective)
    return f"{named.__module__}.{named.__qualname__}"
