"""Which neurons of a layer come first by contribution, and how many are enough.

Shapes: C classes, L layers, N neurons of a layer, k neurons of a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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


def tapered(widths: Mapping[str, int], neuron_fraction: float, taper: float) -> dict[str, int]:
    """Spread a budget over the layers: how many neurons of each are kept, `neuron_fraction` of all of them together.

    The fraction falls linearly with depth, until that of the last layer is `taper` times that of the first; a layer
    gives at most all of its neurons and at least one. Early layers serve all classes alike, late ones tell classes
    apart, so a budget that narrows with depth serves small sub-tasks better, and one that does not all classes at once.

    >>> tapered({"a": 10, "b": 10, "c": 10}, 0.5, 0.25)
    {'a': 8, 'b': 5, 'c': 2}
    """
    sizes = torch.tensor([*widths.values()], dtype=torch.float64)  # [L]
    slope = torch.linspace(1, taper, len(sizes), dtype=torch.float64)
    low, high = 0.0, 1 / taper  # by which the slope is scaled; at the upper end every layer is whole
    for _ in range(60):
        middle = (low + high) / 2
        enough = (sizes * (middle * slope).clamp(max=1)).sum() >= neuron_fraction * sizes.sum()
        low, high = (low, middle) if enough else (middle, high)
    counts = (sizes * (high * slope).clamp(max=1)).round().clamp(min=1).int().tolist()
    return dict(zip(widths, counts, strict=True))


def balanced(scores: Tensor, count: int, *, cost: float = 0.3) -> Tensor:
    """Choose `count` neurons per class by contribution, so that classes share less than they would: bool [C, N].

    Classes choose in turns, one neuron each, with the contributions [C, N] of each class scaled to at most 1. A neuron
    costs `cost` times the number of classes that have it already, in units of the mean number at the end. So neurons
    that all classes want do not crowd out the others, and more of the layer serves some class.

    >>> balanced(torch.tensor([[1.0, 0.9], [1.0, 0.9]]), 1)
    tensor([[ True, False],
            [False,  True]])
    """
    classes, width = scores.shape
    worth = scores.double() / scores.amax(1, keepdim=True).clamp(min=1e-300)  # [C, N]
    kept = torch.zeros(classes, width, dtype=torch.bool)
    price = torch.zeros(width, dtype=torch.float64)
    for turn in range(min(count, width)):
        for step in range(classes):
            label = (turn + step) % classes
            best = int((worth[label] - price).masked_fill(kept[label], -torch.inf).argmax())
            kept[label, best] = True
            price[best] += cost * width / (classes * count)
    return kept
