"""What all rules share: the channels of tensors, and the ways to state what must stay together or as it is.

Axes are counted from the right, so that broadcasting lines them up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..inputs import map_leaves
from .flow import Channels, Flow, Step
from .layers import Free, Ids, Port, Shift
from .record import Call, Recording, Value

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVS, *TRANSPOSED_CONVS, nn.Linear, nn.modules.batchnorm._NormBase, nn.Embedding)


class Ground:
    """The state of the rules.

    Attributes:
        channels: those of every tensor that has any.
        doubtful: calls of which only a cut network can tell whether they go with a cut.
        elsewhere: layer -> why its parameters are out of reach.
        heads: channels of which each stands for a whole head.
    """

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self.recording, self.flow = recording, Flow()
        self.modules = dict(model.named_modules())
        self.parameters = dict(model.named_parameters())
        self.channels: dict[Value, Channels] = {}
        self.made: dict[Value, tuple[Call, int]] = {}
        self.doubtful: list[Call] = []
        self.elsewhere: dict[str, str] = {}
        self.heads: list[Ids] = []
        self.shared: set[str] = set()  # names of parameters that several modules have
        self.batch = 1 if recording.output is None else recording.output.shape[0]
        self._shared_parameters()

    def _shared_parameters(self) -> None:
        owners: dict[int, list[tuple[str, str]]] = {}
        for name, module in self.modules.items():
            for key, parameter in (*module._parameters.items(), *module._buffers.items()):
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append((name, key))
        for places in owners.values():
            for name, key in places if len(places) > 1 else []:
                self.elsewhere[name] = f"shares a parameter with {next(n for n, _ in places if n != name)!r}"
                self.shared.add(f"{name}.{key}")

    def _where(self, call: Call) -> str:
        hint = " (see models.with_plain_attention)" if call.name == "multi_head_attention_forward" else ""
        return (f"{call.name} in {call.module!r}" if call.module else call.name) + hint

    def _unknown(self, call: Call, why: str = "a function torchslice does not know") -> None:
        """Pin all channels that the call reads: nothing is known of what comes out."""
        for value in call.inputs:
            if value in self.channels:
                self.flow.pin(self.channels[value].ids, f"read by {self._where(call)}: {why}")

    def _known(self, value: Any) -> Channels | None:
        """Return the channels of a value; every element of a free parameter is one."""
        if not isinstance(value, Value):
            return None
        return self._free(value) if value.parameter in self.parameters else self.channels.get(value)

    def _free(self, value: Value) -> Channels | None:
        """Return the channels of a parameter or buffer; every element of one that belongs to no layer is one."""
        name = value.parameter or ""
        if value not in self.channels and name not in self.shared:
            layer = isinstance(self.modules[name.rpartition(".")[0]], LAYERS)
            if not layer and np.prod(value.shape) > 1 and not (name.endswith("weight") and len(value.shape) > 1):
                self.flow.ports[name] = Free(self.flow.new(*value.shape), taken=True)
                self.channels[value] = Channels(self.flow.ports[name].outs)
                self.flow.steps.append(Step("make", (), self.channels[value], name))
        return self.channels.get(value)

    def _fresh(self, n: int, reason: str) -> Ids:
        ids = self.flow.new(n)
        self.flow.pin(ids, reason)
        return ids

    def _step(self, call: Call, rule: str, inputs: Sequence[Channels], ids: Ids, **more: Any) -> Channels:
        out = Channels(ids)
        self.flow.steps.append(Step(rule, tuple(inputs), out, where=self._where(call), **more))
        return out

    def _port(self, layer: str, kind: type[Port], outs: Ids | None, ins: Ids | None = None, width: int = 0) -> Port:
        """Return the port of a layer; a layer that is used again ties its channels to those of its first use."""
        port = self.flow.ports.get(layer)
        if port is None:
            port = kind(self.flow.new(width) if outs is None else outs, ins)
            port.taken = layer in self.recording.taken
            self.flow.ports[layer] = port
        else:
            if outs is not None:
                self.flow.link(port.outs, outs)
            if ins is not None and port.ins is not None:
                self.flow.link(port.ins, ins)
        return port

    def _shifted(self, call: Call, source: Channels, out: Value) -> Channels:
        """State that all channels of a tensor get the same constant; where a module ends so, its output can be held."""
        layer = call.module
        ends = out in self.recording.module_outputs.get(layer, []) and not isinstance(self.modules[layer], LAYERS)
        if not layer or not ends or len(source.axes) != 1:
            return self._step(call, "lose", [source], source.ids)
        self._port(layer, Shift, source.ids.ravel()).axis = source.axes[0]
        return self._step(call, "hold", [source], source.ids, layer=layer)

    def _rearranged(self, call: Call, value: Value, out: Value, function: Callable[[Ids], Ids]) -> None:
        """State that a tensor is another one whose channels a function of arrays moves about."""
        if (source := self._known(value)) is not None:
            places = np.arange(source.ids.size).reshape((1,) * (len(value.shape) - source.ids.ndim) + source.ids.shape)
            index = function(places)
            self.channels[out] = self._step(call, "keep", [source], source.ids.ravel()[index], index=index)

    def _fix(self, call: Call, source: Channels, axes: set[int], reason: str) -> Channels | None:
        """State that some axes of a tensor keep their size: what differs along them stays or goes as a whole.

        Returns the channels that are left, which differ along the other axes; None if there is nothing left, so that
        the channels are pinned.
        """
        fixed = axes.intersection(source.axes)
        if not fixed:
            return source
        if fixed == {*source.axes}:
            self.flow.pin(source.ids, reason)
            return None
        first = source.ids[tuple(slice(0, 1) if axis in fixed else slice(None) for axis in range(-source.ids.ndim, 0))]
        self.flow.link(first, source.ids)
        return self._step(call, "keep", [source], first)

    def _constant(self, value: Value) -> Tensor:
        """Compute a tensor that does not depend on the input, such as a table of places."""
        if value.parameter is not None:
            path, _, key = value.parameter.rpartition(".")
            found: Tensor = getattr(self.modules[path], key)
            return found.detach().cpu()
        call, place = self.made[value]

        def real(leaf: Any) -> Any:
            if isinstance(leaf, torch.device):
                return torch.device("cpu")
            return self._constant(leaf) if isinstance(leaf, Value) else leaf

        args, kwargs = map_leaves(real, (call.args, call.kwargs))
        made = call.function(*args, **kwargs)
        return made[place] if isinstance(made, tuple | list) else made


def arg(call: Call, position: int, name: str, default: Any = None) -> Any:
    """Return an argument of a call, however it was given."""
    return call.args[position] if len(call.args) > position else call.kwargs.get(name, default)


def from_right(axis: int, rank: int) -> int:
    """Return the number of an axis, counted from the right."""
    return axis - rank if axis >= 0 else axis
