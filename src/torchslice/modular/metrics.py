"""How modular a model is: retention, cohesion and coupling of its class slices (arXiv 2306.09376, section 4.1).

Shapes: S samples, N neurons, K neurons of a slice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data import Data
from ..errors import TorchsliceError
from ..slices import Slice
from .class_slices import sweep
from .gates import GatedModel, check_gated
from .health import Health, health_of

BLOCK = 1024  # rows of masks that are compared at a time


def jaccard_sum(masks: Tensor, *, block: int = BLOCK) -> float:
    """Return the sum of the Jaccard overlaps |a & b| / |a | b| of all pairs of rows of masks, bool [S, N].

    Counts are exact (float32 products of 0 and 1 below 2^24), blocks of rows are compared once, two empty rows overlap
    by 1.

    >>> jaccard_sum(torch.tensor([[True, True], [True, False], [True, False]]))
    2.0
    """
    assert masks.shape[1] < 2**24
    blocks = masks.split(block)
    total = torch.zeros((), dtype=torch.float64, device=masks.device)
    for i, rows in enumerate(blocks):
        left = rows.float()
        for j, others in enumerate(blocks[i:], start=i):
            both = left @ (left if i == j else others.float()).T
            either = rows.sum(1)[:, None] + others.sum(1)[None, :] - both
            overlap = torch.where(either > 0, both / either.clamp(min=1), 1).sum(dtype=torch.float64)
            total += overlap if i != j else (overlap - len(rows)) / 2  # each pair once, no row with itself
    return total.item()


def cohesion(masks: Tensor) -> float:
    """Return the mean Jaccard overlap, in [0, 1], of pairs of sample masks of one class, bool [S, K]; 1 without a pair.

    >>> cohesion(torch.tensor([[True, True], [True, False]]))
    0.5
    """
    pairs = len(masks) * (len(masks) - 1) / 2
    return jaccard_sum(masks) / pairs if pairs else 1.0


def coupling(slices: Mapping[str, Slice], *, layers: Sequence[str] | None = None) -> float:
    """Return the mean Jaccard overlap, in [0, 1], over pairs of class slices; 0 with a single class.

    `layers` restricts it, usually to the gated ones: layers that all classes keep whole overlap by themselves.
    """
    pairs = len(slices) * (len(slices) - 1) / 2
    return jaccard_sum(torch.stack([_join(s, layers) for s in slices.values()])) / pairs if pairs else 0.0


@dataclass(frozen=True)
class Report:
    """What class slices are worth before anything is cut, over the gated layers; all figures in [0, 1].

    `neuron_retention` is the mean over the classes of the share of neurons in their slices, `cohesion` the mean over
    the classes, `coupling` the mean over pairs of classes; `classes` holds the first two per class.
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
        width = max(len("class"), *map(len, self.classes))
        rows = [f"{'class':<{width}}  neuron retention  cohesion"]
        rows += [
            f"{n:<{width}}  {c['neuron_retention']:>16.1%}  {c['cohesion']:>8.3f}" for n, c in self.classes.items()
        ]
        rows += [f"{'mean':<{width}}  {self.neuron_retention:>16.1%}  {self.cohesion:>8.3f}"]
        return "\n".join([*rows, f"coupling {self.coupling:.3f}", *self.health.warnings])


def report(gated: GatedModel, slices: Mapping[str, Slice], data: Data, **running: Any) -> Report:
    """Measure retention, cohesion and coupling of class slices exactly, and look for collapse, on the training split.

    Cohesion needs the masks of all samples: each is kept as packed bits of its class's slice only. `running` is how to
    run the model, as in `gate_statistics`.

    >>> print(report(gated, slices, data))
    """
    check_gated(gated)
    if missing := [name for name in data.classes if name not in slices]:
        raise TorchsliceError(f"there is no slice for class {missing[0]!r}; slices: {', '.join(slices)}.")
    kept = {name: slices[name] for name in data.classes}
    for part in kept.values():
        gated.neurons.check(part)
    columns = [_join(part, gated.layers) for part in kept.values()]  # one bool [N] per class
    packed: list[list[NDArray[np.uint8]]] = [[] for _ in columns]
    on = torch.zeros(sum(gated.neurons.layers[name].count for name in gated.layers), dtype=torch.int64)
    for labels, values in sweep(gated, data, **running):
        masks = torch.cat([values[name] for name in gated.layers], 1).cpu() > 0  # [B, N]
        on += masks.sum(0)
        for label in labels.unique().tolist():
            own = masks[labels.cpu() == label][:, columns[label]]
            packed[label].append(np.packbits(own.numpy(), axis=1))
    by_class = {
        name: {
            "neuron_retention": column.double().mean().item(),
            "cohesion": cohesion(_unpack(bits, int(column.sum()))),
        }
        for name, column, bits in zip(kept, columns, packed, strict=True)
    }
    widths = [gated.neurons.layers[name].count for name in gated.layers]
    frequency = dict(zip(gated.layers, (on / len(data.train)).split(widths), strict=True))
    return Report(
        neuron_retention=fmean(c["neuron_retention"] for c in by_class.values()),
        cohesion=fmean(c["cohesion"] for c in by_class.values()),
        coupling=coupling(kept, layers=gated.layers),
        classes=by_class,
        health=health_of(frequency),
    )


def _join(part: Slice, layers: Sequence[str] | None) -> Tensor:
    return torch.cat([part[name] for name in (part.layers if layers is None else layers)])


def _unpack(packed: list[NDArray[np.uint8]], width: int) -> Tensor:
    bits = np.concatenate(packed) if packed else np.zeros((0, (width + 7) // 8), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(bits, axis=1, count=width)).bool()
