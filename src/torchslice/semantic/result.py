"""What semantic slicing finds, and the rule by which it was found.

Shapes: C classes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..errors import TorchsliceError
from ..registry import unknown
from ..slices import Slice
from ..tables import percent, table
from .grams import POSITIONS
from .merge import groups_of, overlap, tree
from .selection import check_share

SLICERS = ("semantic", "category", "global", "budget")
CRITERIA = ("cka", "mass")
LEAST = 1e-3  # of theta in a layer


@dataclass(frozen=True)
class Rule:
    """How critical neurons are chosen by their contributions.

    Attributes:
        metric: of the contributions.
        slicer: "semantic" takes, per class and layer, the first neurons that reach theta, and checks their union
            against the whole layer; "category" the first `share` per class and layer; "global" the first `share` per
            layer, by the mean contribution over the classes, so that all classes have one slice; "budget" so many per
            class that they are `share` of all neurons, more in early layers than in late ones, and shared less.
        criterion: of the semantic slicer: "cka" is the similarity to the whole layer, "mass" the share of all
            contribution.
        theta: of the semantic slicer, in (0, 1]; the mean over the layers of what they must reach.
        slope: of theta over depth, at least 0: early layers, which all that follows rests on, must reach more than late
            ones. Layer l = 1..L must reach 1 - (1 - theta) * (slope + 1) * ((l - 1/2) / L)^slope; 0 is theta for all.
        share: of the others, in (0, 1].
        taper: of the budget, in (0, 1]: share of the last layer over that of the first.
        positions: of the criterion "cka", see `prefix_similarity`.
    """

    metric: str
    slicer: str = "semantic"
    criterion: str = "cka"
    theta: float = 0.95
    slope: float = 1.0
    share: float = 0.5
    taper: float = 0.1
    positions: str = "all"

    def __post_init__(self) -> None:
        for kind, known in (("slicer", SLICERS), ("criterion", CRITERIA), ("positions", POSITIONS)):
            if getattr(self, kind) not in known:
                raise unknown(kind, getattr(self, kind), known)
        check_share("theta", self.theta)
        check_share("share", self.share)
        check_share("taper", self.taper)
        if not 0 <= self.slope < math.inf:
            raise TorchsliceError(f"slope must be a number of at least 0, got {self.slope}.")

    @property
    def by_similarity(self) -> bool:
        """Whether the rule needs the activations of the model, not only the contributions."""
        return self.slicer == "semantic" and self.criterion == "cka"

    def theta_of(self, layer: int, layers: int) -> float:
        """Return what layer number `layer` = 0, 1, ... of so many must reach, in (0, 1].

        >>> [round(Rule("taylor", theta=0.9, slope=1.0).theta_of(layer, 2), 3) for layer in range(2)]
        [0.95, 0.85]
        """
        missing = (1 - self.theta) * (self.slope + 1) * ((layer + 0.5) / layers) ** self.slope
        return max(1 - missing, LEAST)

    def to_plain(self) -> dict[str, Any]:
        """Return what plays a part in this rule as JSON-able data; `Rule(**plain)` rebuilds it."""
        names = ["criterion", "theta", "slope"] if self.slicer == "semantic" else ["share"]
        names += ["positions"] if self.by_similarity else ["taper"] if self.slicer == "budget" else []
        return {name: getattr(self, name) for name in ("metric", "slicer", *names)}

    def __str__(self) -> str:
        what = f"{self.slicer} slicer, {self.metric} contributions, "
        on_average = f"{self.theta:g}" + (f" on average, slope {self.slope:g}" if self.slope else "")
        if self.by_similarity:
            return f"{what}CKA of {'position means' if self.positions == 'mean' else 'whole maps'} >= {on_average}"
        if self.slicer == "budget":
            return what + f"{self.share:.1%} of all neurons per class, taper {self.taper:g}"
        return what + (f"mass >= {on_average}" if self.slicer == "semantic" else f"the first {self.share:.0%}")


@dataclass(frozen=True)
class Group:
    """Classes whose critical neurons in a layer overlap, and the union of their slices."""

    classes: tuple[str, ...]
    part: Slice


@dataclass(frozen=True, eq=False)
class SemanticSlices:
    """What semantic slicing finds in a network; prints as a table.

    Attributes:
        rule: how it was found.
        by_class: the slice of every class.
        critical: all critical neurons: the union of the class slices and, with the semantic slicer, what had to be
            added so that each layer reaches theta on the data of all classes together.
        groups: the semantic groups of every layer, {layer: groups}.
        overlap: Jaccard overlaps of the classes' critical neurons in every layer, {layer: float64 [C, C]}.
        linkage: the tree of the classes that gave the groups, as scipy writes it, {layer: float64 [C - 1, 4]}.
    """

    rule: Rule
    by_class: dict[str, Slice]
    critical: Slice
    groups: dict[str, tuple[Group, ...]]
    overlap: dict[str, Tensor]
    linkage: dict[str, Tensor]

    @classmethod
    def of(cls, rule: Rule, by_class: Mapping[str, Slice], critical: Slice) -> SemanticSlices:
        """Cluster the classes layer by layer."""
        classes, groups = tuple(by_class), {}
        overlaps = {layer: overlap(torch.stack([s[layer] for s in by_class.values()])) for layer in critical.layers}
        trees = {layer: tree(overlaps[layer]) for layer in overlaps}
        for layer, linkage in trees.items():
            names = [tuple(classes[label] for label in members) for members in groups_of(linkage)]
            groups[layer] = tuple(
                Group(members, reduce(operator.or_, [by_class[name] for name in members])) for members in names
            )
        return cls(rule, dict(by_class), critical, groups, overlaps, trees)

    def summary(self) -> dict[str, Any]:
        """Return the rule and the neuron retention of every slice as JSON-able data."""
        shares = {name: part.neuron_retention for name, part in self.by_class.items()}
        kept = {"critical": self.critical.neuron_retention, "classes": shares}
        return {"rule": self.rule.to_plain(), "neuron_retention": kept}

    def to_plain(self) -> dict[str, Any]:
        """Return everything as JSON-able data."""
        return {
            "rule": self.rule.to_plain(),
            "classes": {name: part.to_plain() for name, part in self.by_class.items()},
            "critical": self.critical.to_plain(),
            "groups": {layer: [list(group.classes) for group in groups] for layer, groups in self.groups.items()},
            "overlap": {layer: overlaps.tolist() for layer, overlaps in self.overlap.items()},
            "linkage": {layer: linkage.tolist() for layer, linkage in self.linkage.items()},
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> SemanticSlices:
        """Rebuild what `to_plain` wrote, from the slices."""
        try:
            rule = Rule(**plain["rule"])
            by_class = {str(name): Slice.from_plain(part) for name, part in plain["classes"].items()}
            critical = Slice.from_plain(plain["critical"])
        except (KeyError, TypeError, AttributeError) as error:
            raise TorchsliceError(f"these are no semantic slices ({error!r}); slice the model again.") from error
        return cls.of(rule, by_class, critical)

    def __str__(self) -> str:
        shares = [part.neuron_retention for part in self.by_class.values()]
        rows = []
        for layer, width in self.critical.layers.items():
            mean = fmean(int(part[layer].sum()) for part in self.by_class.values())
            rows.append((layer, width, int(self.critical[layer].sum()), f"{mean:.1f}", len(self.groups[layer])))
        spread = f"{percent(fmean(shares))} ({percent(min(shares))} to {percent(max(shares))})"
        kept = f"class slices keep {spread} of the neurons, all together {percent(self.critical.neuron_retention)}"
        columns = ("layer", "neurons", "critical", "mean of classes", "groups")
        return "\n".join([str(self.rule), table(columns, rows), kept])

    __repr__ = __str__
