"""Class slices from gates: one forward pass over the training split, counting as it goes.

Shapes: B batch, C classes, N neurons of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.record import evaluating
from ..data import Data
from ..errors import TorchsliceError
from ..slices import Slice
from ..training.batches import in_order
from ..training.placement import choose_placement
from ..training.progress import progress_bar
from ..training.ranks import Ranks, current_ranks
from .gates import GatedModel, check_gated

LOWERING = 0.05  # step by which the threshold sinks where a layer would keep no neuron
ROUNDING = 1e-6  # 0.9 - 0.05 - 0.05 and 0.8 are to be the same threshold


@dataclass(frozen=True, eq=False)
class GateStatistics:
    """How the gates of a model behave on the training images of each class.

    `samples` are the images per class, int64 [C]; `frequency` is the share of them, in [0, 1], for which a gate is on,
    and `mean` their mean gate value, both {layer: float64 [C, N]}.
    """

    classes: tuple[str, ...]
    samples: Tensor
    frequency: dict[str, Tensor]
    mean: dict[str, Tensor]


def class_slices(
    gated: GatedModel, data: Data, *, frequency_threshold: float = 0.9, **running: Any
) -> dict[str, Slice]:
    """Return the slice of every class: the neurons whose gates are on for enough of its training images.

    Layers without gates are kept whole (arXiv 2306.09376, section 3.3).

    Args:
        gated: a trained model with gates; it is run in eval mode.
        data: its training split is used, never another.
        frequency_threshold: share of the images, in (0, 1].
        running: how to run the model, see `gate_statistics`.

    >>> slices = class_slices(gated, data, frequency_threshold=0.9)
    >>> slices["cat"] | slices["dog"]
    Slice(811 of 4224 neurons, 19.2%, in 13 layers)
    """
    if not 0 < frequency_threshold <= 1:
        raise TorchsliceError(f"frequency_threshold must be in (0, 1], got {frequency_threshold}.")
    return slices_from(gated, gate_statistics(gated, data, **running), frequency_threshold=frequency_threshold)


def mean_gate_values(gated: GatedModel, data: Data, **running: Any) -> dict[str, Tensor]:
    """Return the mean gate values of every class's training images, {layer: float64 [C, N]}.

    The mean over some rows is a scale for `GatedModel.fold`. `running` is as in `gate_statistics`.

    >>> means = mean_gate_values(gated, data)
    >>> plain = gated.fold({layer: mean[data.class_indices(["cat", "dog"])].mean(0) for layer, mean in means.items()})
    """
    return gate_statistics(gated, data, **running).mean


def gate_statistics(
    gated: GatedModel,
    data: Data,
    *,
    batch_size: int = 512,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    progress: bool = True,
) -> GateStatistics:
    """Run the training split once through a gated model and count; memory is O(classes x neurons).

    Under torchrun the processes share the images. A class without an image is a TorchsliceError.

    Args:
        batch_size: images per forward pass; the result does not depend on it.
        precision: "fp32", "bf16" (faster, but gates that are almost off may change sides) or "auto".
    """
    check_gated(gated)
    place = choose_placement(device, precision).device
    ranks = current_ranks(place)
    classes = len(data.classes)
    widths = [gated.neurons.layers[name].count for name in gated.layers]
    zeros = torch.zeros(classes, sum(widths) + 1, dtype=torch.float64)
    on, total = zeros.to(place), zeros.to(place, copy=True)  # [C, N + 1], the last column counts samples
    run = sweep(gated, data, batch_size=batch_size, device=device, precision=precision, progress=progress, ranks=ranks)
    for labels, values in run:
        own = F.one_hot(labels, classes).float().T  # [C, B]
        one = torch.ones(len(labels), 1, device=place)
        joined = torch.cat([*(values[name] for name in gated.layers), one], 1)  # [B, N + 1]
        on += own @ (joined > 0).float()  # whole numbers below 2^24, so exact
        total += own @ joined
    on, total = ranks.sum(on).cpu(), ranks.sum(total).cpu()
    samples = on[:, -1]
    if (samples == 0).any():
        missing = data.classes[int((samples == 0).nonzero()[0])]
        raise TorchsliceError(
            f"class {missing!r} of {data.name} has no training image, so it has no slice; "
            "leave it out with data.restrict([...])."
        )
    frequency, mean = ((sums[:, :-1] / samples[:, None]).split(widths, 1) for sums in (on, total))
    return GateStatistics(
        data.classes,
        samples.long(),
        dict(zip(gated.layers, frequency, strict=True)),
        dict(zip(gated.layers, mean, strict=True)),
    )


def sweep(
    gated: GatedModel,
    data: Data,
    *,
    batch_size: int = 512,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    progress: bool = True,
    ranks: Ranks | None = None,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield labels [B] and gate values {layer: float32 [B, N]} of the training split, batch by batch, in eval mode."""
    placement, ranks = choose_placement(device, precision), ranks or Ranks()
    gated.to(placement.device)
    steps = math.ceil(len(ranks.part(torch.arange(len(data.train)))) / max(batch_size, 1))
    with progress_bar(progress and ranks.first, total=steps) as bar:
        for images, labels in in_order(data, data.train, batch_size=batch_size, device=placement.device, ranks=ranks):
            with evaluating(gated), placement.autocast():
                gated(images)
            yield labels, gated.gate_values
            bar.advance("gates")


def slices_from(gated: GatedModel, statistics: GateStatistics, *, frequency_threshold: float = 0.9) -> dict[str, Slice]:
    """Return the class slices that follow from gate statistics, without another forward pass."""
    keep = {name: often_on(rates, frequency_threshold) for name, rates in statistics.frequency.items()}
    full = gated.neurons.full().masks
    return {
        label: Slice({name: keep[name][row] if name in keep else mask for name, mask in full.items()})
        for row, label in enumerate(statistics.classes)
    }


def often_on(frequency: Tensor, threshold: float) -> Tensor:
    """Return which neurons of a layer each class keeps, bool [C, N], at least one per class.

    Kept is what is on at least as often as `threshold`; where that is nothing, the threshold of that class sinks by
    0.05 at a time until something is kept. A class for which no gate is ever on keeps the whole layer.

    Args:
        frequency: share of a class's samples for which a gate is on, in [0, 1], [C, N].
        threshold: in (0, 1].

    >>> often_on(torch.tensor([[0.95, 0.2], [0.83, 0.1]]), 0.9)
    tensor([[ True, False],
            [ True, False]])
    """
    frequency = frequency.double()
    best = frequency.max(1, keepdim=True).values  # [C, 1]
    steps = ((threshold - best - ROUNDING) / LOWERING).ceil().clamp(min=0)
    return frequency >= threshold - steps * LOWERING - ROUNDING
