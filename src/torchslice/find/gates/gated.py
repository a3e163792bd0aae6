"""Gates: small trainable networks that decide, sample by sample, which neurons of a layer take part.

Shapes: B batch, N neurons of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import TorchsliceError
from ...graph.neurons import Neurons, check_neurons
from ...graph.record import check_model
from ...graph.views import copy_of
from ...inputs import kept_tokens
from ...registry import unknown

NARROW = 128  # from this many neurons on, the hidden layer of a gate has half as many units


class Gate(nn.Module):
    """The mask generator of modularizing while training (arXiv 2306.09376, section 3.1).

    For a layer with input x: z = mean of x over its positions (of texts, the tokens that are no padding), h =
    relu(W1 z), m = relu(tanh(W2 h + b)), one value in [0, 1) for every neuron of the layer. A gate counts as on when
    its value is above 0.

    The channels of the layer's input lie on `axis`: 1 for a convolution, -1 for a linear layer. W1 and W2 start
    Kaiming-normal, b at 1.
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

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return the gate values of a layer's input, float32 [B, N], also inside autocast.

        Where the positions of x are tokens, `kept`, bool [B, T], says which are no padding.
        """
        positions = [axis for axis in range(1, x.dim()) if axis != self.axis % x.dim()]
        with torch.autocast(x.device.type, enabled=False):
            if kept is not None and self.axis == -1 and x.shape[:-1] == kept.shape:
                z = torch.where(kept[:, :, None], x, 0).sum(1).float() / kept.sum(1, keepdim=True)
                return self._values(z)
            # A sum, because its gradient needs no memory of the size of x, as that of a mean in another precision does.
            z = x.sum(positions).float() / math.prod(x.shape[axis] for axis in positions) if positions else x.float()
            return self._values(z)

    def _values(self, z: Tensor) -> Tensor:
        return self.excite(self.squeeze(z).relu()).tanh().relu()


class GatedModel(nn.Module):
    """A model whose layers are gated while it runs; made by `attach`.

    Attributes:
        model: the user's model itself, of which `neurons` are; its modules carry hooks during `forward` only.
        layers: names of the gated layers, in forward order; `gates` holds their gates in the same order.
        gate_values: {layer: float32 [B, N]} of the last forward pass. If a layer ran several times, each time with a
            mask of its own, the largest values.
    """

    def __init__(self, neurons: Neurons, gates: Mapping[str, Gate]) -> None:
        super().__init__()
        self.model, self.neurons = neurons.model, neurons
        self.layers = tuple(gates)
        self.gates = nn.ModuleList(gates.values())
        self.gate_values: dict[str, Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with the neurons of every gated layer multiplied by their gates."""
        self.gate_values = {}
        kept = kept_tokens(kwargs)
        with ExitStack() as hooks:
            for name, gate in zip(self.layers, self.gates, strict=True):
                for handle in self._hook(name, gate, kept):
                    hooks.enter_context(handle)
            return self.model(*args, **kwargs)

    def _hook(self, name: str, gate: nn.Module, kept: Tensor | None) -> list[Any]:
        """Let a layer's gate read its input, and mask its neurons and their followers."""
        layer = self.neurons.layers[name]
        run: dict[str, Tensor] = {}  # the gate values of the run of the layer that is under way, float32 [B, rows]

        def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            mask = gate(args[0], kept)
            run["mask"] = self._by_row(name, mask)
            before = self.gate_values.get(name)
            self.gate_values[name] = mask if before is None else torch.maximum(before, mask)

        def multiply(module: nn.Module, args: object, output: Tensor) -> Tensor:
            shape = [len(output), *[1] * (output.dim() - 1)]
            shape[layer.axis] = -1
            return output * run["mask"].to(output.dtype).view(shape)

        masked = (self.model.get_submodule(place) for place in (layer.mask_after, *layer.followers))
        handles = [self.model.get_submodule(name).register_forward_pre_hook(read)]
        return handles + [module.register_forward_hook(multiply) for module in masked]

    def _by_row(self, name: str, values: Tensor) -> Tensor:
        """Return values of a layer's neurons, [..., N], for each of its rows; rows that follow get 1."""
        rows = torch.from_numpy(self.neurons.rows[name]).to(values.device)  # -1 for those
        return torch.cat([values, torch.ones_like(values[..., :1])], -1)[..., rows]

    def fold(self, scales: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Return a copy of the model without gates, the given scales multiplied into its weights.

        The scales are {layer: float [N]}, for example gate values averaged over the classes a sub-model is for; layers
        that are not named keep the scale 1, as if their gates were dropped.

        >>> mean = ts.gates.statistics(gated, task, progress=False).mean
        >>> plain = gated.fold({layer: values[[3, 8]].mean(0) for layer, values in mean.items()})
        """
        model = copy_of(self.model, {})
        for name, scale in (scales or {}).items():
            if name not in self.layers:
                raise unknown("gated layer", name, self.layers)
            layer = self.neurons.layers[name]
            if scale.shape != (layer.count,):
                raise TorchsliceError(f"layer {name!r} has {layer.count} neurons, its scale is {list(scale.shape)}.")
            scale = self._by_row(name, scale)
            for place in (layer.mask_after, *layer.followers):
                module = model.get_submodule(place)
                own = {
                    key: found for key in ("weight", "bias") if isinstance(found := getattr(module, key, None), Tensor)
                }
                if not own:
                    what = f"{place!r} ({type(module).__name__}) has no weight a scale could go into"
                    raise TorchsliceError(f"{what}; build it with affine=True.")
                port = self.neurons.flow.ports[place]
                with torch.no_grad():
                    for key, tensor in own.items():
                        rows = tensor.movedim(port.row_axis(key), 0)  # [rows, ...]
                        rows.mul_(scale.to(tensor).view(-1, *[1] * (tensor.dim() - 1)))
        return model

    def __getstate__(self) -> dict[str, Any]:
        """Leave the values of the last batch out of copies: they belong to its autograd graph."""
        return {**self.__dict__, "gate_values": {}}


def attach(neurons: Neurons, *, layers: Sequence[str] | None = None, seed: int = 0) -> GatedModel:
    """Give layers of any model gates, to be trained together with it.

    The model is kept inside, not copied. Gated are the named `layers`, by default every convolution but the first, or
    the hidden linear layers if there is no such convolution. The `seed` is of the gates' weights.

    >>> net = ts.models.create("convnet", num_classes=10, channels=1, width=0.25)
    >>> gated = ts.gates.attach(ts.find_neurons(net, task.example))
    >>> logits = gated(task.example)
    >>> gated.gate_values[gated.layers[0]].shape
    torch.Size([2, 8])
    """
    check_neurons(neurons)
    ports = neurons.flow.ports
    convolutions = [name for name, layer in neurons.layers.items() if layer.kind == "conv"]
    others = [name for name in neurons.layers if name not in convolutions and not ports[name].taken]
    default = convolutions[1:] or others
    chosen = default if layers is None else list(dict.fromkeys(layers))
    if not chosen:
        raise TorchsliceError("no layer to gate: name at least one, or give a model with a second convolution to cut.")
    generator, gates = torch.Generator().manual_seed(seed), {}
    for name in chosen:
        if name in neurons.pinned:
            raise TorchsliceError(
                f"layer {name!r} cannot be gated because it cannot be cut: {neurons.pinned[name]}. "
                f"Choose among {', '.join(neurons.layers)}."
            )
        if name not in neurons.layers:
            raise unknown("layer", name, neurons.layers)
        if ports[name].taken:
            raise TorchsliceError(
                f"layer {name!r} cannot be gated: another module takes its weight and does not call it. Choose others."
            )
        layer, module = neurons.layers[name], neurons.model.get_submodule(name)
        ins: Any = ports[name].ins
        gates[name] = Gate(len(ins), layer.count, axis=layer.axis, generator=generator)
        gates[name].to(next(module.parameters()).device).train(neurons.model.training)
    return GatedModel(neurons, gates)


def check_gated(model: Any) -> GatedModel:
    """Return a model with gates as it is; raise for one without, or wrapped, with what to do."""
    check_model(model)
    if not isinstance(model, GatedModel):
        raise TorchsliceError(
            f"needed is a model with gates, got {type(model).__name__}; make one with gates.attach(neurons)."
        )
    return model
