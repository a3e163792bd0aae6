"""The neurons of a model: what can be sliced, what hangs together, and what is pinned and why."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..errors import TorchsliceError
from ..slices import Slice
from .flow import Flow


@dataclass(frozen=True)
class Layer:
    """A layer whose neurons can be sliced."""

    name: str
    kind: str  # "conv" or "linear"
    count: int  # N, its neurons
    axis: int  # axis of its output that counts neurons: 1 for a convolution, -1 for a linear layer
    hold: str  # the sub-module whose output is zero when a neuron is held: the norm that follows, else the layer itself
    followers: tuple[
        str, ...
    ] = ()  # depthwise convolutions (or the norms after them) that live and die with this layer's neurons
    coupled: tuple[str, ...] = ()  # layers with neurons that can only be removed together with neurons of this one


class Neurons:
    """The neurons of one model, as found by `find_neurons`.

    `layers` maps the name of each sliceable layer to its Layer, in forward order; `followers` maps depthwise
    convolutions, which have no neurons of their own, to the layers whose neurons they live and die with; `pinned`
    maps every other layer to the reason why it cannot be cut. Printing it gives a table.
    """

    def __init__(
        self,
        layers: dict[str, Layer],
        followers: dict[str, tuple[str, ...]],
        pinned: dict[str, str],
        head: tuple[str, ...],
        classes: int,
        flow: Flow,
        wires: Any,
    ) -> None:
        self.layers = layers
        self.followers = followers
        self.pinned = pinned
        self.head = head  # layers whose outputs are the class scores, () if something comes after them
        self.classes = classes  # C
        self.flow = flow
        self.wires = wires  # int [channels], see flow.py

    # -- slices -------------------------------------------------------------------------------------------------------
    def full(self) -> Slice:
        """Return the slice of all neurons."""
        return Slice({name: torch.ones(layer.count, dtype=torch.bool) for name, layer in self.layers.items()})

    def none(self) -> Slice:
        """Return the empty slice."""
        return ~self.full()

    def random(self, share: float, *, seed: int = 0) -> Slice:
        """Return a slice with a random `share` in (0, 1] of every layer's neurons, at least one each."""
        if not 0 < share <= 1:
            raise TorchsliceError(f"share must be in (0, 1], got {share}.")
        generator = torch.Generator().manual_seed(seed)
        masks = {}
        for name, layer in self.layers.items():
            kept = torch.randperm(layer.count, generator=generator)[: max(1, round(share * layer.count))]
            masks[name] = torch.zeros(layer.count, dtype=torch.bool).index_fill_(0, kept, True)
        return Slice(masks)

    def check(self, part: Slice) -> None:
        """Raise unless `part` is a slice of this model that keeps a neuron in every layer."""
        mine, theirs = {n: layer.count for n, layer in self.layers.items()}, part.layers
        if mine != theirs:
            odd = next(n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n))
            raise TorchsliceError(
                f"this is a slice of another model: layer {odd!r} has {theirs.get(odd, 'no')} neurons in the slice and "
                f"{mine.get(odd, 'no')} in the model. Find the slice on this model."
            )
        if empty := part.empty_layers():
            what = "is empty" if len(empty) == len(mine) else f"keeps no neuron of layer {empty[0]!r}"
            raise TorchsliceError(
                f"the slice {what}; every layer needs at least one neuron. Lower the threshold or join another slice."
            )

    def __len__(self) -> int:
        return sum(layer.count for layer in self.layers.values())

    def __str__(self) -> str:
        counts = f"{len(self.followers)} layers follow, {len(self.pinned)} are pinned"
        table = Table(title=f"{len(self)} neurons in {len(self.layers)} layers; {counts}", title_justify="left")
        for column in ("layer", "kind", "neurons", "coupled with / why not"):
            table.add_column(column, justify="right" if column == "neurons" else "left", overflow="fold")
        for layer in self.layers.values():
            coupled = ", ".join(layer.coupled[:3]) + (
                f" and {len(layer.coupled) - 3} more" if len(layer.coupled) > 3 else ""
            )
            table.add_row(layer.name, layer.kind, str(layer.count), coupled)
        for name, sources in self.followers.items():
            table.add_row(name, "depthwise", "", f"follows {', '.join(sources)}", style="dim")
        for name, reason in self.pinned.items():
            table.add_row(name or "(model)", "pinned", "", reason, style="dim")
        console = Console(file=io.StringIO(), width=120)
        console.print(table)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    __repr__ = __str__
