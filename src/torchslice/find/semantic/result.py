"""What semantic slicing finds: a slice per class, the critical neurons of all classes, and groups of classes.

Shapes: C classes, N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

from ...errors import TorchsliceError
from ...registry import Registry
from ...slices import Slice, union
from ...tables import percent, table

if TYPE_CHECKING:
    from .strategies import Strategy

CUT = 0.5  # classes share a group as long as their critical neurons overlap by so much on average
ROUNDING = 1e-9  # by which an overlap may miss that

#: name -> class of a strategy, by which its plain form is rebuilt
STRATEGIES: Registry[type[Strategy]] = Registry("strategy")


@dataclass(frozen=True)
class Group:
    """Classes whose critical neurons in a layer overlap, and the union of their slices."""

    classes: tuple[str, ...]
    slice: Slice


@dataclass(frozen=True, eq=False)
class SemanticSlices(Mapping[str, Slice]):
    """The slice of every class, by name, with what belongs to all classes; prints as a table.

    Attributes:
        strategy: how the neurons were chosen, and `metric`, by which contributions.
        slices: {class: slice}; `semantic["cat"]` is one of them.
        critical: all critical neurons: the union of the class slices and, with `ReachTheta`, what had to be added so
            that each layer reaches theta on the samples of all classes together.
        groups: the semantic groups of every layer, {layer: groups}.
        overlap: Jaccard overlaps of the classes' critical neurons in every layer, {layer: float64 [C, C]}.
        linkage: the tree of the classes that gave the groups, as scipy writes it, {layer: float64 [C - 1, 4]}.

    >>> slices["3"] | slices["8"] <= slices.critical, len(slices)
    (True, 10)
    """

    strategy: Strategy
    metric: str
    slices: dict[str, Slice]
    critical: Slice
    groups: dict[str, tuple[Group, ...]]
    overlap: dict[str, Tensor]
    linkage: dict[str, Tensor]

    @classmethod
    def of(cls, strategy: Strategy, metric: str, slices: dict[str, Slice], critical: Slice) -> SemanticSlices:
        """Cluster the classes layer by layer."""
        classes, groups = tuple(slices), {}
        overlaps = {layer: jaccard(torch.stack([s[layer] for s in slices.values()])) for layer in critical.layers}
        trees = {layer: tree(found) for layer, found in overlaps.items()}
        for layer, linkage in trees.items():
            names = [tuple(classes[label] for label in members) for members in groups_of(linkage)]
            groups[layer] = tuple(Group(group, union(slices[name] for name in group)) for group in names)
        return cls(strategy, metric, slices, critical, groups, overlaps, trees)

    def __getitem__(self, name: str) -> Slice:
        return self.slices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.slices)

    def __len__(self) -> int:
        return len(self.slices)

    def summary(self) -> dict[str, Any]:
        """Return how the slices were found, and the neuron retention of each, as JSON-able data."""
        kept = {name: slice_.neuron_retention for name, slice_ in self.items()}
        return {
            "strategy": self.strategy.to_plain(),
            "metric": self.metric,
            "neuron_retention": {"critical": self.critical.neuron_retention, "classes": kept},
        }

    def to_plain(self) -> dict[str, Any]:
        """Return everything as JSON-able data."""
        return {
            **self.summary(),
            "classes": {name: slice_.to_plain() for name, slice_ in self.items()},
            "critical": self.critical.to_plain(),
            "groups": {layer: [list(group.classes) for group in groups] for layer, groups in self.groups.items()},
            "overlap": {layer: found.tolist() for layer, found in self.overlap.items()},
            "linkage": {layer: found.tolist() for layer, found in self.linkage.items()},
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> SemanticSlices:
        """Rebuild what `to_plain` wrote, from the slices.

        >>> SemanticSlices.from_plain(slices.to_plain()) == slices
        True
        """
        try:
            options = dict(plain["strategy"])
            strategy = STRATEGIES[options.pop("strategy")](**options)
            classes = {str(name): Slice.from_plain(slice_) for name, slice_ in plain["classes"].items()}
            critical, metric = Slice.from_plain(plain["critical"]), str(plain["metric"])
        except (KeyError, TypeError, AttributeError) as error:
            raise TorchsliceError(f"these are no semantic slices ({error!r}); slice the model again.") from error
        return cls.of(strategy, metric, classes, critical)

    def __str__(self) -> str:
        kept, rows = [slice_.neuron_retention for slice_ in self.values()], []
        for layer, width in self.critical.layers.items():
            mean = fmean(int(slice_[layer].sum()) for slice_ in self.values())
            rows.append((layer, width, int(self.critical[layer].sum()), f"{mean:.1f}", len(self.groups[layer])))
        spread = f"{percent(fmean(kept))} ({percent(min(kept))} to {percent(max(kept))})"
        last = f"class slices keep {spread} of the neurons, all together {percent(self.critical.neuron_retention)}"
        columns = ("layer", "neurons", "critical", "mean of classes", "groups")
        return "\n".join([f"{self.strategy} by {self.metric}", table(columns, rows), last])

    __repr__ = __str__


def jaccard(masks: Tensor) -> Tensor:
    """Return the Jaccard overlaps |a & b| / |a | b| of the rows of masks, bool [C, N] -> float64 [C, C] in [0, 1].

    >>> jaccard(torch.tensor([[True, True], [True, False]]))
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
