"""Give a network fresh neurons without changing what it computes: cutting, run backwards.

A new channel is put behind the last channel of those that it is coupled with, in every tensor they pass through. Its
rows are drawn anew; the columns of the rows that were there before are zero where they read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import TorchsliceError
from ..graph.find import find_neurons
from ..graph.layers import Flags, Free, Grouped, Ids, Transposed
from ..graph.neurons import Neurons, check_neurons
from ..graph.plan import tensors_of
from ..graph.views import copy_of, view_of
from ..registry import unknown
from ..slices import Slice
from .extract import check_close


@dataclass(frozen=True, eq=False)
class Widened:
    """A wider network, and how the slices of the narrow one are found in it.

    Attributes:
        neurons: of the wider network, which computes what the narrow one computes.
        places: per layer, which neuron of the narrow network each one is, int64 [N]; -1 for a fresh one.
        fixed: layers that are as wide as before, and why.
    """

    neurons: Neurons = field(repr=False)
    places: dict[str, Tensor] = field(repr=False)
    fixed: dict[str, str]

    @property
    def model(self) -> nn.Module:
        """The wider network."""
        return self.neurons.model

    @property
    def fresh(self) -> Slice:
        """The neurons that were added; the logits do not depend on them yet."""
        return Slice({layer: at < 0 for layer, at in self.places.items()})

    def lift(self, slice_: Slice) -> Slice:
        """Return the same neurons as a slice of the wider network."""
        return Slice({layer: slice_[layer][at.clamp(min=0)] & (at >= 0) for layer, at in self.places.items()})


def widen(
    neurons: Neurons, *, factor: float | None = None, counts: Mapping[str, int] | None = None, seed: int = 0
) -> Widened:
    """Return a copy of a network with more neurons that computes the same.

    Fresh neurons read everything, by weights drawn as PyTorch draws them; every old neuron and logit reads them with
    weights of zero. Coupled layers get the same fresh channels. The copy is checked on the example, and what a slice of
    the old neurons computes stays the same, bit for bit.

    Args:
        factor: above 1; every layer gets so many times its neurons, rounded, one more at least.
        counts: instead of it, how many neurons to add to the layers of these names.
        seed: of the fresh rows.

    Raises TorchsliceError where a layer that is named, or all of them, cannot be widened: groups of a grouped
    convolution must stay equally wide, and some networks write a width into their code.

    >>> wide = widen(neurons, factor=1.25)
    >>> len(wide.fresh), len(wide.lift(slices["3"])) == len(slices["3"])
    (28, True)
    """
    check_neurons(neurons)
    if (factor is None) == (counts is None):
        raise TorchsliceError("give either factor=, such as 1.25, or counts={layer: neurons to add}.")
    fixed = {layer: why for layer in neurons.layers if (why := why_fixed(neurons, layer))}
    if factor is not None:
        if not 1 < factor < 100:
            raise TorchsliceError(f"factor must be above 1 (and below 100), got {factor}.")
        if len(fixed) == len(neurons.layers):
            layer, why = next(iter(fixed.items()))
            raise TorchsliceError(f"no layer of this network can be widened; {layer!r}: {why}.")
        wanted = {name: max(1, round((factor - 1) * layer.count)) for name, layer in neurons.layers.items()}
        counts = {layer: count for layer, count in wanted.items() if layer not in fixed}
    extra: dict[int, int] = {}
    for layer, count in (counts or {}).items():
        if layer not in neurons.layers:
            raise unknown("layer", layer, neurons.layers)
        if count < 1:
            raise TorchsliceError(f"layer {layer!r} must get at least 1 neuron, got {count}.")
        if layer in fixed:
            raise TorchsliceError(f"layer {layer!r} cannot be widened: {fixed[layer]}. Leave it out of counts=.")
        wire = last_wire(neurons, layer)
        extra[wire] = max(count, extra.get(wire, 0))
    wide, places = grow(neurons, extra, seed=seed), {}
    for layer, count in neurons.full().layers.items():
        outs = neurons.flow.ports[layer].outs
        at, new = new_places(outs, neurons.wires, extra) if len(outs) == count else (np.arange(count), np.array(False))
        places[layer] = torch.from_numpy(np.where(new, -1, at))
    return Widened(find_neurons(wide, neurons.example, classes=neurons.classes, output=neurons.output), places, fixed)


def new_places(ids: Ids, wires: Ids, extra: Mapping[int, int]) -> tuple[Ids, Flags]:
    """Return where each of a tensor's channels comes from after widening, int [n'], and which are new, bool [n'].

    `extra` maps coupled channels to the number of channels to add behind them. A channel that lies in several adjacent
    places (a flattened image) is added as often.
    """
    parts, new = [], []
    for run in np.split(np.arange(len(ids)), np.flatnonzero(ids[1:] != ids[:-1]) + 1):
        count = extra.get(int(wires[ids[run[0]]]), 0)
        parts += [run] * (1 + count)
        new += [np.full(len(run), number > 0) for number in range(1 + count)]
    return np.concatenate(parts), np.concatenate(new)


def why_fixed(neurons: Neurons, layer: str) -> str | None:
    """Return why a sliceable layer cannot be widened, or None if it can."""
    flow, wires, wire = neurons.flow, neurons.wires, last_wire(neurons, layer)
    for name, port in flow.ports.items():
        if isinstance(port, Grouped) and any(wire in wires[side] for side in (port.outs, port.ins)):
            return f"{name!r} is a grouped convolution, whose groups must be equally wide"
        if isinstance(port, Transposed) and any(wire in wires[side] for side in (port.outs, port.ins)):
            return f"{name!r} has its rows on the second axis of its weight"
        if isinstance(port, Free) and wire in wires[port.outs]:
            return f"the parameter {name!r} goes with its neurons"
        if len(np.unique(port.outs[wires[port.outs] == wire])) > 1:
            return f"each of its neurons has several rows in {name!r}"
    if any(wire in wires[parts] for parts in flow.even):
        return "it is split into parts, which must be equally wide"
    if any(written.channels is not None and wire in wires[written.channels.ids] for written in flow.written):
        return "an attribute of a module says how wide it is"
    return None


def last_wire(neurons: Neurons, layer: str) -> int:
    """Return the number of the channels coupled with a layer's last one, behind which new ones are put."""
    return int(neurons.wires[neurons.flow.ports[layer].outs[-1]])


def grow(neurons: Neurons, extra: Mapping[int, int], *, seed: int) -> nn.Module:
    """Return a copy of the model with so many channels more behind those of `extra`, its new rows drawn by `seed`.

    The copy is checked: the logits of the model are as before; there may be new ones behind them.
    """
    model = neurons.model
    memo: dict[int, Any] = {}
    sizes: dict[str, dict[str, int]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, port in neurons.flow.ports.items():
            if isinstance(port, Free):
                continue
            outs, new_outs = map(torch.from_numpy, new_places(port.outs, neurons.wires, extra))
            columns = port.outs if port.ins is None else port.ins
            ins, new_ins = map(torch.from_numpy, new_places(columns, neurons.wires, extra))
            if not new_outs.any() and not new_ins.any():
                continue
            for key, tensor in tensors_of(model, name, port).items():
                if tensor is not None and tensor.dim() > 0:
                    wide = tensor.detach().cpu()[outs]
                    if key == "weight":
                        wide = port.grow_columns(wide, ins, new_ins)
                    port.draw(wide, key, new_outs, len(ins))
                    wide = wide.to(tensor.device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    memo[id(tensor)] = nn.Parameter(wide, tensor.requires_grad) if is_parameter else wide
            sizes[name] = port.sizes(len(outs), len(ins), port.groups)
    grown = copy_of(model, memo)
    for name, attributes in sizes.items():
        vars(grown.get_submodule(name)).update(attributes)
    head = neurons.wires[neurons.flow.ports[neurons.head[0]].outs].tolist() if neurons.head else []
    new_logits = sum(extra.get(wire, 0) for wire in head)
    check_close(grown, neurons, view_of(model), "widened", new_logits=new_logits)
    return grown
