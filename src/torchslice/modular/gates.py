"""Gates: small trainable networks that say, sample by sample, which neurons of a layer take part.

Shapes: B batch, N neurons of a layer, S positions (pixels or tokens).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.find import find_neurons
from ..core.neurons import Layer, Neurons
from ..core.record import check_model, evaluating
from ..errors import TorchsliceError
from ..registry import unknown
from .scale import PASSES_OR_STOPS, position_mean, scale

NARROW = 128  # from this many neurons on, the hidden layer of a gate has half as many units


class Gate(nn.Module):
    """The mask generator of modularizing while training (arXiv 2306.09376, section 3.1).

    For a layer with input x: z = mean of x over its positions, h = relu(W1 z), m = relu(tanh(W2 h + b)), one value in
    [0, 1) for every neuron of the layer. A gate counts as on when its value is above 0.

    Args:
        inputs: channels (axis 1) of the layer's input, or features of its last axis.
        neurons: N.
        axis: of the channels: 1 for a convolution, -1 for a linear layer.
        generator: of the Kaiming-normal weights; b starts at 1.

    >>> Gate(64, 128)(torch.randn(8, 64, 32, 32)).shape
    torch.Size([8, 128])
    """

    def __init__(self, inputs: int, neurons: int, *, axis: int = 1, generator: torch.Generator | None = None) -> None:
        super().__init__()
        hidden = neurons if neurons < NARROW else neurons // 2
        self.axis = axis
        self.squeeze = nn.Linear(inputs, hidden, bias=False)
        self.excite = nn.Linear(hidden, neurons)
        for linear in (self.squeeze, self.excite):
            nn.init.kaiming_normal_(linear.weight, generator=generator)
        nn.init.ones_(self.excite.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gate values of a layer's input, float32 [B, N], also inside autocast."""
        with torch.autocast(x.device.type, enabled=False):
            return self.excite(self.squeeze(position_mean(x, self.axis)).relu()).tanh().relu()


