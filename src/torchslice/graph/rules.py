"""What each tensor function does to channels and zeros.

A function that is not listed here pins the channels that it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from .flow import Channels, Step
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
    PRODUCTS,
    REDUCTIONS,
    RESIZERS,
    SIZED,
    TRANSPOSED,
    ZERO_GOES,
    ZERO_STAYS,
)
from .ground import CONVS, TRANSPOSED_CONVS, arg
from .joins import Joins
from .layers import Conv, Depthwise, Grouped, GroupNorm, Linear, Norm, Port, PReLU, Transposed, TransposedConv
from .record import Call, Recording, Value

OWN = {*CONVOLUTIONS, *TRANSPOSED, *NORMS, *MIXERS, "linear", "prelu", "addmm", "matmul", "group_norm"}


class Rules(Joins):
    """Turns a recording into a Flow, call by call."""

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        super().__init__(model, recording)
        rules = self._table()
        for call in recording.calls:
            self._note_parameters(call)
            self.made |= {value: (call, place) for place, value in enumerate(call.outputs)}
            if any(value.dynamic or value.learned for value in call.outputs):
                rules.get(call.name, self._unknown)(call)
            elif call.name in SIZED:
                self._move(call)

    def _note_parameters(self, call: Call) -> None:
        """A layer's parameters may be cut only if nothing but the layer's own call reads them."""
        for value in call.inputs:
            owner = (value.parameter or "").rpartition(".")[0]
            if value.parameter and not (call.name in OWN and owner == call.module):
                own = owner == call.module and isinstance(self.modules[owner], CONVS)
                what = "its weight is computed by" if own else "its parameters are read by"
                self.elsewhere.setdefault(owner, f"{what} {self._where(call)}")

    def _table(self) -> dict[str, Callable[[Call], None]]:
        rules: dict[str, Callable[[Call], None]] = {
            "linear": self._linear,
            "addmm": self._addmm,
            "prelu": self._prelu,
            "group_norm": self._group_norm,
            "scaled_dot_product_attention": self._attention,
            "einsum": self._einsum,
            "masked_fill": self._masked,
            "addcmul": self._addcmul,
            "stack": self._stack,
        }
        for names, rule in (
            ({*ZERO_STAYS, *ZERO_GOES, *CLAMPS, "pow"}, self._elementwise),
            ({*POOLS, *RESIZERS, "pad"}, self._spatial),
            (CONVOLUTIONS, self._convolution),
            (TRANSPOSED, self._transposed_convolution),
            (NORMS, self._norm),
            ({*ADDITIVE, *MULTIPLICATIVE, *DIVISION}, self._binary),
            (CONCATENATIONS, self._cat),
            (MIXERS, self._mix),
            (REDUCTIONS, self._reduce),
            (PRODUCTS, self._product),
        ):
            rules |= dict.fromkeys(names, rule)
        single = {name: partial(self._single, rule) for name, rule in rules.items()}
        return single | dict.fromkeys(MOVES, self._move)

    def _single(self, rule: Callable[[Call], None], call: Call) -> None:
        (rule if len(call.outputs) == 1 else self._unknown)(call)

    # -- layers ---------------------------------------------------------------------------------------------------
    def _on_axis(self, call: Call, value: Value, axis: int) -> Channels:
        """Return the channels of a value on `axis`; values without known channels there get fresh, pinned ones."""
        known, width = self._known(value), value.shape[axis]
        if known is not None and known.axes == ((axis,) if width > 1 else ()):
            return known
        if known is not None:
            self.flow.pin(known.ids, f"{self._where(call)} works along another axis")
        reason = "fed by the network's input or by a function torchslice does not know"
        return Channels(self._fresh(width, reason).reshape(-1, *[1] * (-axis - 1)))

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

    def _layer(self, call: Call, kind: type[Port], x: Value, axis: int, width: int) -> Port:
        """Note a layer that reads the channels on an axis and makes new ones there."""
        ins = self._on_axis(call, x, axis)
        port = self._port(call.module, kind, None, ins.ids.ravel(), width)
        out = Channels(port.outs.reshape(-1, *[1] * (-axis - 1)))
        self.flow.steps.append(Step("sink", (ins,), where=call.module))
        self.flow.steps.append(Step("make", (ins,), out, call.module))
        self.channels[call.outputs[0]] = out
        return port

    def _positions(self, value: Value, axis: int) -> int:
        """Return at how many places per sample a tensor has its channels; windows and frames lie on the first axis."""
        return max(1, int(np.prod(value.shape)) // value.shape[axis] // self.batch)

    def _convolution(self, call: Call) -> None:
        x, weight, dims = arg(call, 0, "input"), arg(call, 1, "weight"), CONVOLUTIONS[call.name]
        module = self._module(call, CONVS, weight)
        if not isinstance(module, CONVS) or len(x.shape) < dims + 2:
            return self._unknown(call, self.elsewhere.get(call.module, "not a plain convolution layer over a batch"))
        axis = -(dims + 1)
        groups, out, layer = module.groups, call.outputs[0], call.module
        if groups > 1 and groups == module.in_channels:
            ins = self._on_axis(call, x, axis)
            index = np.repeat(np.arange(groups), module.out_channels // groups)
            port = self._port(layer, Depthwise, ins.ids.ravel()[index], ins.ids.ravel())
            shape = (-1, *[1] * dims)
            self.channels[out] = self._step(
                call, "hold", [ins], port.outs.reshape(shape), layer=layer, index=index.reshape(shape)
            )
        else:
            port = self._layer(call, Conv if groups == 1 else Grouped, x, axis, module.out_channels)
        port.groups, port.kernel = groups, int(np.prod(module.kernel_size))
        port.positions += self._positions(out, axis)

    def _transposed_convolution(self, call: Call) -> None:
        x, weight, dims = arg(call, 0, "input"), arg(call, 1, "weight"), TRANSPOSED[call.name]
        module = self._module(call, TRANSPOSED_CONVS, weight)
        if not isinstance(module, TRANSPOSED_CONVS) or module.groups > 1:
            return self._unknown(call, self.elsewhere.get(call.module, "not a plain convolution layer of one group"))
        port = self._layer(call, TransposedConv, x, -(dims + 1), module.out_channels)
        port.kernel = int(np.prod(module.kernel_size))
        port.positions += self._positions(x, -(dims + 1))

    def _linear(self, call: Call) -> None:
        x, weight = arg(call, 0, "input"), arg(call, 1, "weight")
        module = self._module(call, (nn.Linear,), weight)
        if not isinstance(module, nn.Linear):
            return self._unknown(call, self.elsewhere.get(call.module, "not a plain linear layer"))
        port, out = self._layer(call, Linear, x, -1, module.out_features), call.outputs[0]
        port.positions += self._positions(out, -1)
        bias = arg(call, 2, "bias")
        if isinstance(bias, Value) and bias.parameter not in (f"{call.module}.bias", "bias"):
            product = Value(out.shape, True)
            self.channels[product] = self.channels[out]
            self._join(call, (product, bias), "all", out)

    def _product(self, call: Call) -> None:
        a, b = arg(call, 0, "input"), arg(call, 1, "other", arg(call, 1, "mat2"))
        if call.name == "rmatmul":
            a, b = b, a
        if b.parameter in self.parameters and self._known(b) is None:
            return self._matrix(call, a, b)
        self._contract(call, a, b, call.outputs[0])

    def _matrix(self, call: Call, x: Value, weight: Value) -> None:
        """A module that multiplies with its weight [inputs, outputs] from the right."""
        module = self._module(call, (nn.Module,), weight)
        if module is None or len(weight.shape) != 2 or {*module._parameters} - {"weight", "bias"}:
            return self._unknown(call, self.elsewhere.get(call.module, "not a layer of its own"))
        port = self._layer(call, Transposed, x, -1, weight.shape[1])
        port.positions += self._positions(call.outputs[0], -1)

    def _addmm(self, call: Call) -> None:
        bias, x, weight = (arg(call, place, name) for place, name in enumerate(("input", "mat1", "mat2")))
        if call.kwargs.keys() - {"input", "mat1", "mat2"} or not bias.parameter or not weight.parameter:
            return self._unknown(call)
        self._matrix(call, x, weight)

    def _norm(self, call: Call) -> None:
        x = arg(call, 0, "input")
        weight = next((v for v in (arg(call, 3, "weight"),) if isinstance(v, Value)), None)
        module = self._module(call, (nn.modules.batchnorm._NormBase,), weight)
        source = self._known(x)
        if module is None or source is None or source.axes not in ((1 - len(x.shape),), ()):  # () is one channel
            return self._unknown(call, "not a norm of the channels alone")
        self._port(call.module, Norm, source.ids.ravel())
        self.channels[call.outputs[0]] = self._step(call, "hold", [source], source.ids, layer=call.module)

    def _group_norm(self, call: Call) -> None:
        """Whole groups of channels stay or go."""
        x, groups = arg(call, 0, "input"), int(arg(call, 1, "num_groups"))
        source = self._known(x)
        if source is None:
            return
        module = self._module(call, (nn.GroupNorm,), arg(call, 2, "weight"))
        if module is None or source.axes != (1 - len(x.shape),) or groups == 1:
            return self._unknown(call, "it mixes the channels")
        n = source.ids.size
        grouped = Value((groups, n // groups), True)
        self._rearranged(call, x, grouped, lambda ids: ids.reshape(groups, -1))
        whole = self._fix(call, self.channels[grouped], {-1}, "")
        assert whole is not None
        port = self._port(call.module, GroupNorm, source.ids.ravel())
        port.groups = groups
        index = np.repeat(np.arange(groups), n // groups).reshape(source.ids.shape)
        self.channels[call.outputs[0]] = self._step(call, "hold", [whole], source.ids, layer=call.module, index=index)

    def _prelu(self, call: Call) -> None:
        x, weight = arg(call, 0, "input"), arg(call, 1, "weight")
        if isinstance(weight, Value) and int(np.prod(weight.shape)) > 1:
            source = self._known(x)
            if self._module(call, (nn.PReLU,), weight) is None or source is None or source.axes != (1 - len(x.shape),):
                return self._unknown(call, "not a plain PReLU layer")
            self._port(call.module, PReLU, source.ids.ravel())
        self._elementwise(call)
