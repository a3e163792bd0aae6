"""Which neurons of a layer are critical: the first ones in the order of their contributions, and how many.

Shapes: C classes, N neurons of a layer, k neurons of a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import TorchsliceError
from .cka import prefix_cka

ROUNDING = 1e-9  # by which a curve may miss theta


def in_order(scores: Tensor) -> Tensor:
    """Return the neurons by contribution, the largest first, equal ones by index: [..., N] -> int64 [..., N].

    >>> in_order(torch.tensor([1.0, 3.0, 1.0]))
    tensor([1, 0, 2])
    """
    return scores.argsort(dim=-1, descending=True, stable=True)


def by_theta(gram: Tensor, scores: Tensor, theta: float) -> Tensor:
    """Return the smallest set of first neurons that is as similar (CKA) to the whole layer as theta, bool [N].

    A layer that is constant is kept whole.

    Args:
        gram: of the centred activations, float64 [N, N].
        scores: contributions [N].
        theta: in (0, 1].

    >>> by_theta(torch.eye(4), torch.tensor([4.0, 3.0, 2.0, 1.0]), 0.8)
    tensor([ True,  True,  True, False])
    """
    return up_to(scores, prefix_cka(gram, in_order(scores)), theta)


def by_mass(scores: Tensor, theta: float) -> Tensor:
    """Return the smallest set of first neurons that holds a share theta in (0, 1] of all contribution, bool [N].

    A layer without any contribution is kept whole.

    >>> by_mass(torch.tensor([1.0, 6.0, 3.0]), 0.9)
    tensor([False,  True,  True])
    """
    return up_to(scores, prefix_mass(scores, in_order(scores)), theta)


def top_share(scores: Tensor, share: float) -> Tensor:
    """Return the first neurons that are a `share` in (0, 1] of their layer, at least one: [..., N] -> bool [..., N].

    >>> top_share(torch.tensor([[1.0, 6.0, 3.0, 0.0], [1.0, 1.0, 1.0, 1.0]]), 0.5)
    tensor([[False,  True,  True, False],
            [ True,  True, False, False]])
    """
    check_share("share", share)
    count = max(1, round(share * scores.shape[-1]))
    kept = in_order(scores)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)


def tapered(widths: Mapping[str, int], share: float, taper: float) -> dict[str, int]:
    """Spread a budget over the layers: how many neurons of each layer are kept, `share` of all of them together.

    The share of a layer falls linearly with depth, until the last layer has `taper` in (0, 1] times that of the first;
    it is at most the whole layer and at least one neuron. Early layers serve all classes alike, late ones tell classes
    apart, so a budget that narrows with depth serves small sub-tasks better, and one that does not all classes at once.

    >>> tapered({"a": 10, "b": 10, "c": 10}, 0.5, 0.25)
    {'a': 8, 'b': 5, 'c': 2}
    """
    check_share("share", share)
    check_share("taper", taper)
    sizes = torch.tensor([*widths.values()], dtype=torch.float64)  # [L]
    slope = torch.linspace(1, taper, len(sizes), dtype=torch.float64)
    low, high = 0.0, 1 / taper  # by which the slope is scaled; at the upper end every layer is whole
    for _ in range(60):
        middle = (low + high) / 2
        enough = (sizes * (middle * slope).clamp(max=1)).sum() >= share * sizes.sum()
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


def prefix_mass(scores: Tensor, order: Tensor) -> Tensor:
    """Return the share of all contribution that the first k = 1..N neurons of an order hold, float64 [N].

    >>> prefix_mass(torch.tensor([1.0, 3.0]), torch.tensor([1, 0]))
    tensor([0.7500, 1.0000], dtype=torch.float64)
    """
    if (scores < 0).any():
        raise TorchsliceError(
            f"the mass criterion needs contributions of at least 0, the smallest is {scores.min():.3g}; "
            'take criterion="cka" or another metric.'
        )
    mass = scores[order].double().cumsum(0)
    held = (mass / mass[-1]).nan_to_num(nan=0.0)
    held[-1] = 1.0
    return held


def up_to(scores: Tensor, curve: Tensor, theta: float) -> Tensor:
    """Return the first neurons by contribution until a curve [N] over their number reaches theta, bool [N]."""
    return first(in_order(scores), reach(curve, theta))


def reach(curve: Tensor, theta: float, *, at_least: int = 1) -> int:
    """Return the smallest k of at least `at_least` with curve[k - 1] >= theta; the curve [N] ends with 1.

    >>> reach(torch.tensor([0.5, 0.9, 0.8, 1.0]), 0.85)
    2
    """
    check_share("theta", theta)
    return at_least + int((curve[at_least - 1 :] >= theta - ROUNDING).int().argmax())


def first(order: Tensor, count: int) -> Tensor:
    """Return the mask of the first neurons of an order [N], bool [N] on the CPU."""
    return torch.zeros(len(order), dtype=torch.bool).index_fill_(0, order[:count].cpu(), True)


def check_share(name: str, value: float) -> None:
    """Raise unless a value is in (0, 1]."""
    if not 0 < value <= 1:
        raise TorchsliceError(f"{name} must be in (0, 1], got {value}.")
