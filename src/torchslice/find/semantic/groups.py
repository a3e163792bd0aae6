"""Semantic groups: sets of classes with the neurons, of all layers, that serve just them.

Shapes: C classes, N neurons of a layer, S sets of classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

from ...errors import TorchsliceError
from ...graph.neurons import Neurons
from ...graph.tied import of_unit_length
from ...registry import unknown
from ...slices import Slice, union
from ...tables import table
from .contributions import Contributions, check_scores

OUTSIDE = 0.5  # of what a neuron contributes to the classes that it serves, it may contribute to the others
SHOWN = 24  # groups that are printed, the largest
NOTHING = 1e-300
ROUNDING = 1e-9


@dataclass(frozen=True)
class Group:
    """A set of classes, and the neurons of all layers that serve just them."""

    classes: tuple[str, ...]
    slice: Slice


@dataclass(frozen=True, eq=False)
class Groups(Sequence[Group]):
    """The semantic groups of a network, those of the fewest classes first; prints as a table.

    Every neuron is in one group, or unused.

    Attributes:
        classes: names of the C classes.
        groups: one for every set of classes that some neurons serve.
        unused: the neurons that contribute nothing to any class.
        linkage: the tree of the classes as scipy writes it, float64 [C - 1, 4]: the two clusters that are joined, their
            distance (1 - correlation of what the neurons contribute to them, in [0, 2]), and the number of classes in
            both.

    >>> found = ts.semantic.groups(neurons, scores)
    >>> found.only(["3", "8"]) <= found.serving(["3", "8"])
    True
    """

    classes: tuple[str, ...]
    groups: tuple[Group, ...]
    unused: Slice
    linkage: Tensor

    def __getitem__(self, index: Any) -> Any:
        return self.groups[index]

    def __len__(self) -> int:
        return len(self.groups)

    def serving(self, classes: Sequence[str]) -> Slice:
        """Return the neurons that serve any of these classes, those that serve all included."""
        wanted = self._known(classes)
        return self._joined(wanted & {*group.classes} for group in self)

    def only(self, classes: Sequence[str]) -> Slice:
        """Return the neurons that serve none but these classes."""
        wanted = self._known(classes)
        return self._joined({*group.classes} <= wanted for group in self)

    @property
    def shared(self) -> Slice:
        """The neurons that serve all classes."""
        return self._joined(len(group.classes) == len(self.classes) for group in self)

    @property
    def order(self) -> tuple[str, ...]:
        """The classes as the tree has them, like beside like."""
        leaves = hierarchy.leaves_list(self.linkage.numpy()) if len(self.classes) > 1 else [0]
        return tuple(self.classes[label] for label in leaves)

    def families(self, count: int) -> list[tuple[str, ...]]:
        """Cut the tree of the classes into at most `count` families.

        >>> [len(names) for names in ts.semantic.groups(neurons, scores).families(1)]
        [10]
        """
        check_count(count, len(self.classes))
        return [tuple(self.classes[label] for label in sorted(members)) for members in families(self.linkage, count)]

    def largest(self, count: int) -> list[tuple[str, Slice]]:
        """Return the `count` groups of most neurons, those of most classes first: the names in one text, the slice."""
        found = sorted(sorted(self, key=lambda group: -len(group.slice))[:count], key=lambda group: -len(group.classes))
        every = len(self.classes)
        return [("all classes" if len(g.classes) == every else ", ".join(g.classes), g.slice) for g in found]

    def to_plain(self) -> dict[str, Any]:
        """Return the groups as JSON-able data."""
        groups = [{"classes": list(group.classes), "slice": group.slice.to_plain()} for group in self]
        tree = {"linkage": self.linkage.tolist(), "order": list(self.order)}
        return {"classes": list(self.classes), "groups": groups, "unused": self.unused.to_plain(), **tree}

    def __repr__(self) -> str:
        every = len(self.classes)
        private = self._joined(len(group.classes) == 1 < every for group in self)
        found = f"{len(self)} semantic group{'s' * (len(self) != 1)} of {self.unused.total} neurons"
        found += (
            f": {len(private)} neurons serve one class alone, {len(self.shared)} all classes, {len(self.unused)} none"
        )
        if len(self) == 1 and every > 1:
            return f"{found}. No neuron tells classes apart: all contribute alike to all."
        rows = []
        for names, slice_ in self.largest(SHOWN):
            kept = [int(mask.sum()) for mask in slice_.masks.values()]
            cuts = [round(len(kept) * third / 3) for third in range(4)]
            rows.append((names, sum(kept), *(sum(kept[a:b]) for a, b in pairwise(cuts))))
        more = f"\n... and {len(self) - len(rows)} smaller groups" if len(rows) < len(self) else ""
        return f"{found}\n{table(('classes', 'neurons', 'first third', 'middle', 'last'), rows)}{more}"

    def _known(self, classes: Sequence[str]) -> set[str]:
        for name in classes:
            if name not in self.classes:
                raise unknown("class", name, self.classes)
        return {*classes}

    def _joined(self, chosen: Any) -> Slice:
        none = self.unused - self.unused
        return union([none, *(group.slice for group, take in zip(self, chosen, strict=True) if take)])


def groups(
    neurons: Neurons,
    scores: Contributions,
    *,
    metric: str | None = None,
    outside: float = OUTSIDE,
    count: int | None = None,
    tied: bool = True,
) -> Groups:
    """Find the semantic groups of a network: which sets of classes share which neurons, across all layers.

    The *profile* of a neuron is what it contributes to each class, see `profiles`. Classes whose profiles rise and fall
    together over all neurons are joined to a tree (average linkage of 1 - correlation, once what a neuron contributes
    to all classes alike is taken off). A neuron *serves* the set of classes, of those that the tree joins, that its
    profile fits best: the one that explains most of its variance by two levels, inside and outside, where the outside
    level is at most `outside` times the inside level. If there is no such set, it serves all classes.

    NeuSemSlice (arXiv 2407.20281) merges neurons across categories and layers by semantic similarity; what that is
    exactly is a definition of torchslice.

    Args:
        scores: from `contributions(neurons, task)`.
        metric: which of them; needed when there are several.
        outside: in [0, 1). The smaller, the more neurons serve all classes.
        count: the finest sets are so many families of classes instead of single ones.
        tied: neurons that leave together have one profile, the mean, so that they are in one group.

    >>> found = ts.semantic.groups(neurons, scores, count=3)
    >>> all(len(group.classes) > 1 or group.classes in found.families(3) for group in found)
    True
    """
    check_outside(outside)
    if tied:
        check_scores(scores, neurons)
        scores = scores.tied(neurons)
    metric, classes = scores.the_metric(metric), len(scores.classes)
    check_count(count, classes)
    linkage, sets, serves = find_groups(scores[metric], outside, count or classes)
    named = []
    for number in sets.sum(1).argsort(stable=True).tolist():
        slice_ = Slice({layer: of == number for layer, of in serves.items()})
        if len(slice_):
            names = tuple(name for name, inside in zip(scores.classes, sets[number].tolist(), strict=True) if inside)
            named.append(Group(names, slice_))
    return Groups(scores.classes, tuple(named), Slice({layer: of < 0 for layer, of in serves.items()}), linkage)


def find_groups(scores: Mapping[str, Tensor], outside: float, count: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the tree of the classes, their sets bool [S, C], and the set each neuron serves: {layer: int64 [N]}.

    Scores are {layer: [C, N]}; an unused neuron serves set -1.
    """
    of = profiles(scores)
    linkage = tree(distances(of))
    sets = sets_of(linkage, count)
    serves = {layer: torch.where(rows.any(1), best_fit(rows, sets, outside), -1) for layer, rows in of.items()}
    return linkage, sets, serves


