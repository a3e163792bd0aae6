"""Cut the part of a network that a slice describes out as a plain, smaller network, and check it against the mask."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import TorchsliceError, first_line
from ..graph.layers import Flags, Port
from ..graph.neurons import Neurons
from ..graph.plan import build, place_of, plan, tensors_of
from ..graph.record import evaluating, full_precision
from ..graph.views import view_of
from ..inputs import map_tensors, run
from ..slices import Slice

#: Largest difference allowed between two networks that compute the same, as a share of the largest logit (at least 1).
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def extract(neurons: Neurons, slice_: Slice, *, classes: Sequence[str | int] | None = None) -> nn.Module:
    """Return a new, smaller network that computes what the model computes with the neurons outside a slice at zero.

    The result is made of plain layers of the same types, without the hooks on the model's; the model is not changed.
    Every call checks the cut network against the masked one on the example.

    Args:
        classes: names or indices of at least two classes; only their logits remain, in the model's order.

    Raises TorchsliceError for a slice of another model, an empty slice or layer, bad classes, and a cut that does not
    compute the same.

    >>> small = extract(neurons, slices["3"] | slices["8"], classes=["3", "8"])
    >>> small(task.example).shape
    torch.Size([2, 2])
    """
    indices = None if classes is None else _checked_classes(neurons, classes)
    what = plan(neurons, slice_, indices)
    small = build(neurons.model, what)
    check_close(small, neurons, held_view(neurons, what.held), "cut", classes=indices)
    return small


def masked(neurons: Neurons, slice_: Slice) -> nn.Module:
    """Return a view of the model in which the neurons outside a slice are held at zero.

    It shares the model's parameters; the model itself is not touched. A neuron is held after the norm that follows it;
    a norm or depthwise convolution whose input channel is held is held there too.

    >>> logits = masked(neurons, slices["3"] | slices["8"])(task.example)
    """
    held = plan(neurons, slice_).held  # says what is wrong
    return held_view(neurons, held)


def held_view(neurons: Neurons, held: Mapping[str, Flags]) -> nn.Module:
    """Return a view of a model in which outputs of sub-modules are held at zero, {name: bool [n] over its channels}."""
    view = view_of(neurons.model)
    for name, flags in held.items():
        port = neurons.flow.ports[name]
        after = neurons.layers[name].mask_after if name in neurons.layers else name
        if after != name and after in held and np.array_equal(held[after], flags):
            continue  # the norm that reads nothing else makes up for it
        if port.taken:
            view.register_forward_pre_hook(partial(_hide, name, port, torch.as_tensor(flags)))
        else:
            zeroed = partial(_zeroed, torch.as_tensor(flags), port.axis)
            view.get_submodule(name).register_forward_hook(zeroed)
    return view


def _hide(name: str, port: Port, flags: Tensor, view: nn.Module, inputs: object) -> None:
    """Set tensors with rows of zeros as attributes, which Python finds before the parameters of the same names."""
    hidden = {key: tensor.clone() for key, tensor in tensors_of(view, name, port).items() if tensor is not None}
    port.zero(hidden, flags)
    vars(view.get_submodule(place_of(name, port))).update(hidden)


def _zeroed(flags: Tensor, axis: int, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    if output.is_nested:  # the padded texts of nn.TransformerEncoder
        return torch.nested.as_nested_tensor([_zeroed(flags, axis, module, inputs, text) for text in output.unbind()])
    shape = [1] * output.dim()
    shape[axis] = -1
    return output.masked_fill(flags.to(output.device).view(shape), 0)


def check_close(
    network: nn.Module,
    neurons: Neurons,
    reference: nn.Module,
    what: str,
    *,
    classes: Sequence[int] | None = None,
    new_logits: int = 0,
) -> None:
    """Raise unless a network that was made from a model answers the model's example as a reference does.

    Of the reference the logits of some `classes` are looked at, of the network all but the last `new_logits`.
    """
    try:
        actual, expected = _logits((network, reference), neurons)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise TorchsliceError(
            f"the {what} network cannot run ({first_line(error)}): its forward depends on a width that changed. Let "
            "forward read widths from the tensors it gets."
        ) from error
    actual = actual[:, : actual.shape[1] - new_logits]
    expected = expected if classes is None else expected[:, classes]
    allowed = TOLERANCE.get(expected.dtype, 1e-5) * max(1.0, float(expected.abs().max()))
    difference = float((actual - expected).abs().max()) if actual.shape == expected.shape else float("nan")
    if not difference <= allowed:
        raise TorchsliceError(
            f"the {what} network differs from what it must compute by {difference:.2g} on the example (allowed: "
            f"{allowed:.2g}); nothing is returned. Check that the model gives finite, repeatable logits in eval mode "
            "on this example, and that no hook on it changes them: the cut network has none."
        )


def _logits(networks: Sequence[nn.Module], neurons: Neurons) -> list[Tensor]:
    """Return the logits of networks on the example of some neurons.

    With 16 bits a wrong cut looks like rounding, so copies in float32 answer, unless the code insists on its 16 bits.
    """
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in networks[-1].parameters()):
        sample = map_tensors(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, neurons.sample)
        wide = replace(neurons, sample=sample)
        with suppress(RuntimeError):
            return [eval_logits(copy.deepcopy(network).float(), wide) for network in networks]
    return [eval_logits(network, neurons) for network in networks]


def eval_logits(network: nn.Module, neurons: Neurons) -> Tensor:
    """Return the logits [B, C] of a network in eval mode on the example of some neurons."""
    with evaluating(network), full_precision():
        return run(network, neurons.example, neurons.output)


def _checked_classes(neurons: Neurons, classes: Sequence[str | int]) -> list[int]:
    """Return the indices of at least two classes whose logits come straight from a layer."""
    indices = neurons.class_indices(classes)
    if len(indices) < 2:
        raise TorchsliceError(
            f"a classifier needs at least two classes, got {list(classes)}. Add a class to tell it from."
        )
    if not neurons.head:
        raise TorchsliceError(
            "the logits do not come straight from a layer, so single classes cannot be cut. Extract without classes= "
            "and choose among the logits yourself."
        )
    return indices


@dataclass(frozen=True)
class Retention:
    """What remains, as fractions in [0, 1] of the whole model.

    `neuron`, `param`, `mac` count what the slice keeps: a weight is kept if both its neurons are. `built_param` and
    `built_mac` count what the extracted network has: shared residual channels and zero rows included.
    Multiply-accumulates are those of convolutions and linear layers.
    """

    neuron: float
    param: float
    mac: float
    built_param: float
    built_mac: float

    def __str__(self) -> str:
        return (
            f"slice keeps {self.neuron:.1%} of the neurons, {self.param:.1%} of the parameters, {self.mac:.1%} of the "
            f"MACs; the network built from it has {self.built_param:.1%} of the parameters, {self.built_mac:.1%} of "
            "the MACs"
        )


def retention(neurons: Neurons, slice_: Slice, *, classes: Sequence[str | int] | None = None) -> Retention:
    """Return what a slice keeps of a model, without building the smaller network.

    >>> print(retention(neurons, neurons.full()))
    slice keeps 100.0% of the neurons, 100.0% of the parameters, 100.0% of the MACs; the network built ...
    """
    layers = plan(neurons, slice_, None if classes is None else _checked_classes(neurons, classes)).layers
    held = {
        name: [t for t in tensors_of(neurons.model, name, layer.port).values() if isinstance(t, nn.Parameter)]
        for name, layer in layers.items()
    }
    ports = [layer.port for layer in layers.values()]
    macs = sum(p.positions * len(p.outs) * len(p.ins) // p.groups * p.kernel for p in ports if p.ins is not None) or 1
    whole = sum(p.numel() for p in neurons.model.parameters())
    fixed = whole - sum(p.numel() for parameters in held.values() for p in parameters)
    fractions = []
    for as_built in (False, True):
        params, left = fixed, 0
        for name, layer in layers.items():
            outs = layer.outs if as_built else layer.outs & ~layer.held
            params += int(outs.sum()) * sum(p.dim() == outs.ndim for p in held[name])
            if layer.ins is not None:
                ins = layer.ins if as_built or layer.zero_ins is None else layer.ins & ~layer.zero_ins
                weights = layer.port.connections(outs, ins) * layer.port.kernel
                params, left = params + weights, left + weights * layer.port.positions
        fractions += [params / whole, left / macs]
    return Retention(slice_.neuron_retention, *fractions)
