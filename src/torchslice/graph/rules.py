"""What each tensor function does to channels and zeros. A function that is not listed here pins the channels it reads.

Shapes: n channels of one tensor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ..inputs import leaves, map_leaves
from .flow import Channels, Flow, Step
from .functions import (
    ADDITIVE,
    CLAMPS,
    CONCATENATIONS,
    CONVOLUTIONS,
    DIVISION,
    MIXERS,
    MOVES,
    MULTIPLICATIVE,
    NORMS,
    POOLS,
    REDUCTIONS,
    RESIZERS,
    SHAPED,
    ZERO_GOES,
    ZERO_STAYS,
)
from .layers import Conv, Depthwise, Grouped, Linear, Norm, Port, PReLU
from .record import Call, Recording, Value


class Rules:
    """Turns a recording into a Flow, call by call."""

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self.flow = Flow()
        self.modules = dict(model.named_modules())
        self.channels: dict[Value, Channels] = {}
        self.written_widths: list[
            tuple[str, np.ndarray]
        ] = []  # where, and channels whose number the code may spell out
        self.elsewhere: dict[str, str] = {}  # layer -> why its parameters are out of reach
        self._shared_parameters(model)
        for call in recording.calls:
            self._note_parameters(call)
            if any(value.dynamic for value in call.outputs):
                self._apply(call)

    def _shared_parameters(self, model: nn.Module) -> None:
        owners: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append(name)
        for names in owners.values():
            for name in names if len(names) > 1 else []:
                self.elsewhere[name] = f"shares a parameter with {next(n for n in names if n != name)!r}"

    def _note_parameters(self, call: Call) -> None:
        """A layer's parameters may be cut only if nothing but the layer's own call reads them."""
        own = call.name in CONVOLUTIONS or call.name in NORMS or call.name in ("linear", "prelu")
        for value in call.inputs:
            if value.parameter and not (own and value.parameter.rpartition(".")[0] == call.module):
                self.elsewhere.setdefault(
                    value.parameter.rpartition(".")[0], f"its parameters are read by {self._where(call)}"
                )

    # -- one call -------------------------------------------------------------------------------------------------
    def _apply(self, call: Call) -> None:
        name, single = call.name, len(call.outputs) == 1
        if not single and name not in MOVES:
            self._unknown(call)
        elif name in CONVOLUTIONS:
            self._convolution(call, CONVOLUTIONS[name])
        elif name == "linear":
            self._linear(call)
        elif name in NORMS:
            self._norm(call)
        elif name == "prelu":
            self._prelu(call)
        elif name in ZERO_STAYS or (name in CLAMPS and _spans_zero(call)) or (name == "pow" and _power(call)):
            self._elementwise(call, "keep")
        elif name in ZERO_GOES or name in CLAMPS:
            self._elementwise(call, "lose")
        elif name in ADDITIVE or name in MULTIPLICATIVE or name in DIVISION:
            self._binary(call)
        elif name in CONCATENATIONS:
            self._cat(call)
        elif name in POOLS or name in RESIZERS or name == "pad":
            self._spatial(call)
        elif name in MOVES or name in REDUCTIONS:
            self._move(call)
        else:
            self._unknown(call)

    def _where(self, call: Call) -> str:
        return f"{call.name} in {call.module!r}" if call.module else call.name

    def _unknown(self, call: Call, why: str = "") -> None:
        """Pin all channels that the call reads: nothing is known of what comes out."""
        if call.name in MIXERS:
            reason = f"{self._where(call)} mixes the channels"
        else:
            reason = f"read by {self._where(call)}: {why or 'a function torchslice does not know'}"
        for value in call.inputs:
            if value in self.channels:
                self.flow.pin(self.channels[value].ids, reason)

    def _fresh(self, n: int, reason: str) -> np.ndarray:
        ids = self.flow.new(n)
        self.flow.pin(ids, reason)
        return ids

    def _on_axis(self, call: Call, value: Value, axis: int) -> Channels:
        """Return the channels of a value on `axis`; values without known channels there get fresh, pinned ones."""
        known = self.channels.get(value)
        if known is not None and known.axis == axis:
            return known
        if known is not None:
            self.flow.pin(known.ids, f"{self._where(call)} works along another axis")
        return Channels(
            self._fresh(value.shape[axis], "fed by the network's input or by a function torchslice does not know"), axis
        )

    def _module(self, call: Call, classes: tuple[type[nn.Module], ...], weight: Any) -> nn.Module | None:
        """Return the layer that makes this call, if its parameters can be cut."""
        module = self.modules.get(call.module)
        if not isinstance(module, classes):
            return None
        if call.module in self.elsewhere:
            return None
        expected = f"{call.module}.weight" if call.module else "weight"
        if isinstance(weight, Value) and (weight.parameter != expected or "weight" not in module._parameters):
            self.elsewhere[call.module] = "its weight is computed from other parameters"
            return None
        return module

    # -- layers ---------------------------------------------------------------------------------------------------
    def _convolution(self, call: Call, dims: int) -> None:
        x, weight = _arg(call, 0, "input"), _arg(call, 1, "weight")
        module = self._module(call, (nn.Conv1d, nn.Conv2d, nn.Conv3d), weight)
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return self._unknown(call, self.elsewhere.get(call.module, "not a plain convolution layer"))
        axis = -(dims + 1)
        ins = self._on_axis(call, x, axis)
        groups, out, layer = module.groups, call.outputs[0], call.module
        depthwise = groups > 1 and groups == module.in_channels
        if depthwise:
            index = np.repeat(np.arange(groups), module.out_channels // groups)
            port = self._port(layer, Depthwise, ins.ids[index], ins.ids)
            self.channels[out] = Channels(port.outs, axis)
            self.flow.steps.append(Step("hold", (ins,), self.channels[out], layer, index))
        else:
            port = self._port(layer, Conv if groups == 1 else Grouped, None, ins.ids, module.out_channels)
            self.flow.steps.append(Step("sink", (ins,), where=layer))
            self.channels[out] = Channels(port.outs, axis)
            self.flow.steps.append(Step("make", (ins,), self.channels[out], layer))
        port.groups, port.kernel = groups, int(np.prod(module.kernel_size))
        port.positions += int(np.prod(out.shape[axis + 1 :]))

    def _linear(self, call: Call) -> None:
        x, weight = _arg(call, 0, "input"), _arg(call, 1, "weight")
        module = self._module(call, (nn.Linear,), weight)
        if not isinstance(module, nn.Linear):
            return self._unknown(call, self.elsewhere.get(call.module, "not a plain linear layer"))
        ins = self._on_axis(call, x, -1)
        port = self._port(call.module, Linear, None, ins.ids, module.out_features)
        port.positions += int(np.prod(call.outputs[0].shape[1:-1]))
        self.flow.steps.append(Step("sink", (ins,), where=call.module))
        self.channels[call.outputs[0]] = Channels(port.outs, -1)
        self.flow.steps.append(Step("make", (ins,), self.channels[call.outputs[0]], call.module))

    def _norm(self, call: Call) -> None:
        x = _arg(call, 0, "input")
        weight = next((v for v in (_arg(call, 3, "weight"),) if isinstance(v, Value)), None)
        module = self._module(call, (nn.modules.batchnorm._NormBase,), weight)
        if module is None or x not in self.channels or self.channels[x].axis != 1 - len(x.shape):
            return self._unknown(call, "not a norm of the channels alone")
        source = self.channels[x]
        self._port(call.module, Norm, source.ids)
        self.channels[call.outputs[0]] = Channels(source.ids, source.axis)
        self.flow.steps.append(Step("hold", (source,), self.channels[call.outputs[0]], call.module))

    def _prelu(self, call: Call) -> None:
        x, weight = _arg(call, 0, "input"), _arg(call, 1, "weight")
        if isinstance(weight, Value) and int(np.prod(weight.shape)) > 1:
            if (
                self._module(call, (nn.PReLU,), weight) is None
                or x not in self.channels
                or self.channels[x].axis != 1 - len(x.shape)
            ):
                return self._unknown(call, "not a plain PReLU layer")
            self._port(call.module, PReLU, self.channels[x].ids)
        self._elementwise(call, "keep")

    def _port(
        self, layer: str, kind: type[Port], outs: np.ndarray | None, ins: np.ndarray | None = None, width: int = 0
    ) -> Port:
        """Return the port of a layer; a layer that is used again ties its channels to those of its first use."""
        port = self.flow.ports.get(layer)
        if port is None:
            port = kind(self.flow.new(width) if outs is None else outs, ins)
            self.flow.ports[layer] = port
        else:
            if outs is not None:
                self.flow.link(port.outs, outs)
            if ins is not None and port.ins is not None:
                self.flow.link(port.ins, ins)
        return port

    # -- element by element ---------------------------------------------------------------------------------------
    def _elementwise(self, call: Call, rule: str) -> None:
        source = self.channels.get(_arg(call, 0, "input"))
        others = [v for v in call.inputs[1:] if v.dynamic]
        if others and call.name not in ("type_as", "to"):
            return self._unknown(call, "takes several tensors")
        if source is not None:
            self._pass_on(call, source, rule)

    def _pass_on(
        self, call: Call, source: Channels, rule: str, index: np.ndarray | None = None, axis: int | None = None
    ) -> None:
        ids = source.ids if index is None else source.ids[index]
        out = Channels(ids, source.axis if axis is None else axis)
        self.channels[call.outputs[0]] = out
        self.flow.steps.append(Step(rule, (source,), out, index=index, where=self._where(call)))

    def _binary(self, call: Call) -> None:
        a, b = (call.args + tuple(call.kwargs[k] for k in ("other",) if k in call.kwargs))[:2]
        out = call.outputs[0]
        if not (isinstance(a, Value) and isinstance(b, Value)):
            tensor, scalar = (a, b) if isinstance(a, Value) else (b, a)
            if call.name in DIVISION and tensor is b:
                return self._unknown(call, "divides by channels")
            stays = call.name in MULTIPLICATIVE or call.name in DIVISION or scalar == 0
            if tensor in self.channels:
                self._pass_on(call, self.channels[tensor], "keep" if stays else "lose")
            return
        known = [v for v in (a, b) if v in self.channels]
        if not known:
            return
        axis = max(known, key=lambda v: len(self.channels[v].ids))  # the wider side says where the channels are
        position, width = self.channels[axis].axis, len(self.channels[axis].ids)
        sides = []
        for value in (a, b):
            size = value.shape[position] if len(value.shape) >= -position else 1
            mine = self.channels.get(value)
            if mine is not None and mine.axis == position and size == width:
                sides.append(mine)
            elif size == 1 and width > 1:  # the same factor or summand for all channels
                if mine is not None:
                    self.flow.pin(mine.ids, f"{self._where(call)} spreads it over other channels")
            else:
                reason = f"joined by {self._where(call)} with " + (
                    f"the parameter {value.parameter!r}" if value.parameter else "a value whose channels are not known"
                )
                if mine is not None:
                    self.flow.pin(mine.ids, reason)
                sides.append(Channels(self._fresh(width, reason), position))
        if call.name in DIVISION and (len(sides) > 1 or b in known):
            return self._unknown(call, "divides by channels")
        for other in sides[1:]:
            self.flow.link(sides[0].ids, other.ids)
        result = Channels(sides[0].ids, position)
        self.channels[out] = result
        joint, alone = ("all", "lose") if call.name in ADDITIVE else ("any", "keep")
        rule = joint if len(sides) == 2 else alone
        self.flow.steps.append(Step(rule, tuple(sides), result, where=self._where(call)))

    def _cat(self, call: Call) -> None:
        values = list(_arg(call, 0, "tensors"))
        dim = _arg(call, 1, "dim", 0)
        if not isinstance(dim, int):
            return self._unknown(call)
        rank = len(values[0].shape)
        along = dim - rank if dim >= 0 else dim
        known = [v for v in values if v in self.channels]
        if not known:
            return
        if any(self.channels[v].axis != self.channels[known[0]].axis for v in known):
            return self._unknown(call, "joins tensors whose channels lie on different axes")
        axis = self.channels[known[0]].axis
        reason = f"joined by {self._where(call)} with a value whose channels are not known"
        parts = [self.channels.get(v) or Channels(self._fresh(v.shape[axis], reason), axis) for v in values]
        if along == axis:
            out, rule = Channels(np.concatenate([p.ids for p in parts]), axis), "join"
        else:
            for other in parts[1:]:
                self.flow.link(parts[0].ids, other.ids)
            out, rule = Channels(parts[0].ids, axis), "all"
        self.channels[call.outputs[0]] = out
        self.flow.steps.append(Step(rule, tuple(parts), out, where=self._where(call)))

    # -- space and shape ------------------------------------------------------------------------------------------
    def _spatial(self, call: Call) -> None:
        source = self.channels.get(_arg(call, 0, "input"))
        if source is None:
            return
        rule = "keep"
        if call.name == "pad":
            covered = len(_arg(call, 1, "pad")) // 2
            constant = _arg(call, 2, "mode", "constant") == "constant"
            rule = "lose" if constant and _arg(call, 3, "value", None) not in (None, 0, 0.0) else "keep"
        elif call.name in RESIZERS:
            covered = len(call.outputs[0].shape) - 2
        else:
            covered = POOLS[call.name]
        if -source.axis <= covered:
            return self._unknown(call, "works along the channels")
        self._pass_on(call, source, rule)

    def _move(self, call: Call) -> None:
        """Run the function on a tensor whose elements are their channels' numbers, and read off where they went."""
        value = _arg(call, 0, "input")
        source = self.channels.get(value) if isinstance(value, Value) else None
        if any(v is not value for v in call.inputs) and not call.name.endswith("_as"):
            return self._unknown(call, "takes several tensors")
        if source is None:
            return
        n = len(source.ids)
        shape = [1] * len(value.shape)
        shape[source.axis] = n
        kind = torch.float64 if call.name in REDUCTIONS else torch.int32
        numbered = torch.arange(n, dtype=kind).view(shape).expand(value.shape)
        if call.name in SHAPED:  # a view needs real memory
            numbered = numbered.contiguous()

        def stand_in(leaf: Any) -> Any:
            if not isinstance(leaf, Value):
                return leaf
            return numbered if leaf is value else torch.empty(leaf.shape)

        args, kwargs = map_leaves(stand_in, (call.args, call.kwargs))
        function = torch.mean if call.name == "sum" else call.function
        if call.name == "sum":
            kwargs.pop("dtype", None)
        moved = function(*args, **kwargs)
        for out, result in zip(call.outputs, moved if isinstance(moved, tuple | list) else (moved,), strict=True):
            axis, index = _channel_axis(result, n)
            if index is None:
                self.flow.pin(source.ids, f"{self._where(call)} takes the channels apart at a fixed place")
                continue
            channels = Channels(source.ids[index], axis)
            self.channels[out] = channels
            self.flow.steps.append(Step("keep", (source,), channels, index=index, where=self._where(call)))
            if call.name in SHAPED and out.shape[axis] in leaves((call.args[1:], call.kwargs)):
                self.written_widths.append((self._where(call), source.ids))


