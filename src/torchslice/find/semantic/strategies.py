"""How critical neurons are chosen by their contributions, three strategies with one interface, and what they find.

Shapes: C classes, N neurons of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from statistics import fmean
from typing import Any

import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

from ...data import Task
from ...errors import TorchsliceError
from ...graph.neurons import Neurons
from ...registry import unknown
from ...slices import Slice, union
from ...tables import percent, table
from .contributions import Contributions, contributions
from .grams import POSITIONS, Similarity, similarity
from .selection import complete, first_to_reach, in_order, prefix_cka, prefix_mass, top_fraction

CRITERIA = ("cka", "mass")
LEAST = 1e-3  # of theta in a layer
CUT = 0.5  # classes share a group as long as their critical neurons overlap by so much on average
ROUNDING = 1e-9  # by which an overlap may miss that

Scores = Mapping[str, Tensor]  # {layer: contributions [C, N]}
Masks = dict[str, Tensor]  # {layer: critical neurons of the classes, bool [C, N]}


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

    >>> slices["3"] | slices["8"] <= slices.critical, len(slices)
    (True, 10)
    """

    strategy: Strategy
    metric: str
    slices: dict[str, Slice]
    critical: Slice

    def __getitem__(self, name: str) -> Slice:
        return self.slices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.slices)

    def __len__(self) -> int:
        return len(self.slices)

    @cached_property
    def overlap(self) -> dict[str, Tensor]:
        """Jaccard overlaps of the classes' critical neurons in every layer, {layer: float64 [C, C]}."""
        return {layer: jaccard(torch.stack([s[layer] for s in self.values()])) for layer in self.critical.layers}

    @cached_property
    def linkage(self) -> dict[str, Tensor]:
        """The tree of the classes in every layer, {layer: float64 [C - 1, 4]}.

        Each row is a merger as scipy writes it: the two clusters, their distance, and the number of classes in both.
        """
        return {layer: tree(overlaps) for layer, overlaps in self.overlap.items()}

    @cached_property
    def groups(self) -> dict[str, tuple[Group, ...]]:
        """The semantic groups of every layer, which the tree gives."""
        found, classes = {}, tuple(self)
        for layer, linkage in self.linkage.items():
            names = [tuple(classes[label] for label in members) for members in groups_of(linkage)]
            found[layer] = tuple(Group(group, union(self[name] for name in group)) for group in names)
        return found

    def summary(self) -> dict[str, Any]:
        """Return how the slices were found, and the neuron retention of each, as JSON-able data."""
        strategy = {"strategy": type(self.strategy).__name__, **asdict(self.strategy)}
        kept = {name: slice_.neuron_retention for name, slice_ in self.items()}
        retention = {"critical": self.critical.neuron_retention, "classes": kept}
        return {"strategy": strategy, "metric": self.metric, "neuron_retention": retention}

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

    def __repr__(self) -> str:
        kept, rows = [slice_.neuron_retention for slice_ in self.values()], []
        for layer, width in self.critical.layers.items():
            mean = fmean(int(slice_[layer].sum()) for slice_ in self.values())
            rows.append((layer, width, int(self.critical[layer].sum()), f"{mean:.1f}", len(self.groups[layer])))
        spread = f"{percent(fmean(kept))} ({percent(min(kept))} to {percent(max(kept))})"
        last = f"class slices keep {spread} of the neurons, all together {percent(self.critical.neuron_retention)}"
        columns = ("layer", "neurons", "critical", "mean of classes", "groups")
        return "\n".join([f"{self.strategy} by {self.metric}", table(columns, rows), last])


def jaccard(masks: Tensor) -> Tensor:
    """Return the Jaccard overlaps |a & b| / |a | b| of the rows of masks, bool [C, N] -> float64 [C, C] in [0, 1]."""
    both = masks.double() @ masks.double().T
    sizes = masks.sum(1)
    either = sizes[:, None] + sizes - both
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def tree(overlaps: Tensor) -> Tensor:
    """Cluster classes by average linkage of the distance 1 - overlap: float64 [C, C] -> mergers [C - 1, 4]."""
    if len(overlaps) == 1:
        return torch.zeros(0, 4, dtype=torch.float64)
    return torch.from_numpy(hierarchy.linkage(squareform((1 - overlaps).numpy(), checks=False), "average"))


def groups_of(linkage: Tensor, cut: float = CUT) -> list[list[int]]:
    """Cut a tree [C - 1, 4] where the mean overlap falls below `cut`: classes by group, in the order of the classes."""
    if len(linkage) == 0:
        return [[0]]
    members: dict[int, list[int]] = {}
    for label, group in enumerate(hierarchy.fcluster(linkage.numpy(), 1 - cut + ROUNDING, "distance")):
        members.setdefault(int(group), []).append(label)
    return list(members.values())


