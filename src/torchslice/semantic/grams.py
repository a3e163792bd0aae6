"""Gram matrices of the activations of every class and layer, from one run over the samples, class after class.

Shapes: B batch, C classes, n samples (or positions), N neurons of a layer, P positions (pixels or tokens).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..core.record import evaluating
from ..core.taps import Taps, find_taps, tapping
from ..data import Data
from ..errors import TorchsliceError
from ..registry import unknown
from ..training.placement import choose_placement
from ..training.progress import Bar, progress_bar
from .cka import prefix_cka
from .contributions import Contributions
from .readings import by_position
from .selection import in_order

POSITIONS = ("mean", "all")
RESOLUTION = 1e-6  # a neuron whose activations spread less than this share of their mean is constant in float32


@dataclass(frozen=True, eq=False)
class Scatter:
    """Number, mean [N] and centred Gram matrix [N, N] of activations, in float64; `+` pools two sets of them.

    >>> (Scatter.of(torch.tensor([[1.0], [2.0]])) + Scatter.of(torch.tensor([[6.0]]))).gram
    tensor([[14.]], dtype=torch.float64)
    """

    count: int
    mean: Tensor
    gram: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Scatter:
        """Return the scatter of activations [n, N]."""
        start = values[0].double()
        shifted = values.double() - start  # [n, N], zeros where a neuron is constant
        mean = shifted.mean(0)
        centred = shifted - mean
        return cls(len(values), start + mean, centred.T @ centred)

    def __add__(self, other: Scatter) -> Scatter:
        """Pool two scatters (Chan, Golub & LeVeque, 1983)."""
        count, shift = self.count + other.count, other.mean - self.mean
        between = torch.outer(shift, shift) * (self.count * other.count / count)
        return Scatter(count, self.mean + shift * (other.count / count), self.gram + other.gram + between)

    def resolved(self) -> Tensor:
        """Return the Gram matrix with zeros where a neuron varies less than float32 can tell, float64 [N, N]."""
        varies = self.gram.diagonal() > self.count * (RESOLUTION * self.mean) ** 2  # [N]
        return self.gram * (varies[:, None] & varies)


@dataclass(frozen=True, eq=False)
class Similarity:
    """How similar the first neurons of each layer are to the whole layer, for slices at any theta.

    `curves` are sim(1..N) per class in the order of each metric's contributions, {metric: {layer: float64 [C, N]}};
    `pooled` are the Gram matrices of all classes together, {layer: float64 [N, N]}.
    """

    curves: dict[str, dict[str, Tensor]]
    pooled: dict[str, Tensor]
    positions: str


def prefix_similarity(
    model: nn.Module,
    data: Data,
    contributions: Contributions,
    *,
    layers: Sequence[str] | None = None,
    positions: str = "all",
    batch_size: int = 128,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> Similarity:
    """Run the samples of the contributions through the model and compare every prefix of every layer with all of it.

    One run serves all layers, classes and metrics. Classes come one after the other, so that per layer two float64
    matrices [N, N] are in memory, that of the class and the pooled one, whatever the number of classes.

    Args:
        layers: those to look at, by default all.
        positions: "mean" compares the means of the samples over their positions (pixels, tokens), "all" the whole maps.
            The positions of a layer that is used several times are those of all its uses.
        batch_size: images per forward pass; the result does not depend on it.

    >>> similarity = prefix_similarity(model, data, scores)
    >>> slices_from(scores, Rule("taylor", theta=0.9), similarity)
    """
    if positions not in POSITIONS:
        raise unknown("positions", positions, POSITIONS)
    if batch_size < 1:
        raise TorchsliceError(f"batch_size must be at least 1, got {batch_size}.")
    place = choose_placement(device, "fp32").device
    model.to(place)
    taps = find_taps(model, data.example.to(place))
    chosen = list(taps.chains) if layers is None else list(layers)
    taps = replace(taps, chains={layer: taps.chains[layer] for layer in chosen})
    curves: dict[str, dict[str, list[Tensor]]] = {m: {name: [] for name in chosen} for m in contributions.scores}
    pooled: dict[str, Scatter] = {}
    counts = data.train.labels[contributions.samples].bincount()
    with progress_bar(progress, total=int((-(-counts // batch_size)).sum())) as bar:
        run = class_scatters(model, data, contributions.samples, taps, positions, batch_size, place, bar)
        for label, scatters in run:
            for layer, scatter in scatters.items():
                if not scatter.mean.isfinite().all():
                    raise TorchsliceError(
                        f"the activations of layer {layer!r} for class {data.classes[label]!r} are NaN or infinite, so "
                        "nothing is similar to them. Check the model's weights and the data."
                    )
                pooled[layer] = pooled[layer] + scatter if layer in pooled else scatter
                gram = scatter.resolved()
                for metric, scores in contributions.scores.items():
                    curves[metric][layer].append(prefix_cka(gram, in_order(scores[layer][label])).cpu())
    return Similarity(
        {metric: {name: torch.stack(rows) for name, rows in found.items()} for metric, found in curves.items()},
        {layer: scatter.resolved() for layer, scatter in pooled.items()},
        positions,
    )


def class_scatters(
    model: nn.Module,
    data: Data,
    samples: Tensor,
    taps: Taps,
    positions: str,
    batch_size: int,
    device: torch.device,
    bar: Bar,
) -> Iterator[tuple[int, dict[str, Scatter]]]:
    """Yield class after class its label and the scatter of every tapped layer; `samples` index the training split."""
    labels = data.train.labels[samples]
    for label in range(len(data.classes)):
        found: dict[str, Scatter] = {}
        for rows in samples[labels == label].split(batch_size):
            with evaluating(model), tapping(model, taps) as seen:
                model(data.normalise(data.train.images[rows].to(device)))
            for layer in taps.chains:
                values = by_position(seen.values[layer], layer, taps, len(rows))  # [B, N, P]
                means = positions == "mean"
                new = Scatter.of(values.mean(2, dtype=torch.float64) if means else values.movedim(1, 2).flatten(0, 1))
                found[layer] = found[layer] + new if layer in found else new
            bar.advance("similarity")
        yield label, found
