"""Figures: each function draws on the axes that it is given, and returns them.

Shapes: C classes, N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.cluster import hierarchy
from torch import Tensor

from ..errors import TorchsliceError
from ..find.semantic import Groups
from ..registry import unknown
from ..training.outcome import Row

COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#999999")  # colour-blind readers tell them apart too
SHARING = ("one class", "some classes", "all classes", "none")


def tree(axes: Any, groups: Groups) -> Any:
    """Draw the tree of the classes: those that the same neurons serve are joined first.

    >>> from matplotlib.figure import Figure
    >>> axes = tree(Figure().subplots(), ts.semantic.groups(neurons, scores))
    """
    if len(groups.classes) > 1:
        colour = {"color_threshold": 0, "above_threshold_color": COLOURS[0]}
        hierarchy.dendrogram(
            groups.linkage.numpy(), labels=groups.classes, ax=axes, orientation="left", leaf_font_size=9, **colour
        )
        axes.invert_yaxis()
    axes.set_xlabel("1 - correlation")
    axes.spines[["top", "right", "left"]].set_visible(False)
    return axes


def overlap(axes: Any, groups: Groups, layer: str | None = None) -> Any:
    """Draw which classes share neurons, in one layer or in all: see `overlaps`."""
    axes.imshow(arranged(groups, layer).numpy(), vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(groups.order)), groups.order, rotation=90)
    axes.set_yticks(range(len(groups.order)), groups.order)
    axes.set_title(layer or "all layers")
    return axes


def sharing(axes: Any, groups: Groups) -> Any:
    """Draw how many neurons of every layer serve one class, some, all, or none."""
    counts = sharing_of(groups)
    left = torch.zeros(len(counts))
    for number, name in enumerate(SHARING):
        shares = torch.tensor([of[number] / max(sum(of), 1) for of in counts.values()])
        axes.barh([*counts], shares, left=left, color=COLOURS[number], label=name)
        left = left + shares
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="fraction of the neurons that serve")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
    return axes


def training(axes: Any, rows: Sequence[Row]) -> Any:
    """Draw accuracy over the epochs of a training, from the rows that `fit` returns."""
    if not rows:
        raise TorchsliceError("there is no finished epoch to draw.")
    for key, colour in (("train_accuracy", COLOURS[1]), ("validation_accuracy", COLOURS[0])):
        known = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
        if known:
            axes.plot(*zip(*known, strict=True), color=colour, marker=".", label=key.replace("_", " "))
    axes.set(xlabel="epoch", ylim=(None, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return axes


def serving(groups: Groups, layer: str | None = None) -> Tensor:
    """Return which classes the neurons of a layer, or of all, serve: bool [N, C]."""
    widths = groups.unused.layers
    if layer is not None:
        check_layer(layer, widths)
    found = torch.zeros(sum(widths.values()) if layer is None else widths[layer], len(groups.classes), dtype=torch.bool)
    for group in groups:
        masks = group.slice.masks
        mask = torch.cat([*masks.values()]) if layer is None else masks[layer]
        found |= mask[:, None] & torch.tensor([name in group.classes for name in groups.classes])
    return found


def check_layer(layer: str, layers: Mapping[str, Any]) -> None:
    """Raise unless there is a layer of that name."""
    if layer not in layers:
        raise unknown("layer", layer, layers)


def overlaps(groups: Groups, layer: str | None = None) -> Tensor:
    """Return of two classes the neurons that serve both, as a fraction of those that serve any: float64 [C, C]."""
    member = serving(groups, layer).double()
    both, size = member.T @ member, member.sum(0)
    return both / (size[:, None] + size - both).clamp(min=1)


def arranged(groups: Groups, layer: str | None = None) -> Tensor:
    """Return the overlaps with the classes in the order of the tree, float64 [C, C]."""
    at = [groups.classes.index(name) for name in groups.order]
    return overlaps(groups, layer)[at][:, at]


def sharing_of(groups: Groups) -> Mapping[str, list[int]]:
    """Return of every layer how many neurons serve one class, some, all, or none."""
    every, found = len(groups.classes), {}
    for layer in groups.unused.layers:
        served = serving(groups, layer).sum(1)
        kinds = (served == 1, (served > 1) & (served < every), served == every, served == 0)
        found[layer] = [int(kind.sum()) for kind in kinds]
    return found
