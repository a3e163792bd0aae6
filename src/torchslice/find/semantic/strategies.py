"""How critical neurons are chosen by their contributions: four strategies, one interface.

Shapes: C classes, N neurons of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...data import Task
from ...errors import TorchsliceError
from ...graph.neurons import Neurons
from ...registry import unknown
from ...slices import Slice
from .contributions import Contributions, contributions
from .grams import POSITIONS, Similarity, similarity
from .result import STRATEGIES, SemanticSlices
from .selection import balanced, complete, first_to_reach, in_order, prefix_cka, prefix_mass, tapered, top_fraction

CRITERIA = ("cka", "mass")
LEAST = 1e-3  # of theta in a layer

Scores = Mapping[str, Tensor]  # {layer: contributions [C, N]}
Masks = dict[str, Tensor]  # {layer: critical neurons of the classes, bool [C, N]}


@dataclass(frozen=True)
class Strategy:
    """A way to choose critical neurons. Every class gets at least one neuron of every layer.

    NeuSemSlice (arXiv 2407.20281) names three slicers: semantic (`ReachTheta`), category-wise (`PerClass`) and global
    (`PerLayer`). How much is enough, and how classes are joined, are definitions of torchslice, and so is `Budget`.
    """

    def __post_init__(self) -> None:
        for name in ("theta", "neuron_fraction", "taper"):
            value = getattr(self, name, 1)
            if not 0 < value <= 1:
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

        >>> Budget(neuron_fraction=0.2).choose(scores)["3"].neuron_retention < 0.25
        True
        """
        metric = scores.the_metric(metric)
        if self.compares and (similarity is None or similarity.positions != self.compares):
            raise TorchsliceError(
                f"{self} needs similarities: give similarity(neurons, task, scores, positions={self.compares!r}), "
                "or call class_slices, which measures them."
            )
        masks, critical = self.masks(scores[metric], metric, similarity)
        slices = {
            name: Slice({layer: mask[label] for layer, mask in masks.items()})
            for label, name in enumerate(scores.classes)
        }
        return SemanticSlices.of(self, metric, slices, Slice(critical))

    def masks(self, scores: Scores, metric: str, similarity: Similarity | None) -> tuple[Masks, Masks]:
        """Return the critical neurons of every class, {layer: bool [C, N]}, and of all classes, {layer: bool [N]}."""
        masks = self.per_class(scores)
        return masks, {layer: mask.any(0) for layer, mask in masks.items()}

    def per_class(self, scores: Scores) -> Masks:
        """Return the critical neurons of every class by contributions alone."""
        raise NotImplementedError

    def to_plain(self) -> dict[str, Any]:
        """Return the strategy as JSON-able data.

        >>> PerLayer(0.3).to_plain()
        {'strategy': 'PerLayer', 'neuron_fraction': 0.3}
        """
        return {"strategy": type(self).__name__, **asdict(self)}


@STRATEGIES.register("ReachTheta")
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

    def theta_of(self, layer: int, layers: int) -> float:
        """Return what layer number `layer` = 0, 1, ... of so many must reach, in (0, 1].

        >>> [round(ReachTheta(theta=0.9, slope=1.0).theta_of(layer, 2), 3) for layer in range(2)]
        [0.95, 0.85]
        """
        missing = (1 - self.theta) * (self.slope + 1) * ((layer + 0.5) / layers) ** self.slope
        return max(1 - missing, LEAST)

    def masks(self, scores: Scores, metric: str, similarity: Similarity | None) -> tuple[Masks, Masks]:
        masks, critical = {}, {}
        for number, (layer, of) in enumerate(scores.items()):
            theta, orders, together = self.theta_of(number, len(scores)), in_order(of), of.mean(0)
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


@STRATEGIES.register("PerClass")
@dataclass(frozen=True)
class PerClass(Strategy):
    """The first `neuron_fraction` in (0, 1] of every layer, per class."""

    neuron_fraction: float = 0.5

    def per_class(self, scores: Scores) -> Masks:
        return {layer: top_fraction(of, self.neuron_fraction) for layer, of in scores.items()}


@STRATEGIES.register("PerLayer")
@dataclass(frozen=True)
class PerLayer(Strategy):
    """The first `neuron_fraction` in (0, 1] of every layer by the mean over the classes, which share one slice."""

    neuron_fraction: float = 0.5

    def per_class(self, scores: Scores) -> Masks:
        return {layer: top_fraction(of.mean(0), self.neuron_fraction).expand(of.shape) for layer, of in scores.items()}


@STRATEGIES.register("Budget")
@dataclass(frozen=True)
class Budget(Strategy):
    """So many neurons per class that they are a fraction of all, more in early layers, and shared less by classes.

    Attributes:
        neuron_fraction: of all neurons together, in (0, 1].
        taper: the fraction of the last layer over that of the first, in (0, 1].
    """

    neuron_fraction: float = 0.15
    taper: float = 0.1

    def per_class(self, scores: Scores) -> Masks:
        counts = tapered({layer: of.shape[1] for layer, of in scores.items()}, self.neuron_fraction, self.taper)
        return {layer: balanced(of, counts[layer]) for layer, of in scores.items()}


def class_slices(
    neurons: Neurons,
    task: Task,
    scores: Contributions | None = None,
    *,
    strategy: Strategy = ReachTheta(),
    metric: str | None = None,
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = True,
) -> SemanticSlices:
    """Find the critical neurons of every class of a trained network, and those of all classes.

    Args:
        neurons: of any network with the classes of the task; one that was trained with gates goes without them
            (`GatedModel.fold`).
        task: what the contributions were measured on; only training samples are looked at.
        scores: from `contributions(neurons, task)`, which is called if there are none, with the `seed`.
        strategy: `ReachTheta`, `PerClass`, `PerLayer` or `Budget`.
        metric: which of the scores; needed when there are several.
        batch_size: samples per forward pass; the result does not depend on it.

    >>> semantic = class_slices(neurons, task, scores, strategy=ReachTheta(0.9), progress=False)
    >>> small = ts.extract(neurons, semantic["3"] | semantic["8"], classes=["3", "8"])
    """
    if scores is None:
        scores = contributions(neurons, task, metric=metric or "taylor", seed=seed, progress=progress)
    scores.check_of(neurons, task)
    metric, found, positions = scores.the_metric(metric), None, strategy.compares
    if positions is not None:
        found = similarity(neurons, task, scores, positions=positions, batch_size=batch_size, progress=progress)
    return strategy.choose(scores, metric, found)
