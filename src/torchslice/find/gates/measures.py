"""How modular a model is: retention, cohesion and coupling of its class slices (arXiv 2306.09376, section 4.1).

Shapes: S samples, N neurons, K neurons of a slice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...data import Task
from ...errors import TorchsliceError
from ...inputs import device_of
from ...slices import Slice
from ...tables import percent, table
from ...training.ranks import current_ranks
from .gated import GatedModel, check_gated
from .slicing import sweep

BLOCK = 1024  # rows of masks that are compared at a time
SHARED = 0.01  # mean fraction of samples that leave a layer's common mask, below which the layer counts as collapsed


def jaccard_sum(masks: Tensor, *, block: int = BLOCK) -> float:
    """Return the sum of the Jaccard overlaps |a & b| / |a | b| of all pairs of rows of masks, bool [S, N].

    Counts are exact (float32 products of 0 and 1 below 2^24); two empty rows overlap by 1.
    """
    blocks, total = masks.split(block), 0.0
    for i, rows in enumerate(blocks):
        for j, others in enumerate(blocks[i:], start=i):
            both = rows.float() @ others.float().T
            either = rows.sum(1)[:, None] + others.sum(1) - both
            overlap = torch.where(either > 0, both / either.clamp(min=1), 1).sum(dtype=torch.float64).item()
            total += overlap if i != j else (overlap - len(rows)) / 2  # each pair once, no row with itself
    return total


def cohesion(masks: Tensor) -> float:
    """Return the mean overlap, in [0, 1], of pairs of sample masks of one class, bool [S, K]; 1 without a pair."""
    pairs = len(masks) * (len(masks) - 1) / 2
    return jaccard_sum(masks) / pairs if pairs else 1.0


def coupling(masks: Tensor) -> float:
    """Return the mean overlap, in [0, 1], of pairs of class slices, bool [C, N]; 0 with a single class."""
    return cohesion(masks) if len(masks) > 1 else 0.0


@dataclass(frozen=True)
class Health:
    """What of so many gated `layers` does not tell samples apart.

    In `collapsed` layers all samples share one mask, in `dead_layers` no gate is ever on; `dead_gates` counts the gates
    that are never on in the other layers.
    """

    layers: int
    collapsed: tuple[str, ...]
    dead_layers: tuple[str, ...]
    dead_gates: dict[str, int]

    @property
    def warnings(self) -> list[str]:
        """One sentence for each thing that is wrong, with what to do; dead gates alone are nothing wrong."""
        dead, shared = (
            ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            for names in (self.dead_layers, self.collapsed)
        )
        words = []
        if dead:
            words.append(
                f"Dead: no gate is ever on in {dead}; class slices keep them whole. "
                "Train anew with a lower learning rate or coupling_weight."
            )
        if len(self.collapsed) + len(self.dead_layers) == self.layers:
            words.append(
                "Collapsed: all samples share one mask in every layer, so all classes have the same slice. "
                "Train longer, or with a lower cohesion_weight or a higher coupling_weight."
            )
        elif shared:
            words.append(
                f"Collapsed: all samples share one mask in {shared}, {len(self.collapsed)} of {self.layers} gated "
                "layers; classes share their slices there."
            )
        return words


def health_of(frequency: Mapping[str, Tensor]) -> Health:
    """Judge gates by how often they are on over all samples, {layer: [N], in [0, 1]}."""
    alive = {name: rates for name, rates in frequency.items() if rates.any()}
    return Health(
        layers=len(frequency),
        collapsed=tuple(name for name, rates in alive.items() if rates.minimum(1 - rates).mean() < SHARED),
        dead_layers=tuple(name for name in frequency if name not in alive),
        dead_gates={name: count for name, rates in alive.items() if (count := int((rates == 0).sum()))},
    )


@dataclass(frozen=True)
class Report:
    """What class slices are worth before anything is cut, over the gated layers; all figures in [0, 1].

    `neuron_retention` is the mean over the classes of the fraction of neurons in their slices, `cohesion` the mean
    over the classes, `coupling` the mean over pairs of classes; `classes` holds the first two per class.
    """

    neuron_retention: float
    cohesion: float
    coupling: float
    classes: dict[str, dict[str, float]]
    health: Health

    def to_plain(self) -> dict[str, Any]:
        """Return the report as JSON-able data."""
        return asdict(self)

    def __str__(self) -> str:
        mean = {"neuron_retention": self.neuron_retention, "cohesion": self.cohesion}
        rows = [
            (name, percent(figures["neuron_retention"]), f"{figures['cohesion']:.3f}")
            for name, figures in {**self.classes, "mean": mean}.items()
        ]
        text = table(("class", "neuron retention", "cohesion"), rows)
        return "\n".join([text, f"coupling {self.coupling:.3f}", *self.health.warnings])


def report(
    gated: GatedModel, task: Task, slices: Mapping[str, Slice], *, batch_size: int = 512, progress: bool = True
) -> Report:
    """Measure retention, cohesion and coupling of class slices exactly, and look for collapse, on the training split.

    Cohesion needs the masks of all samples: each is kept, of its class's slice only, as bool. Under torchrun the
    processes share the classes.

    >>> found = ts.gates.report(gated, task, ts.gates.class_slices(gated, task, progress=False), progress=False)
    >>> 0 < found.neuron_retention <= 1
    True
    """
    check_gated(gated)
    if missing := [name for name in task.classes if name not in slices]:
        raise TorchsliceError(f"there is no slice for class {missing[0]!r}; slices: {', '.join(slices)}.")
    kept = {name: slices[name] for name in task.classes}
    for slice_ in kept.values():
        gated.neurons.check(slice_)
    columns = torch.stack([torch.cat([slice_[layer] for layer in gated.layers]) for slice_ in kept.values()])  # [C, N]
    own = [[torch.zeros(0, int(column.sum()), dtype=torch.bool)] for column in columns]  # masks of each class, [S, K]
    on, ranks = torch.zeros(columns.shape[1], dtype=torch.int64), current_ranks(device := device_of(gated))
    mine = ranks.owns(task.train.labels)
    sweeping = sweep(gated, task, batch_size=batch_size, progress=progress, part=lambda rows: rows[mine])
    for labels, values in sweeping:
        masks, labels = values.cpu() > 0, labels.cpu()  # [B, N], [B]
        on += masks.sum(0)
        for label in labels.unique().tolist():
            own[label].append(masks[labels == label][:, columns[label]])
    found = [cohesion(torch.cat(rows)) if ranks.owns(label) else 0.0 for label, rows in enumerate(own)]
    cohesions = ranks.sum(torch.tensor(found, dtype=torch.float64, device=device)).tolist()
    on = ranks.sum(on.to(device)).cpu()
    classes = {
        name: {"neuron_retention": column.double().mean().item(), "cohesion": cohesion}
        for name, column, cohesion in zip(kept, columns, cohesions, strict=True)
    }
    mean = {key: fmean(figures[key] for figures in classes.values()) for key in ("neuron_retention", "cohesion")}
    frequency = (on / len(task.train)).split([gated.neurons.layers[name].count for name in gated.layers])
    health = health_of(dict(zip(gated.layers, frequency, strict=True)))
    return Report(**mean, coupling=coupling(columns), classes=classes, health=health)
