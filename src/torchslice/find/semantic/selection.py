"""Which neurons of a layer come first by contribution, and how many are enough.

Shapes: N neurons of a layer, k neurons of a prefix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import TorchsliceError

ROUNDING = 1e-9  # by which a curve may miss theta


def in_order(scores: Tensor) -> Tensor:
    """Return the neurons by contribution, the largest first, equal ones by index: [..., N] -> int64 [..., N]."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def top_fraction(scores: Tensor, neuron_fraction: float) -> Tensor:
    """Return the first neurons that are a fraction of their layer, at least one: [..., N] -> bool [..., N]."""
    kept = in_order(scores)[..., : max(1, round(neuron_fraction * scores.shape[-1]))]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)


def first_to_reach(order: Tensor, curve: Tensor, theta: float, *, at_least: int = 1) -> Tensor:
    """Return the first neurons of an order, int64 [N], as few as reach theta but `at_least` so many, bool [N].

    The curve [N] says what the first 1..N are worth; it ends with 1.
    """
    count = at_least + int((curve[at_least - 1 :] >= theta - ROUNDING).int().argmax())
    return torch.zeros(len(order), dtype=torch.bool).index_fill_(0, order[:count], True)


def complete(mask: Tensor, scores: Tensor, theta: float, curve: Callable[[Tensor], Tensor]) -> Tensor:
    """Add neurons to a mask, bool [N], by contribution [N], until theta is reached; nothing is ever taken away.

    `curve` gives what the first 1..N neurons of an order are worth, such as `prefix_cka` of the pooled samples.
    """
    order = in_order(scores)
    order = order[(~mask[order]).int().argsort(stable=True)]  # what is in the mask comes first
    return first_to_reach(order, curve(order), theta, at_least=int(mask.sum()))


def prefix_mass(scores: Tensor, order: Tensor) -> Tensor:
    """Return the fraction of all contribution that the first k = 1..N neurons of an order hold, float64 [N]."""
    if (scores < 0).any():
        raise TorchsliceError(
            f"the mass criterion needs contributions of at least 0, the smallest is {scores.min():.3g}; "
            'take criterion="cka" or another metric.'
        )
    mass = scores[order].double().cumsum(0)
    held = (mass / mass[-1]).nan_to_num(nan=0.0)
    held[-1] = 1.0
    return held


def prefix_cka(gram: Tensor, order: Tensor) -> Tensor:
    """Return sim(k) = CKA(X_1..k, X), in [0, 1], of the first k = 1..N neurons of an order with all of them.

    Linear CKA (arXiv 1905.00414, section 3) needs only the squared entries of the Gram matrix X^T X, float64 [N, N], of
    the centred activations X [n, N], here G2 in the given order, and two cumulative sums give all prefixes:
    sim(k) = sum_{i<=k, j<=N} G2_ij / sqrt(sum_{i,j<=k} G2_ij * sum_{i,j} G2_ij).
    Neither the scale of the layer nor the mean of a neuron plays a part. Where no neuron of a prefix varies, its
    similarity is 0; that of the whole layer is always 1.
    """
    order = order.to(gram.device)
    squares = gram.double()[order][:, order]  # [N, N]
    squares = (squares / squares.diagonal().max().clamp(min=1e-300)) ** 2
    shared = squares.sum(1).cumsum(0)  # [N] over i <= k and all j
    own = (squares.diagonal() + 2 * squares.tril(-1).sum(1)).cumsum(0)  # [N] over i, j <= k
    similar = (shared / (own * own[-1]).sqrt()).nan_to_num(nan=0.0).clamp(0, 1)
    similar[-1] = 1.0
    return similar
