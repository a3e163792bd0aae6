"""Cut the part of a network that a slice describes out as a plain, smaller network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.find import find_neurons
from ..core.hold import holding
from ..core.neurons import Neurons
from ..core.record import evaluating
from ..core.surgery import LayerPlan, Plan, cut, plan
from ..errors import TorchsliceError
from ..slices import Slice

#: Largest difference allowed between the masked and the cut network, as a share of the largest score (at least 1).
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def extract(
    model: nn.Module,
    part: Slice,
    example: Tensor,
    *,
    classes: Sequence[int] | None = None,
    neurons: Neurons | None = None,
) -> nn.Module:
    """Return a new, smaller network that computes what `model` computes with the neurons outside `part` held at zero.

    The result is made of plain layers of the same types; the model is not changed. With `classes` (at least two
    indices) only their scores remain, in the model's order. Every call checks the cut network against the masked
    model on `example` [B, ...].

    `neurons` of the same model, found before, save finding them again.

    Raises TorchsliceError for a slice of another model, an empty slice or layer, bad classes, and a cut that does not
    compute the same.

    >>> small = extract(model, slices["cat"] | slices["dog"], data.example, classes=[3, 5])
    """
    neurons = neurons or find_neurons(model, example)
    what = plan(neurons, part, classes)
    small = cut(model, what)
    _verify(model, small, what, example, classes)
    return small


def _verify(model: nn.Module, small: nn.Module, what: Plan, example: Tensor, classes: Sequence[int] | None) -> None:
    with evaluating(model, small):
        with holding(model, what.held):
            expected = model(example)
        try:
            actual = small(example)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            raise TorchsliceError(
                f"the cut network cannot run ({str(error).splitlines()[0]}): its forward depends on a width that "
                "was cut. "
                "Let forward read widths from the tensors it gets."
            ) from error
    if classes is not None:
        expected = expected[:, sorted(classes)]
    allowed = TOLERANCE.get(expected.dtype, 1e-5) * max(1.0, float(expected.abs().max()))
    difference = float((actual - expected).abs().max()) if actual.shape == expected.shape else float("nan")
    if not difference <= allowed:
        raise TorchsliceError(
            f"the cut network differs from the masked one by {difference:.2g} on the example (allowed: "
            f"{allowed:.2g}); nothing is returned. "
            "Check that the model gives finite, repeatable scores in eval mode on this example."
        )


@dataclass(frozen=True)
class Retention:
    """What remains, as shares in [0, 1] of the whole model.

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
            f"slice keeps {self.neuron:.1%} of the neurons, {self.param:.1%} of the parameters, {self.mac:.1%} of "
            "the MACs; "
            f"the network built from it has {self.built_param:.1%} of the parameters, {self.built_mac:.1%} of the MACs"
        )


def retention(model: nn.Module, neurons: Neurons, part: Slice, *, classes: Sequence[int] | None = None) -> Retention:
    """Return what `part` keeps of a model, without building the smaller network.

    >>> print(retention(model, neurons, slices["cat"]))
    """
    layers = plan(neurons, part, classes).layers
    whole = sum(p.numel() for p in model.parameters())
    cuttable = {name: sum(p.numel() for p in model.get_submodule(name).parameters(recurse=False)) for name in layers}
    rest = whole - sum(cuttable.values())
    kept, built = (
        sum(_counts(model, name, layer, as_built)[0] for name, layer in layers.items()) for as_built in (False, True)
    )
    macs = sum(_full_macs(layer) for layer in layers.values()) or 1
    kept_macs, built_macs = (
        sum(_counts(model, name, layer, b)[1] for name, layer in layers.items()) for b in (False, True)
    )
    return Retention(
        part.neuron_retention, (rest + kept) / whole, kept_macs / macs, (rest + built) / whole, built_macs / macs
    )


def _full_macs(layer: LayerPlan) -> int:
    port = layer.port
    return 0 if port.ins is None else port.positions * len(port.outs) * len(port.ins) // port.groups * port.kernel


def _counts(model: nn.Module, name: str, layer: LayerPlan, as_built: bool) -> tuple[int, int]:
    """Return parameters and multiply-accumulates of one layer after the cut."""
    port, module = layer.port, model.get_submodule(name)
    outs = layer.outs if as_built else layer.outs & ~layer.held
    rows = int(outs.sum())
    vectors = sum(p is not None and p.dim() == 1 for p in module._parameters.values())
    if port.ins is None or layer.ins is None:
        return rows * vectors, 0
    ins = layer.ins if as_built or layer.zero_ins is None else layer.ins & ~layer.zero_ins
    if port.kind == "depthwise":
        pairs = rows
    else:  # pairs of an output and an input in the same group
        pairs = int((outs.reshape(port.groups, -1).sum(1) * ins.reshape(port.groups, -1).sum(1)).sum())
    return pairs * port.kernel + rows * vectors, pairs * port.kernel * port.positions
