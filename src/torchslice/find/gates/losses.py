"""Cohesion and coupling of a batch, the two losses of modularizing while training (arXiv 2306.09376, section 3.2).

Both are means of cosine similarities over pairs of samples. They are computed from class sums instead of pairs, since
rows n_i satisfy |sum_i n_i|^2 = sum_i |n_i|^2 + sum over ordered pairs of n_i . n_j. That costs O(B N), and processes
exchange [C, N] sums instead of their batches.

Shapes: B batch, C classes, N neurons of all layers together, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import TorchsliceError
from ...inputs import Inputs, run
from ...training.ranks import sum_over_ranks
from .gated import check_gated


@dataclass(frozen=True)
class objective:
    """Cross entropy plus weighted cohesion and coupling losses of the gates (arXiv 2306.09376, section 3.2).

    >>> history = ts.fit(gated, task, quick, objective=ts.gates.objective(cohesion_weight=0.5, coupling_weight=1.5))
    """

    cohesion_weight: float = 0.5
    coupling_weight: float = 1.5
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("cohesion_weight", "coupling_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise TorchsliceError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        if not 0 <= self.label_smoothing < 1:
            raise TorchsliceError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}.")

    def __call__(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Run a GatedModel; return the loss, correct [B], and the parts cross_entropy, cohesion and coupling."""
        gated = check_gated(model)
        logits = run(model, inputs, gated.neurons.output)
        cohesion, coupling = pair_losses([*gated.gate_values.values()], labels, logits.shape[1])
        cross_entropy = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        loss = cross_entropy + self.cohesion_weight * cohesion + self.coupling_weight * coupling
        parts = {"cross_entropy": cross_entropy, "cohesion": cohesion, "coupling": coupling}
        return loss, logits.argmax(1) == labels, parts


def pair_losses(layers: Sequence[Tensor], labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the cohesion and the coupling loss of gate values >= 0, [B, N] per layer: means over the layers in [0, 1].

    Cohesion is the mean of 1 - cosine similarity over pairs of samples of one class, coupling the mean cosine
    similarity over pairs of different classes. A row of zeros is similar to nothing; a mean over no pair is 0, without
    gradient. Under torchrun the pairs are those of the global batch.
    """
    with torch.autocast(labels.device.type, enabled=False):
        rows = unit_rows(layers)  # [B, N], |row|^2 = fraction of its layers that are not zero
        classes = F.one_hot(labels, num_classes).to(rows.dtype)  # [B, C]
        own = (rows.detach() ** 2).sum(1)  # [B]
        figures = torch.cat([classes.T @ rows, classes.T @ torch.stack([own, torch.ones_like(own)], 1)], 1)
        figures = sum_over_ranks(figures)  # [C, N + 2]
        sums, own, count = figures[:, :-2], figures[:, -2], figures[:, -1]  # [C, N], [C], [C]
        within = (sums**2).sum()
        same = within - own.sum()  # sum of similarities over ordered pairs of one class
        different = (sums.sum(0) ** 2).sum() - within
        same_pairs = (count * (count - 1)).sum()
        different_pairs = count.sum() ** 2 - (count**2).sum()
        cohesion = (same_pairs - same) / same_pairs.clamp(min=1)
        coupling = different / different_pairs.clamp(min=1)
    return (cohesion * (same_pairs > 0)).clamp(0, 1), (coupling * (different_pairs > 0)).clamp(0, 1)


def unit_rows(layers: Sequence[Tensor]) -> Tensor:
    """Scale the rows of every layer [B, N_l] to length 1 / sqrt(L) and join them, float32 [B, N].

    The product of two joined rows is the mean over the layers of their cosine similarities. Rows of zeros stay zero
    and get no gradient.
    """
    values = torch.cat([layer.float() for layer in layers], 1)  # [B, N]
    widths = torch.tensor([layer.shape[1] for layer in layers], device=values.device)
    layer_of = torch.arange(len(layers), device=values.device).repeat_interleave(widths, output_size=values.shape[1])
    squares = values.new_zeros(len(values), len(layers)).index_add(1, layer_of, values**2)  # [B, L]
    on = squares > 0
    scales = torch.where(on, squares, 1).rsqrt() * on / len(layers) ** 0.5  # [B, L]
    return values * scales[:, layer_of]