def _channel_axis(numbered: torch.Tensor, n: int) -> tuple[int, np.ndarray | None]:
    """Find the axis (from the right) along which channel numbers vary, and the channel of each place on it.

    None in place of the channels if they vary along no axis or several, or are not all there in order, each repeated
    equally often.
    """
    axes = [
        d
        for d in range(numbered.dim())
        if numbered.shape[d] > 1 and numbered.stride(d) != 0 and bool((numbered != numbered.narrow(d, 0, 1)).any())
    ]
    if len(axes) != 1:
        return 0, None
    first = numbered
    for d in range(numbered.dim()):
        if d != axes[0]:
            first = first.narrow(d, 0, 1)
    index = first.flatten().numpy().astype(np.int64)
    if len(index) % n or (index != np.repeat(np.arange(n), len(index) // n)).any():
        return 0, None
    return axes[0] - numbered.dim(), index


def _arg(call: Call, position: int, name: str, default: Any = None) -> Any:
    return call.args[position] if len(call.args) > position else call.kwargs.get(name, default)


def _spans_zero(call: Call) -> bool:
    """Whether a clamp leaves zero where it is."""
    low = _arg(call, 1, "min_val", call.kwargs.get("min"))
    high = _arg(call, 2, "max_val", call.kwargs.get("max"))
    if call.name == "hardtanh":
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    numbers = all(v is None or isinstance(v, int | float) for v in (low, high))
    return numbers and (low is None or low <= 0) and (high is None or high >= 0)


def _power(call: Call) -> bool:
    exponent = _arg(call, 1, "exponent")
    return isinstance(call.args[0], Value) and isinstance(exponent, int | float) and exponent > 0
