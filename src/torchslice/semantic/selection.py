"""Which neurons of a layer are critical: the first ones in the order of their contributions, and how many.

Shapes: C classes, N neurons of a layer, k neurons of a prefix.
"""

from __future__ import annotations

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
