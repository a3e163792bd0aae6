"""Add channels to a model without changing what it computes: `surgery.cut` run backwards.

A new channel is put behind the last channel of a wire, in every tensor the wire passes through. Its rows are drawn
anew; the columns of the rows that were there before are zero where they read it, so these compute what they computed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .flow import Flags, Ids, Port
from .neurons import Neurons


def new_places(ids: Ids, wires: Ids, extra: Mapping[int, int]) -> tuple[Ids, Flags]:
    """Return where each of a tensor's channels comes from after widening, int [n'], and which are new, bool [n'].

    `extra` maps wires to the number of channels to add to each. A channel that lies in several adjacent places (a
    flattened image) is added as often.

    >>> new_places(np.array([0, 1, 1]), np.array([0, 1]), {1: 1})
    (array([0, 1, 2, 1, 2]), array([False, False, False,  True,  True]))
    """
    starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    parts, new = [], []
    for run in np.split(np.arange(len(ids)), starts[1:]):
        count = extra.get(int(wires[ids[run[0]]]), 0)
        parts += [run] * (1 + count)
        new += [np.full(len(run), number > 0) for number in range(1 + count)]
    return np.concatenate(parts), np.concatenate(new)


def why_fixed(neurons: Neurons, layer: str) -> str | None:
    """Return why a sliceable layer cannot be widened, or None if it can."""
    wire = last_wire(neurons, layer)
    for name, port in neurons.flow.ports.items():
        ids = [port.outs, *([] if port.ins is None else [port.ins])]
        if port.kind == "grouped" and any((neurons.wires[side] == wire).any() for side in ids):
            return f"{name!r} is a grouped convolution, whose groups must be equally wide"
    return None


def last_wire(neurons: Neurons, layer: str) -> int:
    """Return the wire of a layer's last channel, behind which new ones are put."""
    return int(neurons.wires[neurons.flow.ports[layer].outs[-1]])


def grow(model: nn.Module, neurons: Neurons, extra: Mapping[int, int], *, seed: int) -> nn.Module:
    """Return a copy of `model` with so many channels more behind the wires of `extra`, its new rows drawn by `seed`."""
    memo: dict[int, Any] = {}
    sizes: dict[str, dict[str, int]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, port in neurons.flow.ports.items():
            outs, new_outs = new_places(port.outs, neurons.wires, extra)
            ins, new_ins = (outs, new_outs) if port.ins is None else new_places(port.ins, neurons.wires, extra)
            if not new_outs.any() and not new_ins.any():
                continue
            module = model.get_submodule(name)
            for key, tensor in {**module._parameters, **module._buffers}.items():
                if tensor is not None and tensor.dim() > 0:
                    wide = tensor.detach().cpu()[torch.from_numpy(outs)]
                    if key == "weight" and port.kind in ("conv", "linear"):
                        wide = wide[:, torch.from_numpy(ins)]
                        wide[:, torch.from_numpy(new_ins)] = 0
                    _draw(wide, key, port, torch.from_numpy(new_outs), len(ins))
                    wide = wide.to(tensor.device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    memo[id(tensor)] = nn.Parameter(wide, tensor.requires_grad) if is_parameter else wide
            sizes[name] = port.sizes(len(outs), len(ins), port.groups)
    grown = copy.deepcopy(model, memo)
    for name, attributes in sizes.items():
        vars(grown.get_submodule(name)).update(attributes)
    return grown


def _draw(tensor: Tensor, key: str, port: Port, new: Tensor, inputs: int) -> None:
    """Fill the new rows: of a norm with those of the identity, of a layer as PyTorch does; a PReLU keeps its copies."""
    if port.kind == "norm":
        tensor[new] = float(key in ("weight", "running_var"))
    elif port.kind != "prelu":
        bound = (port.kernel * (1 if port.kind == "depthwise" else inputs)) ** -0.5
        tensor[new] = torch.empty_like(tensor[new]).uniform_(-bound, bound)
