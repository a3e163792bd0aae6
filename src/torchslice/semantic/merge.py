"""From the critical neurons of each class to those of all classes, and to groups of classes that share theirs.

Shapes: C classes, N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

from .selection import ROUNDING, first, in_order, reach

CUT = 0.5  # classes share a group as long as their critical neurons overlap by so much on average


def complete(mask: Tensor, scores: Tensor, theta: float, curve: Callable[[Tensor], Tensor]) -> Tensor:
    """Add neurons to a mask, by contribution, until theta is reached; nothing is ever taken away.

    Args:
        mask: the union of the classes' critical neurons, bool [N], at least one.
        scores: contributions to all classes, [N].
        theta: in (0, 1].
        curve: gives what the first 1..N neurons of an order are worth, such as `prefix_cka` of the pooled data.

    >>> scores = torch.tensor([0.1, 0.3, 0.6])
    >>> complete(torch.tensor([True, False, False]), scores, 0.7, lambda order: prefix_mass(scores, order))
    tensor([ True, False,  True])
    """
    order = in_order(scores)
    order = order[(~mask[order]).int().argsort(stable=True)]  # what is in the mask comes first
    return first(order, reach(curve(order), theta, at_least=int(mask.sum())))


def overlap(masks: Tensor) -> Tensor:
    """Return the Jaccard overlaps |a & b| / |a | b| of the rows of masks, bool [C, N] -> float64 [C, C] in [0, 1].

    >>> overlap(torch.tensor([[True, True], [True, False]]))
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]], dtype=torch.float64)
    """
    both = masks.double() @ masks.double().T
    sizes = masks.sum(1)
    either = sizes[:, None] + sizes[None, :] - both
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def tree(overlaps: Tensor) -> Tensor:
    """Cluster classes by average linkage of the distance 1 - overlap: float64 [C, C] -> [C - 1, 4].

    Each row is a merger as scipy writes it: the two clusters, their distance, and the number of classes in both.
    """
    if len(overlaps) == 1:
        return torch.zeros(0, 4, dtype=torch.float64)
    distances = squareform((1 - overlaps).numpy(), checks=False)
    return torch.from_numpy(hierarchy.linkage(distances, "average"))


def groups_of(linkage: Tensor, cut: float = CUT) -> list[list[int]]:
    """Cut a tree [C - 1, 4] where the mean overlap falls below `cut`: classes by group, in the order of the classes.

    >>> groups_of(tree(torch.tensor([[1.0, 0.2, 0.6], [0.2, 1.0, 0.1], [0.6, 0.1, 1.0]])))
    [[0, 2], [1]]
    """
    if len(linkage) == 0:
        return [[0]]
    members: dict[int, list[int]] = {}
    for label, group in enumerate(hierarchy.fcluster(linkage.numpy(), 1 - cut + ROUNDING, "distance")):
        members.setdefault(int(group), []).append(label)
    return list(members.values())
