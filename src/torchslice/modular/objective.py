"""The objective of modularizing while training, for `fit`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TorchsliceError
from .gates import check_gated
from .losses import pair_losses


@dataclass(frozen=True)
class objective:
    """Cross entropy plus weighted cohesion and coupling losses of the gates (arXiv 2306.09376, section 3.2).

    >>> fit(gated, data, objective=objective(cohesion_weight=0.5, coupling_weight=1.5), epochs=200)
    """

    cohesion_weight: float = 0.5
    coupling_weight: float = 1.5

    def __post_init__(self) -> None:
        for name, weight in (("cohesion_weight", self.cohesion_weight), ("coupling_weight", self.coupling_weight)):
            if not 0 <= weight < math.inf:
                raise TorchsliceError(f"{name} must be 0 or more, got {weight}.")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Run a GatedModel and return loss, right answers, and the parts cross_entropy, cohesion and coupling."""
        gated = check_gated(getattr(model, "module", model))  # unwrapped, where training is distributed
        logits = model(images)
        cohesion, coupling = pair_losses([*gated.gate_values.values()], labels, num_classes=logits.shape[1])
        cross_entropy = F.cross_entropy(logits.float(), labels)
        loss = cross_entropy + self.cohesion_weight * cohesion + self.coupling_weight * coupling
        return (
            loss,
            logits.argmax(1) == labels,
            {"cross_entropy": cross_entropy, "cohesion": cohesion, "coupling": coupling},
        )
