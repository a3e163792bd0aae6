"""Plan a cut, and build the plain, smaller copy that it describes.

Nothing here depends on the architecture: a plan says for each layer which channels stay and which of those are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import TorchsliceError
from ..inputs import device_of
from ..slices import Slice
from .layers import Flags, Grouped, Port
from .neurons import Neurons
from .views import copy_of


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

    def cut(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of the layer after the cut."""
        device = device_of(module)
        outs = torch.from_numpy(self.outs.nonzero()[0]).to(device)
        tensors = {
            key: tensor.index_select(0, outs)
            for key, tensor in {**module._parameters, **module._buffers}.items()
            if tensor is not None and tensor.dim() > 0
        }
        if self.ins is not None:
            tensors["weight"] = self.port.cut_columns(tensors["weight"], self.outs, self.ins)
        held = self.held[self.outs]
        if held.any():
            self.port.zero(tensors, torch.from_numpy(held))
        return tensors


@dataclass(frozen=True)
class Plan:
    """What stays of every layer of a model."""

    layers: dict[str, LayerPlan]

    @property
    def held(self) -> dict[str, Flags]:
        """Which outputs of which layers and norms are held at zero, bool [n]."""
        return {name: layer.held for name, layer in self.layers.items() if layer.held.any()}


def plan(neurons: Neurons, slice_: Slice, classes: Sequence[int] | None = None) -> Plan:
    """Plan the cut that keeps a slice and, if given, only the logits of `classes` (indices, each once).

    Coupled channels are removed when every layer that reads them reads a zero there. Channels that must stay to keep
    the groups of grouped convolutions equally wide, or to leave each layer one channel, stay with rows of zeros.
    """
    if not isinstance(neurons, Neurons):
        raise TorchsliceError(
            f"expected neurons, got {type(neurons).__name__}; find them first: find_neurons(model, example)."
        )
    neurons.check(slice_)
    flow, wires = neurons.flow, neurons.wires
    zeros = flow.zeros({name: ~mask.numpy() for name, mask in slice_.masks.items()})
    stays = np.zeros(int(wires.max()) + 1, dtype=bool)
    stays[wires[zeros.needed]] = True
    for ids, _ in flow.pins:
        stays[wires[ids]] = True
    if classes is not None:
        head = flow.ports[neurons.head[0]].outs
        stays[wires[head]] = False
        stays[wires[head[list(classes)]]] = True
    while _add_required(stays, neurons):
        pass
    zero_ins: dict[str, Flags] = {}
    for step in flow.steps:
        if step.rule == "sink":
            at = zeros.at.get(step.inputs[0], np.zeros(len(step.inputs[0].ids), dtype=bool))
            zero_ins[step.where] = zero_ins.get(step.where, np.ones_like(at)) & at
    layers = {}
    for name, port in flow.ports.items():
        outs, ins = stays[wires[port.outs]], None if port.ins is None else stays[wires[port.ins]]
        held = zeros.held.get(name, np.zeros(len(outs), dtype=bool))
        layers[name] = LayerPlan(port, outs, ins, held, zero_ins.get(name))
    return Plan(layers)


def _add_required(stays: Flags, neurons: Neurons) -> bool:
    """Let channels stay that the layers' own shapes require; return whether any was added."""
    wires, before = neurons.wires, int(stays.sum())
    for port in neurons.flow.ports.values():
        for ids in (port.outs, port.ins):
            if ids is not None and not stays[wires[ids]].any():
                stays[wires[ids[0]]] = True
        if isinstance(port, Grouped) and port.ins is not None:
            outs, ins = (wires[ids].reshape(port.groups, -1) for ids in (port.outs, port.ins))
            alive = stays[outs].any(1) | stays[ins].any(1)
            for group_wires in (outs[alive], ins[alive]):
                widest = max(1, int(stays[group_wires].sum(1).max()))
                for group in group_wires:
                    missing = widest - int(stays[group].sum())
                    stays[group[~stays[group]][: max(0, missing)]] = True
    return int(stays.sum()) > before


def build(model: nn.Module, what: Plan) -> nn.Module:
    """Return a copy of `model` with only what the plan keeps: layers of the same types, smaller.

    Parameters that are cut are never copied whole.
    """
    memo: dict[int, Any] = {}
    for name, layer in what.layers.items():
        if layer.whole:
            continue
        module = model.get_submodule(name)
        with torch.no_grad():
            tensors = layer.cut(module)
        for key, tensor in tensors.items():
            old = getattr(module, key)
            new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
            memo[id(old)] = new
    small = copy_of(model, memo)
    return resize(small, what)


def zero_out(model: nn.Module, what: Plan) -> None:
    """Set what the plan holds at zero to zero for good, in place, and leave every layer as wide as it is."""
    with torch.no_grad():
        for name, held in what.held.items():
            module = model.get_submodule(name)
            what.layers[name].port.zero({**module._parameters, **module._buffers}, torch.from_numpy(held))


def resize(view: nn.Module, what: Plan) -> nn.Module:
    """Give the layers of a view of a model the sizes of a plan, in place, so that it runs with `cut_tensors`."""
    for name, layer in what.layers.items():
        vars(view.get_submodule(name)).update(layer.sizes)  # plain numbers, so not through Module.__setattr__
    return view


def cut_tensors(model: nn.Module, what: Plan) -> dict[str, Tensor]:
    """Return the parameters of the network that a plan describes, functions of the model's own, and copies of buffers.

    So the network trains as a part of the model, which is faster than the model with neurons held at zero.

    >>> from torchslice.graph.views import view_of
    >>> what = plan(neurons, slices["3"])
    >>> view = resize(view_of(model), what)
    >>> logits = torch.func.functional_call(view, cut_tensors(model, what), (task.example,))
    """
    found = {}
    for name, module in model.named_modules():
        layer = what.layers.get(name)
        cut = {} if layer is None or layer.whole else layer.cut(module)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                own = tensor if key in module._parameters else tensor.clone()
                found[f"{name}.{key}" if name else key] = cut.get(key, own)
    return found