class GatedModel(nn.Module):
    """A model whose layers are gated while it runs; made by `attach_gates`.

    Attributes:
        model: the user's model itself; its modules carry hooks during `forward` only.
        neurons: the Neurons of the model.
        layers: names of the gated layers, in forward order; `gates` holds their gates in the same order.
        gate_values: {layer: float32 [B, N]} of the last forward pass. Of a layer that ran several times, each time with
            a mask of its own, the largest values.

    Training overwrites a gated layer's activations during the backward pass: copy them if you look at them later.
    """

    def __init__(
        self, model: nn.Module, neurons: Neurons, gates: Mapping[str, Gate], rewritten: Mapping[str, int | None]
    ):
        super().__init__()
        self.model = model
        self.neurons = neurons
        self.layers = tuple(gates)
        self.gates = nn.ModuleList(gates.values())
        self.gate_values: dict[str, Tensor] = {}
        self._rewritten = dict(rewritten)  # name of a scaled sub-module -> what follows it, see `scale`

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """Run the model with every gated layer's neurons multiplied by their gates."""
        self.gate_values = {}
        with self._gating():
            return self.model(*inputs, **options)

    @contextmanager
    def _gating(self) -> Iterator[None]:
        handles = []
        try:
            for name, gate in zip(self.layers, self.gates, strict=True):
                layer, current = self.neurons.layers[name], _Current()
                read = self._reader(name, gate, current)
                handles.append(self.model.get_submodule(name).register_forward_pre_hook(read))
                for held in (layer.hold, *layer.followers):
                    multiply = self._multiplier(layer.axis, self._rewritten[held], current)
                    handles.append(self.model.get_submodule(held).register_forward_hook(multiply))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _reader(self, name: str, gate: nn.Module, current: _Current) -> Any:
        def read(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            current.values = values = gate(inputs[0])  # [B, N]
            before = self.gate_values.get(name)
            self.gate_values[name] = values if before is None else torch.maximum(before, values)

        return read

    @staticmethod
    def _multiplier(axis: int, rewrites: int | None, current: _Current) -> Any:
        def multiply(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            return scale(output, current.values, axis, rewrites=rewrites)

        return multiply

    def fold(self, scales: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Return a copy of the model without gates, the given scales multiplied into its weights.

        Args:
            scales: {layer: float [N]}, for example gate values averaged over the classes a sub-model is for; layers
                that are not named keep the scale 1, as if their gates were dropped.

        >>> plain = gated.fold({name: mean[[3, 5]].mean(0) for name, mean in mean_gate_values(gated, data).items()})
        """
        model = copy.deepcopy(self.model)
        for name, factor in (scales or {}).items():
            if name not in self.layers:
                raise unknown("gated layer", name, self.layers)
            layer = self.neurons.layers[name]
            if factor.shape != (layer.count,):
                raise TorchsliceError(f"layer {name!r} has {layer.count} neurons, its scale is {list(factor.shape)}.")
            for held in (layer.hold, *layer.followers):
                _multiply_weights(model.get_submodule(held), held, factor)
        return model

    def __getstate__(self) -> dict[str, Any]:
        """Leave the values of the last batch out of copies: they belong to its autograd graph."""
        return {**self.__dict__, "gate_values": {}}


class _Current:
    """The gate values of the run of a layer that is under way, float32 [B, N]."""

    values: Tensor


def attach_gates(
    model: nn.Module, example: Tensor, *, layers: Sequence[str] | None = None, seed: int = 0
) -> GatedModel:
    """Give the layers of any model gates, to be trained together with it.

    Args:
        model: network with logits [B, C] as output; it is kept inside, not copied.
        example: batch of inputs [B, ...], to find the neurons with.
        layers: names of the layers to gate. By default every convolution but the first; the hidden linear layers if
            there is no such convolution.
        seed: of the gates' weights.

    >>> gated = attach_gates(model, data.example)
    >>> logits = gated(images)
    >>> gated.gate_values["layer1.0.conv1"]  # [B, 64]
    """
    neurons = find_neurons(model, example)
    chosen = _default_layers(model, neurons) if layers is None else list(dict.fromkeys(layers))
    for name in chosen:
        if name in neurons.pinned:
            raise TorchsliceError(
                f"layer {name!r} cannot be gated because it cannot be cut: {neurons.pinned[name]}. "
                f"Choose among {', '.join(neurons.layers)}."
            )
        if name not in neurons.layers:
            raise unknown("layer", name, neurons.layers)
    if not chosen:
        raise TorchsliceError("no layer to gate: name at least one, or give a model with a second convolution to cut.")
    generator = torch.Generator().manual_seed(seed)
    gates = {}
    for name in chosen:
        layer, module = neurons.layers[name], model.get_submodule(name)
        inputs = module.in_features if isinstance(module, nn.Linear) else module.in_channels
        gates[name] = Gate(int(inputs), layer.count, axis=layer.axis, generator=generator)  # type: ignore[arg-type]
        gates[name].to(next(module.parameters()).device).train(model.training)
    return GatedModel(model, neurons, gates, _rewrites(model, example, [neurons.layers[name] for name in chosen]))


def check_gated(model: Any) -> GatedModel:
    """Return a model with gates as it is; raise for one without, or wrapped, with what to do."""
    check_model(model)
    if not isinstance(model, GatedModel):
        raise TorchsliceError(
            f"needed is a model with gates, got {type(model).__name__}; make one with attach_gates(model, example)."
        )
    return model


def _default_layers(model: nn.Module, neurons: Neurons) -> list[str]:
    convolutions = [name for name, layer in neurons.layers.items() if layer.kind == "conv"]
    linear = [name for name, layer in neurons.layers.items() if layer.kind == "linear"]
    return convolutions[1:] or linear


def _rewrites(model: nn.Module, example: Tensor, layers: Sequence[Layer]) -> dict[str, int | None]:
    """Return for each sub-module to scale how often a later in-place activation rewrites its output; None if unsafe.

    Safe is an output that nothing rewrites, or just one ReLU-like function: see `scale`.
    """
    seen: dict[str, list[tuple[Tensor, int]]] = {
        held: [] for layer in layers for held in (layer.hold, *layer.followers)
    }
    handles = [
        model.get_submodule(held).register_forward_hook(
            lambda module, inputs, output, held=held: seen[held].append((output, output._version))
        )
        for held in seen
    ]
    try:
        with evaluating(model), torch.enable_grad():
            model(example.detach().clone().requires_grad_(example.is_floating_point()) * 1)
    finally:
        for handle in handles:
            handle.remove()

    def rewrites(output: Tensor, before: int) -> int | None:
        count = output._version - before
        last = type(output.grad_fn).__name__
        return count if count == 0 or (count == 1 and last in PASSES_OR_STOPS) else None

    found = {held: {rewrites(*output) for output in outputs} for held, outputs in seen.items()}
    return {held: next(iter(counts)) if len(counts) == 1 else None for held, counts in found.items()}


def _multiply_weights(module: nn.Module, name: str, factor: Tensor) -> None:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor):
        raise TorchsliceError(
            f"{name!r} ({type(module).__name__}) has no weight a scale could go into; build it with affine=True."
        )
    with torch.no_grad():
        factor = factor.to(weight)
        weight.mul_(factor.view(-1, *[1] * (weight.dim() - 1)))
        if bias is not None:
            bias.mul_(factor)