def profiles(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what every neuron contributes to each class, {layer: [C, N]} -> {layer: float64 [N, C]}.

    Layers weigh alike: their contributions are divided by their Euclidean norm. Classes weigh alike: those of a class
    are divided by their mean over all neurons. Neurons weigh alike: a profile has length 1. One that contributes
    nothing stays zero.

    >>> profiles({"conv": torch.tensor([[3.0, 1.0, 0.0], [4.0, 0.0, 0.0]])})["conv"].tolist()
    [[0.6, 0.8], [1.0, 0.0], [0.0, 0.0]]
    """
    sizes = {layer: of_unit_length(of).abs() for layer, of in scores.items()}
    mean = torch.cat([*sizes.values()], 1).mean(1, keepdim=True).clamp(min=NOTHING)  # [C, 1]
    return {layer: torch.nn.functional.normalize(of / mean, dim=0, eps=NOTHING).T for layer, of in sizes.items()}


def distances(profiles: Mapping[str, Tensor]) -> Tensor:
    """Return 1 - correlation of the classes over all neurons, of what sets classes apart: float64 [C, C] in [0, 2].

    Classes that no neuron tells apart are at distance 1.
    """
    rows = torch.cat([*profiles.values()])
    apart = rows - rows.mean(1, keepdim=True)
    apart -= apart.mean(0)
    covariance = apart.T @ apart  # [C, C]
    sizes = covariance.diagonal().sqrt()
    sizes = torch.where(sizes > ROUNDING * len(rows) ** 0.5, sizes, torch.inf)
    return (1 - covariance / torch.outer(sizes, sizes)).clamp(0, 2).fill_diagonal_(0)


def tree(distances: Tensor) -> Tensor:
    """Join classes at distances [C, C] by average linkage: float64 [C - 1, 4]."""
    if len(distances) == 1:
        return torch.zeros(0, 4, dtype=torch.float64)
    return torch.from_numpy(hierarchy.linkage(squareform(distances.numpy(), checks=False), "average"))


def families(linkage: Tensor, count: int) -> list[list[int]]:
    """Undo the last joins of a tree [C - 1, 4] until `count` families of classes are left.

    >>> families(torch.tensor([[0.0, 2.0, 0.1, 2.0], [1.0, 3.0, 0.9, 3.0]]), 2)
    [[1], [0, 2]]
    """
    classes = len(linkage) + 1
    members = {label: [label] for label in range(classes)}
    for number, (one, other) in enumerate(linkage[: classes - count, :2].long().tolist(), classes):
        members[number] = sorted(members.pop(one) + members.pop(other))
    return list(members.values())


def sets_of(linkage: Tensor, count: int) -> Tensor:
    """Return the sets of classes of a tree, from `count` families to all classes, as bool [S, C]."""
    sets = torch.eye(len(linkage) + 1, dtype=torch.bool)
    for one, other in linkage[:, :2].long().tolist():
        sets = torch.cat([sets, (sets[one] | sets[other])[None]])
    finest = torch.stack([torch.isin(torch.arange(sets.shape[1]), torch.tensor(f)) for f in families(linkage, count)])
    common = sets.double() @ finest.double().T  # [S, families]
    return sets[((common == 0) | (common == finest.sum(1))).all(1)]


def best_fit(profile: Tensor, sets: Tensor, outside: float) -> Tensor:
    """Return the set that each profile [N, C] fits best, int64 [N], of sets [S, C] the last of which holds all classes.

    Of a profile with mean m_in over the n classes of a set and m_out over the others, n (C - n) / C (m_in - m_out)^2 of
    the squared deviation from its mean lies between the two.

    >>> sets = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 1, 1]]).bool()
    >>> best_fit(torch.tensor([[0.9, 0.9, 0.1], [0.2, 0.3, 0.9], [0.6, 0.6, 0.6]]).double(), sets, 0.5)
    tensor([3, 2, 4])
    """
    member, classes = sets.to(profile.dtype), sets.shape[1]
    size = member.sum(1)  # [S]
    inside = profile @ member.T  # [N, S]
    others = (profile.sum(1, keepdim=True) - inside) / (classes - size).clamp(min=1)
    inside = inside / size
    explained = size * (classes - size) / classes * (inside - others) ** 2
    fits = (others <= outside * inside + ROUNDING) & (size < classes)
    explained = torch.where(fits, explained, -1.0)
    explained[:, size == classes] = 0.0
    return explained.argmax(1)


def check_count(count: int | None, classes: int) -> None:
    """Raise unless there can be so many families of classes."""
    if count is not None and not 1 <= count <= classes:
        raise TorchsliceError(f"count must be 1 to {classes}, the number of classes; got {count}.")


def check_outside(outside: float) -> None:
    """Raise unless it is a fraction below 1."""
    if not 0 <= outside < 1:
        raise TorchsliceError(f"outside must be in [0, 1), got {outside}.")
