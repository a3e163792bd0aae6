"""The check of the whole network: a slice that is like every layer may still answer unlike the network.

Shapes: n samples, C classes, N neurons of a layer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...cut.extract import masked
from ...data import Task
from ...graph.neurons import Neurons
from ...graph.tied import of_unit_length
from ...slices import Slice
from ...training import predict
from .selection import ROUNDING, in_order

SAMPLES = 512  # that both networks answer
STEPS = 32  # parts in which neurons are added


def complete_network(
    neurons: Neurons, task: Task, scores: Mapping[str, Tensor], critical: Slice, theta: float, samples: Tensor
) -> Slice:
    """Add neurons of all layers until the network of a slice answers as like the whole one as theta asks.

    How like is the CKA of the logits, on some of the training samples. Neurons come by their mean contribution over the
    classes, each layer's divided by its norm, a 32nd of those that are outside at a time.

    Args:
        scores: {layer: [C, N]}.
        samples: indices of training samples, int64 [n]; at most 512 of them, evenly, are looked at.

    >>> few = neurons.random(0.3)
    >>> all_of_it = complete_network(neurons, task, scores["taylor"], few, 1.0, scores.samples)
    >>> few <= all_of_it, len(all_of_it) > len(few)
    (True, True)
    """
    rows = samples[:: -(-len(samples) // SAMPLES)]
    few = replace(task, train=task.train.take(rows))
    whole = predict(neurons.model, few, "train", output=neurons.output)
    worth = torch.cat([of_unit_length(of.mean(0)) for of in scores.values()])
    order = in_order(worth.masked_fill(torch.cat([critical[layer] for layer in scores]), -torch.inf))
    outside = len(neurons) - len(critical)

    def larger(step: int) -> Slice:
        added = torch.zeros(len(worth), dtype=torch.bool).index_fill_(0, order[: -(-outside * step // STEPS)], True)
        parts = added.split([of.shape[1] for of in scores.values()])
        return critical | Slice(dict(zip(scores, parts, strict=True)))

    def alike(step: int) -> bool:
        logits = predict(masked(neurons, larger(step)), few, "train", output=neurons.output)
        return cka(logits, whole) >= theta - ROUNDING

    return larger(bisect_left(range(STEPS), True, key=alike))


def cka(one: Tensor, other: Tensor) -> float:
    """Return the linear CKA (arXiv 1905.00414, section 3) of two sets of vectors [n, C], in [0, 1].

    Both constant is 1, one of them 0.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 5.0]])
    >>> round(cka(x, 3 * x + 1), 9)
    1.0
    """
    one, other = (x.double() - x.double().mean(0) for x in (one, other))
    sizes = [float((x.T @ x).norm()) for x in (one, other)]
    if min(sizes) == 0:
        return float(max(sizes) == 0)
    return float((one.T @ other).norm() ** 2) / (sizes[0] * sizes[1])
