"""The neurons of a model: what can be sliced, what hangs together, and what is pinned and why."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..errors import TorchsliceError
from ..inputs import Inputs, Output, device_of, run, to_device
from ..registry import unknown
from ..slices import Slice
from .flow import Flow, Zeros
from .layers import Flags, Ids
from .record import Assumption
from .tied import closed, mean_scores, sets_of


@dataclass(frozen=True)
class Layer:
    """A layer whose neurons can be sliced.

    Attributes:
        name: of the sub-module.
        kind: "conv", "linear" or "heads".
        count: N, its neurons.
        axis: axis of its output that counts neurons: 1 for a convolution, -1 for a linear layer.
        mask_after: the sub-module whose output is zero when a neuron is held: the norm that follows, else the layer.
        followers: depthwise convolutions (or the norms after them) that live and die with this layer's neurons.
        coupled: layers with neurons that can only be removed together with neurons of this one.
        stays: why its neurons leave rows of zeros behind when they are cut; "" where they go.
    """

    name: str
    kind: str
    count: int
    axis: int
    mask_after: str
    followers: tuple[str, ...] = ()
    coupled: tuple[str, ...] = ()
    stays: str = ""


@dataclass(eq=False, repr=False)
class Neurons:
    """The neurons of one model, as found by `find_neurons`; prints as a table.

    Attributes:
        model: the model itself.
        layers: name of each sliceable layer -> Layer, in forward order.
        rows: of each sliceable layer, which neuron each row of its weight belongs to, int [outputs]; -1 for rows that
            follow, such as those of the queries and keys of a head.
        followers: layers without neurons of their own, such as depthwise convolutions -> the layers that they follow.
        pinned: every other layer -> the reason why it cannot be cut.
        head: layers whose outputs are the logits; () if something comes after them.
        num_classes: C, the number of logits.
        classes: their names, if they were given.
        output: how the logits are picked from the model's result, see `inputs.logits_of`.
        flow, wires: how channels hang together, see flow.py.
        assumptions: what the model read from its input while it was looked at; other inputs may lead elsewhere.
    """

    model: nn.Module
    sample: Inputs
    layers: dict[str, Layer]
    rows: dict[str, Ids]
    followers: dict[str, tuple[str, ...]]
    pinned: dict[str, str]
    head: tuple[str, ...]
    num_classes: int
    flow: Flow
    wires: Any
    classes: tuple[str, ...] | None = None
    output: Output = None
    assumptions: tuple[Assumption, ...] = ()

    def __post_init__(self) -> None:
        self._structure = _structure(self.model)
        if self.classes is not None and (
            len(self.classes) != self.num_classes or len(set(self.classes)) < self.num_classes
        ):
            raise TorchsliceError(
                f"the model has {self.num_classes} logits, and {len(set(self.classes))} different classes are named "
                f"({', '.join(self.classes[:10])}); name each once, in the order of the logits."
            )

    # -- the model ------------------------------------------------------------------------------------------------
    @property
    def example(self) -> Inputs:
        """The example batch, on the model's device."""
        return to_device(self.sample, device_of(self.model))

    def logits(self, inputs: Inputs) -> Tensor:
        """Run the model on inputs and return its logits, [B, C]."""
        return run(self.model, inputs, self.output)

    def on(self, model: nn.Module) -> Neurons:
        """Return the same neurons for another network of the same structure, such as a copy that was trained.

        >>> import copy
        >>> neurons.on(copy.deepcopy(model)).layers == neurons.layers
        True
        """
        _compare(_structure(model), self._structure, "this network is not the one whose neurons were found")
        found = Neurons.__new__(Neurons)
        found.__dict__.update(self.__dict__, model=model, _structure=_structure(model))
        return found

    def check_unchanged(self) -> None:
        """Raise if layers of the model were replaced or resized since its neurons were found."""
        now = _structure(self.model)
        _compare(now, self._structure, "the model was changed after find_neurons")
        for name, (module, _) in now.items():
            if module is not self._structure[name][0]:
                raise TorchsliceError(
                    f"the model was changed after find_neurons: {name!r} is another module now. Find its neurons again."
                )

    # -- channels -------------------------------------------------------------------------------------------------
    def wires_of(self, layer: str) -> Ids:
        """Return the wire of every neuron of a layer, int [N]."""
        rows = self.rows[layer]
        first = np.unique(rows, return_index=True)[1][-self.layers[layer].count :]
        return self.wires[self.flow.ports[layer].outs[first]]

    def places(self, layer: str) -> Tensor:
        """Return the rows of every neuron of a layer, int64 [N, k]; -1 where it has fewer than k."""
        rows = torch.from_numpy(self.rows[layer])
        counts = rows[rows >= 0].bincount()
        places = torch.full((len(counts), int(counts.max())), -1)
        order = rows.argsort(stable=True)[int((rows < 0).sum()) :]
        places[torch.arange(places.shape[1]) < counts[:, None]] = order
        return places

    def steps(self, round_to: int) -> dict[str, int]:
        """Return the least number of neurons of each layer that has a multiple of so many rows, {layer: number}."""
        rows = {name: int((self.rows[name] >= 0).sum()) // layer.count for name, layer in self.layers.items()}
        return {name: round_to // math.gcd(round_to, own) for name, own in rows.items()}

    def zeros(self, held: Mapping[str, Flags]) -> Zeros:
        """Follow the zeros of held neurons, {layer: bool [N]}, or of held rows of layers that have no neurons.

        Held as well are rows that follow these neurons, such as the queries of a head whose values are zero.
        """
        rows = {name: self.by_row(name, flags) for name, flags in held.items()}
        found = self.flow.zeros(rows | self.flow.free(rows))
        needed = np.zeros(int(self.wires.max(initial=0)) + 1, dtype=bool)
        needed[self.wires[found.needed]] = True
        for name in (*self.layers, *self.followers):
            port = self.flow.ports[name]
            if port.makes_neurons:
                follow = self.rows[name] < 0 if name in self.rows else np.ones(len(port.outs), dtype=bool)
                idle = follow & ~needed[self.wires[port.outs]]
                if idle.any():
                    found.held[name] = found.held.get(name, np.zeros_like(idle)) | idle
        found.held.update(self.flow.free(found.held))
        return found

    def by_row(self, layer: str, values: Any, other: Any = False) -> Any:
        """Return values of a layer's neurons, [N], by row, [outputs]; rows that follow get another value."""
        if layer not in self.rows:
            return values
        rows = self.rows[layer]
        return np.where(rows < 0, other, np.asarray(values)[rows])

    def stay(self, layer: str, rows: Flags) -> Tensor:
        """Return which neurons of a layer have rows among some, bool [outputs] -> bool [N]."""
        found = torch.zeros(self.layers[layer].count, dtype=torch.bool)
        found[self.rows[layer][rows & (self.rows[layer] >= 0)]] = True
        return found

    # -- slices ---------------------------------------------------------------------------------------------------
    def full(self) -> Slice:
        """Return the slice of all neurons."""
        return Slice({name: torch.ones(layer.count, dtype=torch.bool) for name, layer in self.layers.items()})

    def none(self) -> Slice:
        """Return the empty slice."""
        return ~self.full()

    @cached_property
    def sets(self) -> dict[str, Tensor]:
        """Which neurons leave together: the number of the set that each is in, {layer: int64 [N]}, see tied.py."""
        return sets_of(self.flow, self.wires, {name: self.wires_of(name) for name in self.layers})

    def closed(self, slice_: Slice) -> Slice:
        """Add to a slice all neurons that leave together with one in it, so that the network is as small as its slice.

        >>> slices["3"] <= neurons.closed(slices["3"])
        True
        """
        self.check(slice_)
        return closed(self.sets, slice_)

    def random(self, neuron_fraction: float, *, tied: bool = True, seed: int = 0) -> Slice:
        """Return a slice with a random fraction in (0, 1] of every layer's neurons, at least one each.

        Args:
            tied: choose neurons that leave together as one, so that the network is as small as its slice.

        >>> neurons.random(0.5)
        Slice(56 of 112 neurons, 50.0%, in 6 layers)
        """
        if not 0 < neuron_fraction <= 1:
            raise TorchsliceError(f"neuron_fraction must be in (0, 1], got {neuron_fraction}.")
        generator, masks = torch.Generator().manual_seed(seed), {}
        places = {n: torch.randperm(layer.count, generator=generator).argsort() for n, layer in self.layers.items()}
        for name, place in (mean_scores(self.sets, places) if tied else places).items():
            kept = place.argsort(stable=True)[: max(1, round(neuron_fraction * len(place)))]
            masks[name] = torch.zeros(len(place), dtype=torch.bool).index_fill_(0, kept, True)
        return closed(self.sets, Slice(masks)) if tied else Slice(masks)

    def check(self, slice_: Slice) -> None:
        """Raise unless `slice_` is a slice of this model, as it is now, that keeps a neuron in every layer."""
        if not isinstance(slice_, Slice):
            raise TorchsliceError(f"expected a Slice, got {type(slice_).__name__}.")
        self.check_unchanged()
        mine, theirs = {n: layer.count for n, layer in self.layers.items()}, slice_.layers
        if mine != theirs:
            odd = next(n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n))
            raise TorchsliceError(
                f"this is a slice of another model: layer {odd!r} has {theirs.get(odd, 'no')} neurons in the slice and "
                f"{mine.get(odd, 'no')} in the model. Find the slice on this model."
            )
        if empty := slice_.empty_layers():
            what = "is empty" if len(empty) == len(mine) else f"keeps no neuron of layer {empty[0]!r}"
            raise TorchsliceError(
                f"the slice {what}; every layer needs at least one neuron. Lower the threshold or join another slice."
            )

    def class_indices(self, classes: Sequence[str | int]) -> list[int]:
        """Return the indices of some classes, given by name or by index, in the order of the logits."""
        found = []
        for given in classes:
            if isinstance(given, str):
                if self.classes is None:
                    raise TorchsliceError(
                        f"class {given!r} cannot be found: the classes of this model have no names. Give indices in "
                        f"0..{self.num_classes - 1}, or names to find_neurons(model, example, classes=[...])."
                    )
                if given not in self.classes:
                    raise unknown("class", given, self.classes)
                given = self.classes.index(given)
            found.append(index(given) if hasattr(given, "__index__") and not isinstance(given, bool) else -1)
        if not found or len(set(found)) < len(found) or not all(0 <= label < self.num_classes for label in found):
            raise TorchsliceError(
                f"classes must be different names, or indices in 0..{self.num_classes - 1}; got {list(classes)}."
            )
        return sorted(found)

    # -- printing -------------------------------------------------------------------------------------------------
    def __len__(self) -> int:
        return sum(layer.count for layer in self.layers.values())

    def __str__(self) -> str:
        counts = f"{len(self.followers)} layers follow, {len(self.pinned)} are pinned"
        table = Table(title=f"{len(self)} neurons in {len(self.layers)} layers; {counts}", title_justify="left")
        for column in ("layer", "kind", "neurons", "coupled with / why not"):
            table.add_column(column, justify="right" if column == "neurons" else "left", overflow="fold")
        for layer in self.layers.values():
            zero_rows = f"become rows of zeros: {layer.stays}" if layer.stays else ""
            table.add_row(layer.name, layer.kind, str(layer.count), zero_rows or _few(layer.coupled))
        for name, sources in self.followers.items():
            table.add_row(name, "follower", "", f"follows {_few(sources)}", style="dim")
        for name, reason in self.pinned.items():
            table.add_row(name or "(model)", "pinned", "", reason, style="dim")
        for assumption in self.assumptions:
            table.add_row(assumption.module or "(model)", "assumed", "", str(assumption), style="dim")
        console = Console(file=io.StringIO(), width=120)
        console.print(table)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    __repr__ = __str__


def check_neurons(neurons: Neurons) -> None:
    """Raise unless these are neurons of a model that is still as it was when they were found."""
    if not isinstance(neurons, Neurons):
        raise TorchsliceError(
            f"expected neurons, got {type(neurons).__name__}; find them first: find_neurons(model, example)."
        )
    neurons.check_unchanged()


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


Structure = dict[str, tuple[nn.Module, tuple[tuple[str, torch.Size], ...]]]


def _structure(model: nn.Module) -> Structure:
    """Return every sub-module with the shapes of its parameters."""
    return {
        name: (module, tuple((key, p.shape) for key, p in module._parameters.items() if p is not None))
        for name, module in model.named_modules()
    }


def _compare(now: Structure, before: Structure, what: str) -> None:
    for name in {**before, **now}:
        one, other = now.get(name), before.get(name)
        if one is None or other is None or type(one[0]) is not type(other[0]) or one[1] != other[1]:
            given, found = (
                "nothing"
                if side is None
                else f"{type(side[0]).__name__}({', '.join(f'{key} {list(shape)}' for key, shape in side[1])})"
                for side in (one, other)
            )
            raise TorchsliceError(f"{what}: {name!r} is {given} now and was {found}. Find its neurons again.")
