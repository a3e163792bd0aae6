"""How critical neurons are chosen by their contributions, four strategies with one interface, and what they find.

Shapes: C classes, N neurons of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...data import Task
from ...errors import TorchsliceError
from ...graph.neurons import Neurons
from ...registry import unknown
from ...slices import Slice
from ...tables import percent, table
from .contributions import Contributions, check_scores, contributions
from .grams import Similarity, similarity
from .groups import OUTSIDE, check_outside, find_groups
from .selection import complete, first_to_reach, in_order, prefix_cka, prefix_mass, top_fraction
from .whole import complete_network

CRITERIA = ("cka", "mass")
LEAST = 1e-3  # of theta in a layer

Scores = Mapping[str, Tensor]  # {layer: contributions [C, N]}
Masks = dict[str, Tensor]  # {layer: critical neurons of the classes, bool [C, N]}


@dataclass(frozen=True, eq=False)
class SemanticSlices(Mapping[str, Slice]):
    """The slice of every class, by name, with what belongs to all classes; prints as a table.

    Attributes:
        strategy: how the neurons were chosen, and `metric`, by which contributions.
        slices: {class: slice}; `semantic["cat"]` is one of them.
        critical: all critical neurons: the union of the class slices and, with `ReachTheta`, what had to be added so
            that each layer reaches theta on the samples of all classes together; from `class_slices` also what had to
            be added so that the network's logits do.

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

    def summary(self) -> dict[str, Any]:
        """Return how the slices were found, and the neuron retention of each, as JSON-able data."""
        strategy = {"strategy": type(self.strategy).__name__, **asdict(self.strategy)}
        kept = {name: slice_.neuron_retention for name, slice_ in self.items()}
        retention = {"critical": self.critical.neuron_retention, "classes": kept}
        return {"strategy": strategy, "metric": self.metric, "neuron_retention": retention}

    def __repr__(self) -> str:
        kept, rows = [slice_.neuron_retention for slice_ in self.values()], []
        for layer, width in self.critical.layers.items():
            mean = fmean(int(slice_[layer].sum()) for slice_ in self.values())
            rows.append((layer, width, int(self.critical[layer].sum()), f"{mean:.1f}"))
        spread = f"{percent(fmean(kept))} ({percent(min(kept))} to {percent(max(kept))})"
        last = f"class slices keep {spread} of the neurons, all together {percent(self.critical.neuron_retention)}"
        columns = ("layer", "neurons", "critical", "mean of classes")
        return "\n".join([f"{self.strategy} by {self.metric}", table(columns, rows), last])


@dataclass(frozen=True)
class Strategy:
    """A way to choose critical neurons. Every class gets at least one neuron of every layer.

    NeuSemSlice (arXiv 2407.20281) names three slicers: semantic (`ReachTheta`, `ByGroup`), category-wise (`PerClass`)
    and global (`PerLayer`). How much is enough, and how classes are joined, are definitions of torchslice.
    """

    def __post_init__(self) -> None:
        for name in ("theta", "neuron_fraction"):
            if not 0 < (value := getattr(self, name, 1)) <= 1:
                raise TorchsliceError(f"{name} must be in (0, 1], got {value}.")

    @property
    def compares(self) -> bool:
        """Whether the strategy needs similarities beside contributions."""
        return False

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
        if self.compares and similarity is None:
            raise TorchsliceError(
                f"{self} needs similarities: give similarity(neurons, task, scores), or call class_slices, which "
                "measures them."
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
    """

    theta: float = 0.95
    slope: float = 1.0
    criterion: str = "cka"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.criterion not in CRITERIA:
            raise unknown("criterion", self.criterion, CRITERIA)
        if not 0 <= self.slope < math.inf:
            raise TorchsliceError(f"slope must be a number of at least 0, got {self.slope}.")

    @property
    def compares(self) -> bool:
        return self.criterion == "cka"

    def masks(self, scores: Scores, metric: str, similarity: Similarity | None) -> tuple[Masks, Masks]:
        masks, critical = {}, {}
        for number, (layer, of) in enumerate(scores.items(), start=1):
            missing = (1 - self.theta) * (self.slope + 1) * ((number - 0.5) / len(scores)) ** self.slope
            theta, orders, together = max(1 - missing, LEAST), in_order(of), of.mean(0)
            if similarity is not None and self.compares:
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


@dataclass(frozen=True)
class ByGroup(Strategy):
    """The neurons of the semantic groups that serve a class, see `groups`.

    Attributes:
        outside: in [0, 1): what a neuron may contribute to others, of what it contributes to the classes it serves.
    """

    outside: float = OUTSIDE

    def __post_init__(self) -> None:
        check_outside(self.outside)

    def per_class(self, scores: Scores) -> Masks:
        classes = len(next(iter(scores.values())))
        _, sets, serves = find_groups(scores, self.outside, classes)
        none = torch.zeros(1, classes, dtype=torch.bool)  # is what an unused neuron, set -1, serves
        served = {layer: torch.cat([sets, none])[of].T for layer, of in serves.items()}  # [C, N]
        return {layer: mask | top_fraction(scores[layer], LEAST / mask.shape[1]) for layer, mask in served.items()}


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
    if not isinstance(strategy, Strategy):
        raise TorchsliceError(f"strategy must be one such as ReachTheta(0.95), got {strategy!r}.")
    if scores is None:
        scores = contributions(neurons, task, metric=metric or "taylor", seed=seed, progress=progress)
    check_scores(scores, neurons, task)
    metric, alike = scores.the_metric(metric), None
    scores = scores.tied(neurons) if tied else scores
    if strategy.compares:
        alike = similarity(neurons, task, scores, batch_size=batch_size, progress=progress)
    found = strategy.choose(scores, metric, alike)
    if isinstance(strategy, ReachTheta) and alike is not None:
        more = complete_network(neurons, task, scores[metric], found.critical, strategy.theta, scores.samples)
        found = replace(found, critical=more)
    if not tied:
        return found
    slices = {name: neurons.closed(slice_) for name, slice_ in found.items()}
    return replace(found, slices=slices, critical=neurons.closed(found.critical))
