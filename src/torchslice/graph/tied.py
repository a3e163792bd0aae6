"""Neurons that leave together: only when all of them are outside a slice is the network that is built as small as it.

These are the coupled neurons, and those in the same place of every group of a grouped convolution or of every part that
a tensor is split into, because these must stay equally wide (where a group is one channel wide, all neurons of the
group). They form a *set*; each has a
number.

Shapes: N neurons of a layer, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..slices import Slice
from .flow import Flow, connected
from .layers import Grouped, Ids

Sets = Mapping[str, Tensor]  # {layer: number of the set that each neuron is in, int64 [N]}


def sets_of(flow: Flow, wires: Ids, layers: Mapping[str, Ids]) -> dict[str, Tensor]:
    """Return the sets of the layers' neurons, of which `layers` has the wires, {layer: int [N]}."""
    links = [(np.broadcast_to(wires[parts[:1]], parts.shape), wires[parts]) for parts in flow.even]
    for port in flow.ports.values():
        if isinstance(port, Grouped) and port.ins is not None:
            outs, ins = (wires[ids].reshape(port.groups, -1) for ids in (port.outs, port.ins))
            if min(outs.shape[1], ins.shape[1]) > 1:
                links += [(np.broadcast_to(side[0], side.shape), side) for side in (outs, ins)]
            else:
                links += [(np.broadcast_to(outs[:, :1], side.shape), side) for side in (outs, ins)]
    sets = connected(links, int(wires.max(initial=-1)) + 1)
    return {name: torch.from_numpy(sets[own].astype(np.int64)) for name, own in layers.items()}


def mean_scores(sets: Sets, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every neuron the mean score of its set, {layer: [..., N]} -> float64 of the same shapes.

    Scores of a layer are divided by their Euclidean norm first (Molchanov et al., arXiv 1611.06440, section 2.2), so
    that all layers have a say. The order in a layer whose neurons leave alone stays what it was.

    >>> sets = {"a": torch.tensor([0, 1]), "b": torch.tensor([1, 2])}
    >>> mean_scores(sets, {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 2.0])})
    {'a': tensor([0.6000, 0.4000], dtype=torch.float64), 'b': tensor([0.4000, 1.0000], dtype=torch.float64)}
    """
    at = torch.cat([sets[layer] for layer in scores])
    rows = next(iter(scores.values())).shape[:-1]
    mean = torch.zeros(*rows, int(at.max()) + 1, dtype=torch.float64)
    for layer, score in scores.items():
        mean.index_add_(-1, sets[layer], of_unit_length(score))
    mean /= at.bincount().clamp(min=1)
    return {layer: mean[..., sets[layer]] for layer in scores}


def of_unit_length(score: Tensor) -> Tensor:
    """Divide the scores of a layer by their Euclidean norm, float64 on the CPU."""
    score = score.double().cpu()
    return score / score.norm().clamp(min=1e-300)


def closed(sets: Sets, slice_: Slice) -> Slice:
    """Add to a slice all neurons that leave together with one in it.

    >>> sets = {"a": torch.tensor([0, 1]), "b": torch.tensor([1, 2])}
    >>> closed(sets, Slice({"a": torch.tensor([False, True]), "b": torch.tensor([False, False])}))["b"]
    tensor([ True, False])
    """
    kept = torch.cat([sets[layer][mask] for layer, mask in slice_.masks.items()])
    return Slice({layer: torch.isin(sets[layer], kept) for layer in slice_.layers})


def together(sets: Sets) -> list[list[str]]:
    """Return the layers, joined where their neurons leave together.

    >>> together({"a": torch.tensor([0, 1]), "b": torch.tensor([1, 2]), "c": torch.tensor([3])})
    [['a', 'b'], ['c']]
    """
    links = [(np.full(len(numbers), layer), numbers.numpy() + len(sets)) for layer, numbers in enumerate(sets.values())]
    parts = connected(links, len(sets) + 1 + max(int(numbers.max()) for numbers in sets.values()))
    found: dict[int, list[str]] = {}
    for layer, part in zip(sets, parts.tolist(), strict=False):
        found.setdefault(part, []).append(layer)
    return list(found.values())