@dataclass(frozen=True)
class Strategy:
    """A way to choose critical neurons. Every class gets at least one neuron of every layer.

    NeuSemSlice (arXiv 2407.20281) names three slicers: semantic (`ReachTheta`), category-wise (`PerClass`) and global
    (`PerLayer`). How much is enough, and how classes are joined, are definitions of torchslice.
    """

    def __post_init__(self) -> None:
        for name in ("theta", "neuron_fraction"):
            if not 0 < (value := getattr(self, name, 1)) <= 1:
                raise TorchsliceError(f"{name} must be in (0, 1], got {value}.")

    @property
    def compares(self) -> str | None:
        """The positions whose similarity the strategy needs; None if it needs contributions only."""
        return None

    def choose(
        self, scores: Contributions, metric: str | None = None, similarity: Similarity | None = None
    ) -> SemanticSlices:
        """Return the slices that follow from contributions, and from similarities where the strategy needs them.

        Args:
            metric: which of the contributions; needed when there are several.
            similarity: what `similarity(neurons, task, scores)` returned, for `ReachTheta`. It serves every theta.

        >>> PerClass(neuron_fraction=0.2).choose(scores)["3"].neuron_retention < 0.25
        True
        """
        metric = scores.the_metric(metric)
        if self.compares and (similarity is None or similarity.positions != self.compares):
            raise TorchsliceError(
                f"{self} needs similarities: give similarity(neurons, task, scores, positions={self.compares!r}), "
                "or call class_slices, which measures them."
            )
        masks, critical = self.masks(scores[metric], metric, similarity)
        slices = [Slice({layer: mask[label] for layer, mask in masks.items()}) for label in range(len(scores.classes))]
        return SemanticSlices(self, metric, dict(zip(scores.classes, slices, strict=True)), Slice(critical))

    def masks(self, scores: Scores, metric: str, similarity: Similarity | None) -> tuple[Masks, Masks]:
        """Return the critical neurons of every class, {layer: bool [C, N]}, and of all classes, {layer: bool [N]}."""
        masks = self.per_class(scores)
        return masks, {layer: mask.any(0) for layer, mask in masks.items()}

    def per_class(self, scores: Scores) -> Masks:
        """Return the critical neurons of every class by contributions alone."""
        raise NotImplementedError


@dataclass(frozen=True)
class ReachTheta(Strategy):
    """Per class and layer the first neurons that reach theta, then more until their union reaches it too.

    A layer that is constant for a class is kept whole.

    Attributes:
        theta: in (0, 1]; the mean over the layers of what they must reach.
        slope: of theta over depth, at least 0: early layers, which all that follows rests on, must reach more than late
            ones. Layer l = 1..L must reach 1 - (1 - theta) * (slope + 1) * ((l - 1/2) / L)^slope; 0 is theta for all.
        criterion: "cka" is the similarity to the whole layer, "mass" the fraction of all contribution.
        positions: what "cka" compares, whole maps ("all") or their means ("mean"), see `similarity`.
    """

    theta: float = 0.95
    slope: float = 1.0
    criterion: str = "cka"
    positions: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind, known in (("criterion", CRITERIA), ("positions", POSITIONS)):
            if getattr(self, kind) not in known:
                raise unknown(kind, getattr(self, kind), known)
        if not 0 <= self.slope < math.inf:
            raise TorchsliceError(f"slope must be a number of at least 0, got {self.slope}.")

    @property
    def compares(self) -> str | None:
        return self.positions if self.criterion == "cka" else None

    def masks(self, scores: Scores, metric: str, similarity: Similarity | None) -> tuple[Masks, Masks]:
        masks, critical = {}, {}
        for number, (layer, of) in enumerate(scores.items(), start=1):
            missing = (1 - self.theta) * (self.slope + 1) * ((number - 0.5) / len(scores)) ** self.slope
            theta, orders, together = max(1 - missing, LEAST), in_order(of), of.mean(0)
            if similarity is not None and self.criterion == "cka":
                curves = list(similarity.curves[metric][layer])
                of_all = partial(prefix_cka, similarity.pooled[layer])
            else:
                curves = [prefix_mass(row, order) for row, order in zip(of, orders, strict=True)]
                of_all = partial(prefix_mass, together)
            rows = [first_to_reach(order, curve, theta) for order, curve in zip(orders, curves, strict=True)]
            masks[layer] = torch.stack(rows)
            critical[layer] = complete(masks[layer].any(0), together, theta, of_all)
        return masks, critical


@dataclass(frozen=True)
class PerClass(Strategy):
    """The first `neuron_fraction` in (0, 1] of every layer, per class."""

    neuron_fraction: float = 0.5

    def per_class(self, scores: Scores) -> Masks:
        return {layer: top_fraction(of, self.neuron_fraction) for layer, of in scores.items()}


@dataclass(frozen=True)
class PerLayer(Strategy):
    """The first `neuron_fraction` in (0, 1] of every layer by the mean over the classes, which share one slice."""

    neuron_fraction: float = 0.5

    def per_class(self, scores: Scores) -> Masks:
        return {layer: top_fraction(of.mean(0), self.neuron_fraction).expand(of.shape) for layer, of in scores.items()}


def class_slices(
    neurons: Neurons,
    task: Task,
    scores: Contributions | None = None,
    *,
    strategy: Strategy = ReachTheta(),
    metric: str | None = None,
    tied: bool = True,
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = True,
) -> SemanticSlices:
    """Find the critical neurons of every class of a trained network, and those of all classes.

    Args:
        neurons: of any network with the classes of the task; one that was trained with gates goes without them
            (`GatedModel.fold`).
        task: its training split is used, never another.
        scores: from `contributions(neurons, task)`, which is called if there are none, with the `seed`.
        metric: which of the scores; needed when there are several.
        tied: choose neurons that leave together as one, by their mean score, so that networks are as small as slices.

    >>> semantic = class_slices(neurons, task, scores, strategy=ReachTheta(0.9), progress=False)
    >>> small = ts.extract(neurons, semantic["3"] | semantic["8"], classes=["3", "8"])
    """
    if scores is None:
        scores = contributions(neurons, task, metric=metric or "taylor", seed=seed, progress=progress)
    scores.check_of(neurons, task)
    metric, alike, positions = scores.the_metric(metric), None, strategy.compares
    scores = scores.tied(neurons) if tied else scores
    if positions is not None:
        alike = similarity(neurons, task, scores, positions=positions, batch_size=batch_size, progress=progress)
    found = strategy.choose(scores, metric, alike)
    if not tied:
        return found
    slices = {name: neurons.closed(slice_) for name, slice_ in found.items()}
    return replace(found, slices=slices, critical=neurons.closed(found.critical))
