"""Class slices from gates: one forward pass over the training split, counting as it goes.

Shapes: B batch, C classes, N neurons of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import Task, check_task
from ...errors import TorchsliceError
from ...graph.record import evaluating
from ...inputs import call_model, device_of
from ...slices import Slice
from ...training.progress import progress_bar
from ...training.ranks import current_ranks
from .gated import GatedModel, check_gated

LOWERING = 0.05  # step by which the threshold sinks where a layer would keep no neuron
ROUNDING = 1e-6  # 0.9 - 0.05 - 0.05 and 0.8 are to be the same threshold


@dataclass(frozen=True, eq=False)
class GateStatistics:
    """How the gates of a model behave on the training samples of each class.

    `samples` counts the samples of each class, int64 [C]; `frequency` is the fraction of them, in [0, 1], for which a
    gate is on, and `mean` their mean gate value, both {layer: float64 [C, N]}.
    """

    classes: tuple[str, ...]
    samples: Tensor
    frequency: dict[str, Tensor] = field(repr=False)
    mean: dict[str, Tensor] = field(repr=False)


def class_slices(
    gated: GatedModel, task: Task, *, frequency_threshold: float = 0.9, batch_size: int = 512, progress: bool = True
) -> dict[str, Slice]:
    """Return the slice of every class: the neurons whose gates are on for enough of its training samples.

    Enough is the fraction `frequency_threshold` in (0, 1] of them; layers without gates are kept whole (arXiv
    2306.09376, section 3.3). The model runs in eval mode; no other split is used.

    >>> slices = ts.gates.class_slices(gated, task, progress=False)
    >>> (slices["3"] | slices["8"]).layers == gated.neurons.full().layers
    True
    """
    if not 0 < frequency_threshold <= 1:
        raise TorchsliceError(f"frequency_threshold must be in (0, 1], got {frequency_threshold}.")
    found = statistics(gated, task, batch_size=batch_size, progress=progress)
    return slices_from(gated, found, frequency_threshold=frequency_threshold)


def statistics(gated: GatedModel, task: Task, *, batch_size: int = 512, progress: bool = True) -> GateStatistics:
    """Run the training split once through a model with gates and count; memory is O(classes x neurons).

    Under torchrun the processes share the samples. Raises TorchsliceError for a class without a training sample.

    >>> statistics(gated, task, progress=False).samples.sum().item() == len(task.train)
    True
    """
    check_task(task)
    device, classes = device_of(check_gated(gated)), len(task.classes)
    ranks, widths = current_ranks(device), [gated.neurons.layers[name].count for name in gated.layers]
    on = torch.zeros(classes, sum(widths) + 1, dtype=torch.float64, device=device)
    total = torch.zeros_like(on)  # [C, N + 1], the last column counts samples
    for labels, values in sweep(gated, task, batch_size=batch_size, progress=progress, part=ranks.part):
        own = F.one_hot(labels, classes).float().T  # [C, B]
        joined = torch.cat([values, torch.ones(len(labels), 1, device=device)], 1)  # [B, N + 1]
        on += own @ (joined > 0).float()  # whole numbers below 2^24, so exact
        total += own @ joined
    on, total = ranks.sum(on).cpu(), ranks.sum(total).cpu()
    samples = on[:, -1]
    if not samples.all():
        raise TorchsliceError(
            f"class {task.classes[int(samples.argmin())]!r} of {task.name} has no training sample, so it has no "
            "slice; leave it out with task.restrict([...])."
        )
    frequency, mean = (
        dict(zip(gated.layers, (sums[:, :-1] / samples[:, None]).split(widths, 1), strict=True)) for sums in (on, total)
    )
    return GateStatistics(tuple(task.classes), samples.long(), frequency, mean)


def sweep(
    gated: GatedModel, task: Task, *, batch_size: int, progress: bool, part: Callable[[Tensor], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield labels [B] and joined gate values, float32 [B, N], of `part` of the training split, batch by batch."""
    own = len(part(torch.arange(len(task.train))))
    with progress_bar(progress, total=math.ceil(own / max(batch_size, 1))) as bar:
        for inputs, labels in task.batches("train", batch_size, device=device_of(gated), part=part):
            with evaluating(gated):
                call_model(gated, inputs)
            yield labels, torch.cat([gated.gate_values[name] for name in gated.layers], 1)
            bar("gates")


def slices_from(gated: GatedModel, statistics: GateStatistics, *, frequency_threshold: float = 0.9) -> dict[str, Slice]:
    """Return the class slices that follow from gate statistics, without another forward pass.

    >>> found = ts.gates.statistics(gated, task, progress=False)
    >>> len(slices_from(gated, found, frequency_threshold=0.8))
    10
    """
    keep = {name: often_on(rates, frequency_threshold) for name, rates in statistics.frequency.items()}
    full = gated.neurons.full().masks
    return {
        label: Slice({name: keep[name][row] if name in keep else mask for name, mask in full.items()})
        for row, label in enumerate(statistics.classes)
    }


def often_on(frequency: Tensor, threshold: float) -> Tensor:
    """Return which neurons of a layer each class keeps, bool [C, N], at least one per class.

    Kept is what is on, in a fraction [C, N] of the class's samples, at least as often as `threshold`; where that is
    nothing, the threshold of that class sinks by 0.05 at a time until something is kept. A class for which no gate is
    ever on keeps the whole layer.
    """
    frequency = frequency.double()
    best = frequency.max(1, keepdim=True).values  # [C, 1]
    steps = ((threshold - best - ROUNDING) / LOWERING).ceil().clamp(min=0)
    return frequency >= threshold - steps * LOWERING - ROUNDING
