"""Cut a slice out of a model: plan which rows and columns stay, then build a plain, smaller copy.

Nothing here depends on the architecture: a plan says for each layer which channels stay and which of those are held
at zero.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import TorchsliceError
from ..slices import Slice
from .flow import Flags, Port
from .neurons import Neurons
from .record import evaluating


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


@dataclass(frozen=True)
class Plan:
    """What stays of every layer of a model."""

    layers: dict[str, LayerPlan]

    @property
    def held(self) -> dict[str, Flags]:
        return {name: plan.held for name, plan in self.layers.items() if plan.held.any()}


def plan(neurons: Neurons, part: Slice, classes: Sequence[int] | None = None) -> Plan:
    """Plan the cut that keeps `part` and, if given, only the class scores `classes` (indices, each once).

    A wire is removed when every layer that reads it reads a zero there; wires that must stay to keep the groups of
    grouped convolutions equally wide, or to leave each layer one channel, stay with zero rows.
    """
    neurons.check(part)
    if classes is not None:
        _check_classes(neurons, classes)
    flow, wires = neurons.flow, neurons.wires
    zeros = flow.zeros({name: ~mask.numpy() for name, mask in part.masks.items()})
    stays = np.zeros(int(wires.max()) + 1, dtype=bool)
    stays[wires[zeros.needed]] = True
    for ids, _ in flow.pins:
        stays[wires[ids]] = True
    if classes is not None:
        head = neurons.flow.ports[neurons.head[0]].outs
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
    """Let wires stay that the layers' own shapes require; return whether any was added."""
    wires, before = neurons.wires, int(stays.sum())
    for port in neurons.flow.ports.values():
        for ids in (port.outs, port.ins):
            if ids is not None and not stays[wires[ids]].any():
                stays[wires[ids[0]]] = True
        if port.kind == "grouped":
            assert port.ins is not None
            outs, ins = (wires[ids].reshape(port.groups, -1) for ids in (port.outs, port.ins))
            alive = stays[outs].any(1) | stays[ins].any(1)
            for group_wires in (outs[alive], ins[alive]):
                widest = max(1, int(stays[group_wires].sum(1).max()))
                for group in group_wires:
                    missing = widest - int(stays[group].sum())
                    stays[group[~stays[group]][: max(0, missing)]] = True
    return int(stays.sum()) > before


def cut(model: nn.Module, what: Plan) -> nn.Module:
    """Return a copy of `model` with only what the plan keeps: layers of the same types, smaller.

    Parameters that are cut are never copied whole.
    """
    memo: dict[int, Any] = {}
    for name, layer in what.layers.items():
        if layer.whole:
            continue
        module = model.get_submodule(name)
        with torch.no_grad():
            tensors = _cut_layer(module, layer)
        for key, tensor in tensors.items():
            old = getattr(module, key)
            new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
            memo[id(old)] = new
    small = copy.deepcopy(model, memo)
    for name, layer in what.layers.items():
        vars(small.get_submodule(name)).update(layer.sizes)  # plain numbers, so not through Module.__setattr__
    return small


def silence(model: nn.Module, what: Plan) -> None:
    """Set what the plan holds at zero to zero for good, in place, and leave every layer as wide as it is."""
    with torch.no_grad():
        for name, held in what.held.items():
            module = model.get_submodule(name)
            if what.layers[name].port.kind != "prelu":
                _zero({**module._parameters, **module._buffers}, torch.from_numpy(held))


def held_tensors(model: nn.Module, held: Mapping[str, Flags]) -> dict[str, Tensor]:
    """Return the parameters of some layers by name, with rows bool [n] at zero: functions of the model's own.

    It is faster to run a model with these than to hold its activations, and than to cut it: kernels are prepared for
    every new width, which costs as much as a smaller network saves.

    >>> logits = functional_call(model, held_tensors(model, what.held), images, tie_weights=False)
    """
    found: dict[str, Tensor] = {}
    for name, flags in held.items():
        rows = torch.from_numpy(flags)
        for key, tensor in model.get_submodule(name).named_parameters(name, recurse=False):
            found[key] = tensor.masked_fill(rows.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1)), 0)
    return found


