"""Give a network fresh neurons, without changing what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core.find import find_neurons
from ..core.neurons import Neurons
from ..core.record import evaluating
from ..core.widen import grow, last_wire, new_places, why_fixed
from ..errors import TorchsliceError
from ..registry import unknown
from ..slices import Slice
from .extract import TOLERANCE


@dataclass(frozen=True, eq=False)
class Widened:
    """A wider network, and how the slices of the narrow one are found in it.

    Attributes:
        model: computes what the narrow one computes; the class scores do not depend on its fresh neurons yet.
        fresh: these neurons.
        fixed: layers that are as wide as before, and why.
        places: per layer, which neuron of the narrow network each old one is, in order, and -1 for a fresh one.
    """

    model: nn.Module = field(repr=False)
    fresh: Slice
    fixed: dict[str, str]
    places: dict[str, Tensor] = field(repr=False)

    def lift(self, part: Slice) -> Slice:
        """Return the same neurons as a slice of the wider network."""
        return Slice({layer: part[layer][at.clamp(min=0)] & (at >= 0) for layer, at in self.places.items()})


def widen(
    model: nn.Module,
    example: Tensor,
    *,
    factor: float | None = None,
    counts: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Widened:
    """Return a copy of a network with more neurons that computes the same.

    Fresh neurons read everything, by weights drawn as PyTorch draws them; every old neuron and class score reads them
    with weights of zero. Coupled layers get the same fresh channels. The copy is checked against the model on
    `example` [B, ...] (1e-5 of the largest score in float32), and what a slice of the old neurons computes stays the
    same, bit for bit.

    Args:
        factor: above 1; every layer gets so many times its neurons, rounded, one more at least.
        counts: instead of it, how many neurons to add to the layers of these names.
        seed: of the fresh rows.

    Raises TorchsliceError where a layer that is named, or all of them, cannot be widened: groups of a grouped
    convolution must stay equally wide, and some networks write a width into their code.

    >>> wide = widen(model, data.example, factor=1.25)
    >>> extend(wide.model, wide.lift(critical), task, classes=old)
    """
    neurons = find_neurons(model, example)
    fixed = {layer: why for layer in neurons.layers if (why := why_fixed(neurons, layer))}
    wanted = _wanted(neurons, fixed, factor, counts)
    extra: dict[int, int] = {}
    for layer, count in wanted.items():
        wire = last_wire(neurons, layer)
        extra[wire] = max(count, extra.get(wire, 0))
    wide = grow(model, neurons, extra, seed=seed)
    check_same(model, wide, example)
    places, fresh = {}, {}
    for layer in neurons.layers:
        at, new = map(torch.from_numpy, new_places(neurons.flow.ports[layer].outs, neurons.wires, extra))
        places[layer], fresh[layer] = at.masked_fill(new, -1), new
    return Widened(wide, Slice(fresh), fixed, places)


def check_same(model: nn.Module, wide: nn.Module, example: Tensor) -> None:
    """Raise unless a widened network gives the model's class scores on an example; it may have more of them."""
    with evaluating(model, wide):
        expected = model(example)
        try:
            actual = wide(example)[:, : expected.shape[1]]
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            raise TorchsliceError(
                f"the widened network cannot run ({str(error).splitlines()[0]}): its forward depends on a width. "
                "Let forward read widths from the tensors it gets."
            ) from error
    allowed = TOLERANCE.get(expected.dtype, 1e-5) * max(1.0, float(expected.abs().max()))
    difference = float((actual - expected).abs().max())
    if not difference <= allowed:
        raise TorchsliceError(
            f"the widened network differs from the model by {difference:.2g} on the example (allowed: {allowed:.2g}); "
            "nothing is returned. Check that the model gives finite, repeatable scores in eval mode on this example."
        )


def _wanted(
    neurons: Neurons, fixed: Mapping[str, str], factor: float | None, counts: Mapping[str, int] | None
) -> dict[str, int]:
    """Return how many neurons each layer is to get."""
    if (factor is None) == (counts is None):
        raise TorchsliceError("give either factor=, such as 1.25, or counts={layer: neurons to add}.")
    if counts is not None:
        for layer, count in counts.items():
            if layer not in neurons.layers:
                raise unknown("layer", layer, neurons.layers)
            if count < 1:
                raise TorchsliceError(f"layer {layer!r} must get at least 1 neuron, got {count}.")
            if layer in fixed:
                raise TorchsliceError(f"layer {layer!r} cannot be widened: {fixed[layer]}. Leave it out of counts=.")
        return dict(counts)
    assert factor is not None
    if not 1 < factor < 100:
        raise TorchsliceError(f"factor must be above 1 (and below 100), got {factor}.")
    if len(fixed) == len(neurons.layers):
        layer, why = next(iter(fixed.items()))
        raise TorchsliceError(f"no layer of this network can be widened; {layer!r}: {why}.")
    wanted = {name: max(1, round((factor - 1) * layer.count)) for name, layer in neurons.layers.items()}
    return {layer: count for layer, count in wanted.items() if layer not in fixed}
