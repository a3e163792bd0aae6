"""Cohesion and coupling of a batch, the two losses of modularizing while training (arXiv 2306.09376, section 3.2).

Both are means of cosine similarities over pairs of samples. They are computed from class sums instead of pairs, since
rows n_i satisfy |sum_i n_i|^2 = sum_i |n_i|^2 + sum over ordered pairs of n_i . n_j. That costs O(B N), and processes
exchange [C, N] sums instead of their batches.

Shapes: B batch, C classes, N neurons of all layers together, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..training.ranks import sum_over_ranks


def cohesion_loss(values: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return the mean of 1 - cosine similarity over pairs of samples of one class, a scalar in [0, 1].

    It is 0 when all samples of each class use their neurons alike, and 0 without gradient if no class has two samples.

    Args:
        values: gate values >= 0, float [B, N], or one such tensor per layer: the mean over the layers is returned.
            A row of zeros is similar to nothing, with similarity 0.
        labels: int64 [B].

    >>> cohesion_loss(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([3, 3]))
    tensor(1.)
    """
    return pair_losses(values, labels)[0]


def coupling_loss(values: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return the mean cosine similarity over pairs of samples of different classes, a scalar in [0, 1].

    It is 0 when no two classes share a neuron, and 0 without gradient if the batch has one class only. The arguments
    are those of `cohesion_loss`.

    >>> coupling_loss(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([3, 4]))
    tensor(0.)
    """
    return pair_losses(values, labels)[1]


def pair_losses(
    values: Tensor | Sequence[Tensor], labels: Tensor, *, num_classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return `cohesion_loss` and `coupling_loss` in one go, over the pairs of the global batch under torchrun.

    `num_classes` is read from the labels if it is not given; under torchrun it must be given, as processes see
    different labels.
    """
    layers = [values] if isinstance(values, Tensor) else list(values)
    with torch.autocast(labels.device.type, enabled=False):
        rows = unit_rows(layers)  # [B, N], |row|^2 = share of its layers that are not zero
        classes = F.one_hot(labels, num_classes or -1).to(rows.dtype)  # [B, C]
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
    widths = torch.tensor([layer.shape[1] for layer in layers], device=layers[0].device)
    layer_of = torch.arange(len(layers), device=widths.device).repeat_interleave(
        widths, output_size=sum(layer.shape[1] for layer in layers)
    )  # [N]
    values = torch.cat([layer.float() for layer in layers], 1)  # [B, N]
    squares = values.new_zeros(len(values), len(layers)).index_add(1, layer_of, values**2)  # [B, L]
    on = squares > 0
    scales = torch.where(on, squares, 1).rsqrt() * on / len(layers) ** 0.5  # [B, L]
    return values * scales[:, layer_of]
