"""How similar the first neurons of a layer are to the whole layer: linear CKA from Gram matrices, class after class.

Shapes: B batch, C classes, n samples (or positions), N neurons of a layer, P positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...data import Task
from ...errors import TorchsliceError
from ...graph.activations import Activations, find_activations, reading
from ...graph.neurons import Neurons
from ...graph.views import view_of
from ...inputs import device_of
from ...training.progress import Advance, progress_bar
from ...training.ranks import Ranks, current_ranks
from .contributions import Contributions, by_position, check_scores
from .selection import in_order, prefix_cka

MEMORY_GB = 2.0  # for matrices of the layers of one run, in GiB; the widest layer alone has to fit
RESOLUTION = 1e-6  # a neuron whose activations spread less than this fraction of their mean is constant in float32


@dataclass(frozen=True, eq=False)
class Scatter:
    """Number, mean [N] and centred Gram matrix [N, N] of activations, in float64; `+` pools two sets of them."""

    count: int
    mean: Tensor
    gram: Tensor

    @classmethod
    def none(cls, width: int, device: torch.device) -> Scatter:
        """Return the scatter of no activations."""
        zeros = torch.zeros(width, width + 1, dtype=torch.float64, device=device)
        return cls(0, zeros[:, 0], zeros[:, 1:])

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

    def pooled(self, ranks: Ranks) -> Scatter:
        """Pool the scatters of all processes."""
        count = int(ranks.sum(torch.tensor(self.count, device=self.mean.device)))
        mean = ranks.sum(self.mean * self.count) / count
        shift = self.mean - mean
        return Scatter(count, mean, ranks.sum(self.gram + self.count * torch.outer(shift, shift)))

    def resolved(self) -> Tensor:
        """Return the Gram matrix with zeros where a neuron varies less than float32 can tell, float64 [N, N]."""
        varies = self.gram.diagonal() > self.count * (RESOLUTION * self.mean) ** 2  # [N]
        return self.gram * (varies[:, None] & varies)


@dataclass(frozen=True, eq=False)
class Similarity:
    """How similar the first neurons of each layer are to the whole layer, for slices at any theta.

    Attributes:
        curves: sim(1..N) per class in the order of each metric's contributions, {metric: {layer: float64 [C, N]}}.
        pooled: Gram matrices of all classes together, {layer: float64 [N, N]}.
    """

    curves: dict[str, dict[str, Tensor]]
    pooled: dict[str, Tensor]


def similarity(
    neurons: Neurons,
    task: Task,
    scores: Contributions,
    *,
    batch_size: int = 128,
    progress: bool = True,
) -> Similarity:
    """Run the samples of the contributions through the model and compare every prefix of every layer with all of it.

    Activations are compared at all positions (pixels, tokens), those of all uses of a layer that is used several times.
    One run serves all classes and metrics, and as many layers as fit into `MEMORY_GB`. Classes come one by one, so that
    a layer needs two float64 matrices [N, N], that of the class and the pooled one, whatever the number of classes.
    Under torchrun the processes share the classes.

    >>> found = similarity(neurons, task, scores, progress=False)
    >>> few, many = (ts.semantic.ReachTheta(theta).choose(scores, similarity=found) for theta in (0.9, 0.99))
    >>> few.critical <= many.critical
    True
    """
    if batch_size < 1:
        raise TorchsliceError(f"batch_size must be at least 1, got {batch_size}.")
    check_scores(scores, neurons, task)
    labels, own = task.train.labels[scores.samples], neurons.on(view_of(neurons.model).eval())
    device = device_of(neurons.model)
    ranks = current_ranks(device)
    mine = [label for label in range(len(task.classes)) if ranks.owns(label)]
    of_class = [scores.samples[labels == label].split(batch_size) for label in mine]
    groups = [find_activations(neurons, layers) for layers in _that_fit(neurons)]
    curves = {
        m: {layer: torch.zeros_like(of, dtype=torch.float64) for layer, of in scores[m].items()} for m in scores.metrics
    }
    pooled: dict[str, Tensor] = {}
    with progress_bar(progress, total=len(groups) * sum(map(len, of_class))) as bar:
        for where in groups:
            together = {layer: Scatter.none(neurons.layers[layer].count, device) for layer in where.chains}
            for label, batches in zip(mine, of_class, strict=True):
                for layer, scatter in _scatters(own, task, batches, where, bar).items():
                    if not scatter.mean.isfinite().all():
                        raise TorchsliceError(
                            f"the activations of layer {layer!r} for class {task.classes[label]!r} are NaN or "
                            "infinite, so nothing is similar to them. Check the model's weights and the data."
                        )
                    together[layer] += scatter
                    gram = scatter.resolved()
                    for metric, curve in curves.items():
                        curve[layer][label] = prefix_cka(gram, in_order(scores[metric][layer][label]))
            pooled |= {layer: scatter.pooled(ranks).resolved().cpu() for layer, scatter in together.items()}
    for curve in curves.values():
        curve |= {layer: ranks.sum(values.to(device)).cpu() for layer, values in curve.items()}
    return Similarity(curves, pooled)


def _that_fit(neurons: Neurons) -> Iterator[list[str]]:
    """Yield the layers in groups, in order, whose pairs of float64 matrices [N, N] fit into the memory."""
    group: list[str] = []
    used = 0
    for name, layer in neurons.layers.items():
        used += (size := 16 * layer.count**2)
        if group and used > MEMORY_GB * 2**30:
            yield group
            group, used = [], size
        group.append(name)
    yield group


@torch.no_grad()
def _scatters(
    neurons: Neurons, task: Task, batches: Sequence[Tensor], where: Activations, bar: Advance
) -> dict[str, Scatter]:
    """Return the scatter of every layer over some batches of training samples."""
    found: dict[str, Scatter] = {}
    for rows, inputs in zip(batches, task.train.read(batches, device=device_of(neurons.model)), strict=True):
        with reading(neurons.model, where) as seen:
            neurons.logits(inputs)
        for layer, uses in seen.values.items():
            values = by_position(uses, layer, where, len(rows))  # [B, N, P]
            new = Scatter.of(values.movedim(1, 2).flatten(0, 1))
            found[layer] = found[layer] + new if layer in found else new
        bar("similarity")
    return found
