"""Plan a cut, and build the plain, smaller copy that it describes.

Nothing here depends on the architecture: a plan says for each layer which channels stay and which of those are zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..slices import Slice
from .layers import Flags, Free, Grouped, Ids, Port, Shift, staying
from .neurons import Neurons, check_neurons
from .views import HOOKS, copy_of


@dataclass(frozen=True)
class LayerPlan:
    """What stays of one layer."""

    port: Port
    outs: Flags  # bool [outputs], rows that stay
    ins: Flags | None  # bool [inputs], columns that stay
    held: Flags  # bool [outputs], rows that are zero where they stay
    zero_ins: Flags | None  # bool [inputs], columns that only ever read zero

    @property
    def whole(self) -> bool:
        """Whether the layer stays as it is."""
        return bool(self.outs.all() and (self.ins is None or self.ins.all()) and not self.held.any())

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The attributes that tell the layer its size after the cut."""
        groups = int(self.outs.reshape(self.port.groups, -1).any(1).sum())
        return self.port.sizes(int(self.outs.sum()), 0 if self.ins is None else int(self.ins.sum()), groups)

    def cut(self, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Return the tensors of the layer after the cut; itself, one that does not change."""
        cut = self.port.cut(tensors, self.outs, self.ins)
        held = self.held[self.outs]
        if held.any():
            cut = {key: tensor.clone() if tensor is tensors[key] else tensor for key, tensor in cut.items()}
            self.port.zero(cut, torch.from_numpy(held))
        return cut


@dataclass(frozen=True)
class Plan:
    """What stays of every layer of a model."""

    layers: dict[str, LayerPlan]
    sizes: dict[tuple[str, str], Any]  # module and attribute -> what it must be, see `Written`
    stays: Flags  # bool [wires]

    @property
    def held(self) -> dict[str, Flags]:
        """Which outputs of which layers and norms are held at zero, bool [n]."""
        return {name: layer.held for name, layer in self.layers.items() if layer.held.any()}


def plan(neurons: Neurons, slice_: Slice, classes: Sequence[int] | None = None) -> Plan:
    """Plan the cut that keeps a slice and, if given, only the logits of `classes` (indices, each once).

    Coupled channels are removed when every layer that reads them reads a zero there. Channels that must stay to keep
    the groups of grouped convolutions equally wide, or to leave each layer one channel, stay with rows of zeros.
    """
    check_neurons(neurons)
    neurons.check(slice_)
    flow, wires = neurons.flow, neurons.wires
    gone = {name: ~mask.numpy() for name, mask in slice_.masks.items()}
    shifts = {name: wires[port.outs] for name, port in flow.ports.items() if isinstance(port, Shift)}
    stays = np.zeros(int(wires.max()) + 1, dtype=bool)
    while True:
        zeros = neurons.zeros(gone)
        stays[wires[zeros.needed]] = True
        for ids, _ in (*flow.pins, *flow.stays):
            stays[wires[ids]] = True
        if classes is not None:
            head = flow.ports[neurons.head[0]].outs
            stays[wires[head]] = False
            stays[wires[head[list(classes)]]] = True
        while _add_required(stays, neurons):
            pass
        if not any((zeros.held[name] & stays[own]).any() for name, own in shifts.items()):
            break
        gone |= {name: ~stays[own] for name, own in shifts.items()}
    zero_ins: dict[str, Flags] = {}
    for step in flow.steps:
        if step.rule == "sink":
            at = zeros.at.get(step.inputs[0], np.zeros(step.inputs[0].ids.shape, dtype=bool)).ravel()
            zero_ins[step.where] = zero_ins.get(step.where, np.ones_like(at)) & at
    layers = {}
    for name, port in flow.ports.items():
        outs, ins = stays[wires[port.outs]], None if port.ins is None else stays[wires[port.ins]]
        held = zeros.held.get(name, np.zeros(outs.shape, dtype=bool))
        layers[name] = LayerPlan(port, outs, ins, held, zero_ins.get(name))
    return Plan(layers, _sizes(neurons, stays), stays)


def _add_required(stays: Flags, neurons: Neurons) -> bool:
    """Let channels stay that the layers' own shapes require; return whether any was added."""
    wires, before = neurons.wires, int(stays.sum())
    for port in neurons.flow.ports.values():
        for ids in (port.outs, port.ins):
            if ids is not None and not stays[wires[ids]].any():
                stays[wires[ids.flat[0]]] = True
        if isinstance(port, Grouped) and port.ins is not None:
            outs, ins = (wires[ids].reshape(port.groups, -1) for ids in (port.outs, port.ins))
            alive = stays[outs].any(1) | stays[ins].any(1)
            for group_wires in (outs[alive], ins[alive]):
                _even_out(stays, group_wires)
    for parts in neurons.flow.even:
        _even_out(stays, wires[parts])
    return int(stays.sum()) > before


def _even_out(stays: Flags, parts: Ids) -> None:
    """Let as many wires of every part [parts, n] stay as of the widest, and one at least."""
    widest = max(1, int(stays[parts].sum(1).max()))
    for part in parts:
        missing = widest - int(stays[part].sum())
        if missing > 0:
            stays[part[~stays[part]][:missing]] = True


def _sizes(neurons: Neurons, stays: Flags) -> dict[tuple[str, str], Any]:
    """Return the attributes that say how wide tensors are, as they must be after the cut; none that says two things."""
    found: dict[tuple[str, str, int | None], set[int]] = {}
    for written in neurons.flow.written:
        size, kept = written.size, int(written.size)
        if written.channels is not None:
            places = staying(stays[neurons.wires[written.channels.ids]], written.axis)
            kept = kept if places is None else int(places[: written.upto].sum())
        found.setdefault((size.module, size.attribute, size.place), set()).add(kept * size.parts)
    sizes: dict[tuple[str, str], Any] = {}
    for (module, attribute, place), numbers in found.items():
        if len(numbers) == 1:
            old = sizes.get((module, attribute), getattr(neurons.model.get_submodule(module), attribute))
            sizes[module, attribute] = new = next(iter(numbers))
            if place is not None:
                sizes[module, attribute] = (*old[:place], new, *old[place + 1 :])
    return sizes


def build(model: nn.Module, what: Plan) -> nn.Module:
    """Return a copy of `model` with only what the plan keeps: layers of the same types, smaller.

    Parameters that are cut are never copied whole.
    """
    memo: dict[int, Any] = {}
    changed = {name: layer for name, layer in what.layers.items() if not layer.whole}
    for name, layer in changed.items():
        with torch.no_grad():
            cut = layer.cut(tensors_of(model, name, layer.port))
        for key, tensor in cut.items():
            old = getattr(model.get_submodule(place_of(name, layer.port)), key)
            if tensor is not old:  # else it is copied with the rest
                is_parameter = isinstance(old, nn.Parameter)
                memo[id(old)] = nn.Parameter(tensor, requires_grad=old.requires_grad) if is_parameter else tensor
    small = copy_of(model, memo)
    for module in small.modules():
        hooks = [vars(module)[name] for name in HOOKS if vars(module)[name]]
        if hooks and not any(isinstance(value, Tensor) for value in vars(module).values()):  # which pruning computes
            for of_kind in hooks:
                of_kind.clear()
    return resize(small, what)


def place_of(name: str, port: Port) -> str:
    """Return the name of the module that holds the tensors of a port."""
    return name.rpartition(".")[0] if isinstance(port, Free) else name


def tensors_of(model: nn.Module, name: str, port: Port) -> dict[str, Tensor | None]:
    """Return the parameters and buffers of a port."""
    if isinstance(port, Shift):
        return {}
    module = model.get_submodule(place_of(name, port))
    if isinstance(port, Free):
        key = name.rpartition(".")[2]
        return {key: module._parameters.get(key, module._buffers.get(key))}
    return {**module._parameters, **module._buffers}


def weights_of(network: nn.Module, neurons: Neurons) -> dict[str, Tensor]:
    """Return the weights that no other layer shares, of convolutions and linear layers in forward order.

    `neurons` are those of the network or of the model that it was cut from.
    """
    owners = Counter(id(p) for module in network.modules() for p in module._parameters.values() if p is not None)
    found = {}
    for name, port in neurons.flow.ports.items():
        weight = None if port.ins is None else network.get_submodule(name)._parameters.get("weight")
        if weight is not None and owners[id(weight)] == 1:
            found[name] = weight.detach()
    return found


def zero_out(model: nn.Module, what: Plan) -> None:
    """Set what the plan holds at zero to zero for good, in place, and leave every layer as wide as it is."""
    with torch.no_grad():
        for name, held in what.held.items():
            port = what.layers[name].port
            port.zero(tensors_of(model, name, port), torch.from_numpy(held))


def resize(view: nn.Module, what: Plan) -> nn.Module:
    """Give the layers of a view of a model the sizes of a plan, in place, so that it runs with `cut_tensors`."""
    for name, layer in what.layers.items():  # plain numbers, so not through Module.__setattr__
        attributes = vars(view.get_submodule(place_of(name, layer.port)))
        attributes.update({key: size for key, size in layer.sizes.items() if key in attributes})
    for (path, attribute), size in what.sizes.items():
        vars(view.get_submodule(path))[attribute] = size
    return view


def cut_tensors(model: nn.Module, what: Plan) -> dict[str, Tensor]:
    """Return the parameters of the network that a plan describes, functions of the model's own, and copies of buffers.

    So the network trains as a part of the model, which is faster than the model with neurons held at zero.

    >>> from torchslice.graph.views import view_of
    >>> what = plan(neurons, slices["3"])
    >>> view = resize(view_of(model), what)
    >>> logits = torch.func.functional_call(view, cut_tensors(model, what), (task.example,))
    """
    cut: dict[str, dict[str, Tensor]] = {}  # by module
    for name, layer in what.layers.items():
        if not layer.whole:
            cut.setdefault(place_of(name, layer.port), {}).update(layer.cut(tensors_of(model, name, layer.port)))
    found = {}
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                own = tensor if key in module._parameters else tensor.clone()
                found[f"{name}.{key}" if name else key] = cut.get(name, {}).get(key, own)
    return found