def _zero(tensors: Mapping[str, Tensor | None], rows: Tensor) -> None:
    """Set rows of a layer's tensors to zero, a variance to one, so that it computes zero from zeros."""
    for key in ("weight", "bias", "running_mean", "running_var"):
        if (tensor := tensors.get(key)) is not None:
            tensor[rows.to(tensor.device)] = float(key == "running_var")


def _cut_layer(module: nn.Module, layer: LayerPlan) -> dict[str, Tensor]:
    """Return the tensors of a layer after the cut."""
    port = layer.port
    device = next((t.device for t in [*module.parameters(), *module.buffers()]), torch.device("cpu"))
    outs = torch.from_numpy(layer.outs.nonzero()[0]).to(device)
    held = torch.from_numpy(layer.held[layer.outs]).to(device)
    tensors = {
        key: tensor.index_select(0, outs)
        for key, tensor in {**module._parameters, **module._buffers}.items()
        if tensor is not None and tensor.dim() > 0
    }
    if port.kind == "grouped":
        tensors["weight"] = _cut_groups(tensors["weight"], layer, device)
    elif port.kind in ("conv", "linear"):
        assert layer.ins is not None
        tensors["weight"] = tensors["weight"].index_select(1, torch.from_numpy(layer.ins.nonzero()[0]).to(device))
    if held.any() and port.kind != "prelu":
        _zero(tensors, held)
    return tensors


def _cut_groups(rows: Tensor, layer: LayerPlan, device: torch.device) -> Tensor:
    """Take the columns that stay out of each group's rows; the groups that stay are equally wide by the plan."""
    assert layer.ins is not None
    groups = layer.port.groups
    ins, outs = layer.ins.reshape(groups, -1), layer.outs.reshape(groups, -1)
    parts, start = [], 0
    for columns, kept in zip(ins, outs, strict=True):
        stop = start + int(kept.sum())
        if stop > start:
            parts.append(rows[start:stop].index_select(1, torch.from_numpy(columns.nonzero()[0]).to(device)))
        start = stop
    return torch.cat(parts)


def runs_when_cut(model: nn.Module, example: Tensor, neurons: Neurons, where: str, ids: Any) -> str | None:
    """Try to cut channels whose number `where` may have written down.

    Returns the reason to pin them, or None if the cut network runs.
    """
    touched = set(neurons.wires[ids])
    masks = neurons.full().masks
    for name in neurons.layers:
        outs = neurons.wires[neurons.flow.ports[name].outs]
        chosen = np.isin(outs, list(touched)).nonzero()[0]
        masks[name][torch.from_numpy(chosen[: len(outs) - 1])] = False
    if all(mask.all() for mask in masks.values()):
        return None
    small = cut(model, plan(neurons, Slice(masks)))
    try:
        with evaluating(small):
            if small(example).shape == (example.shape[0], neurons.classes):
                return None
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        pass
    return f"{where} writes the width into the code"


def _check_classes(neurons: Neurons, classes: Sequence[int]) -> None:
    """Raise unless `classes` are at least two different class indices and the scores come straight from a layer."""
    if len(classes) < 2:
        raise TorchsliceError(
            f"a classifier needs at least two classes, got {list(classes)}. Add a class to tell it from."
        )
    if len(set(classes)) < len(classes) or not all(0 <= c < neurons.classes for c in classes):
        raise TorchsliceError(f"classes must be different indices in 0..{neurons.classes - 1}, got {list(classes)}.")
    if not neurons.head:
        raise TorchsliceError(
            "the class scores do not come straight from a layer, so single classes cannot be cut. Extract "
            "without classes= and choose "
            "among the scores yourself."
        )
