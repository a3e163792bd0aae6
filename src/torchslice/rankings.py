"""Rankings: which neurons come first. Slices of any size are their prefixes, so the slices of one ranking are nested.

Shapes: C classes, L layers, N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import TorchsliceError
from .slices import WIDEST, Slice

POWERS = (0.5, 1.6)  # of the share in the first layer and in the last


class Ranking:
    """For every sliceable layer of a model an order of its neurons, the best first.

    Formally one permutation of 0..N-1 per layer, int64 [N], on the CPU. The ranking of every class is a
    {class: Ranking}, as the slice of every class is a {class: Slice}.

    >>> ranking = Ranking({"conv1": torch.tensor([2, 0, 1])})
    >>> ranking.prefix({"conv1": 2})["conv1"]
    tensor([ True, False,  True])
    """

    __slots__ = ("_orders",)

    def __init__(self, orders: Mapping[str, Tensor]) -> None:
        for layer, order in orders.items():
            width = order.numel()
            if order.dim() != 1 or width == 0 or not torch.equal(order.sort().values.cpu(), torch.arange(width)):
                raise TorchsliceError(
                    f"layer {layer!r}: a ranking names every neuron of a layer once, int64 [N]; got {order.tolist()!r}."
                )
        # a thousand classes of a large network fit into memory as int32
        self._orders = {layer: order.detach().to("cpu", torch.int32, copy=True) for layer, order in orders.items()}

    def __getitem__(self, layer: str) -> Tensor:
        """Return a copy of the order of a layer, int64 [N]."""
        return self._orders[layer].long()

    @property
    def layers(self) -> dict[str, int]:
        """Width N of every layer, in the model's order."""
        return {layer: order.numel() for layer, order in self._orders.items()}

    def prefix(self, counts: Mapping[str, int]) -> Slice:
        """Return the slice of the first neurons of every layer, so many as `counts` says, see `widths`.

        Counts that are larger nowhere give a slice that is contained; all neurons are the whole network.
        """
        if {*counts} != {*self._orders}:
            odd = next(iter({*counts} ^ {*self._orders}))
            raise TorchsliceError(
                f"a prefix needs a count for each layer of the ranking and for no other; layer {odd!r} is "
                f"{'not in the ranking' if odd in counts else 'without one'}."
            )
        masks = {}
        for layer, order in self._orders.items():
            if not 0 <= counts[layer] <= len(order):
                raise TorchsliceError(f"layer {layer!r} has {len(order)} neurons; the prefix has {counts[layer]}.")
            masks[layer] = torch.zeros(len(order), dtype=torch.bool).index_fill_(0, order[: counts[layer]].long(), True)
        return Slice(masks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ranking):
            return NotImplemented
        return self.layers == other.layers and all(torch.equal(o, other._orders[n]) for n, o in self._orders.items())

    def __hash__(self) -> int:
        return hash(frozenset((name, order.numpy().tobytes()) for name, order in self._orders.items()))

    def to_plain(self) -> dict[str, list[int]]:
        """Return the ranking as JSON-able data: per layer its neurons, the best first."""
        return {layer: order.tolist() for layer, order in self._orders.items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Ranking:
        """Rebuild a ranking from `to_plain`."""
        for layer, order in plain.items():
            if not isinstance(order, list) or not 1 <= len(order) <= WIDEST or {*map(type, order)} != {int}:
                raise TorchsliceError(f"layer {layer!r}: expected the neurons of a layer, got {str(order)[:80]}.")
            if not all(0 <= neuron < len(order) for neuron in order):
                raise TorchsliceError(f"layer {layer!r} has {len(order)} neurons; the ranking names others.")
        return cls({layer: torch.tensor(order) for layer, order in plain.items()})

    def __repr__(self) -> str:
        return f"Ranking({sum(self.layers.values())} neurons in {len(self._orders)} layers)"


def by_score(scores: Mapping[str, Tensor]) -> Ranking:
    """Rank the neurons by one score each, {layer: [N]}: the largest first, equal ones by index.

    >>> by_score({"conv1": torch.tensor([0.2, 0.1, 0.9])})["conv1"]
    tensor([2, 0, 1])
    """
    return Ranking({layer: of.argsort(descending=True, stable=True) for layer, of in scores.items()})


def by_mean_score(scores: Mapping[str, Tensor]) -> Ranking:
    """Rank the neurons for some classes, by the mean of their scores, {layer: [C, N]}.

    Every class weighs alike in every layer: its scores there are divided by the largest of them.
    """
    return by_score({layer: scaled(of).mean(0) for layer, of in scores.items()})


def by_turns(scores: Mapping[str, Tensor], *, cost: float = 0.3) -> list[Ranking]:
    """Rank the neurons for every class by its scores, {layer: [C, N]}, so that the classes share less than they would.

    Classes choose in turns, one neuron each, by their scores divided by the largest in the layer. A neuron costs `cost`
    for every class that has it, in units of the mean number so far (at least 1). So neurons that all classes want do
    not crowd out the others. Early layers serve all classes alike and cost the most multiply-accumulates, so all share
    them: the first layer has one order, by the mean score, and free of cost. Both change linearly with depth, until in
    the last layer every class goes by its own scores and pays the full cost. A single layer is a last one.

    >>> scores = torch.tensor([[5, 4, 1], [4, 3, 0]])
    >>> [ranking["last"].tolist() for ranking in by_turns({"first": scores, "last": scores})]
    [[0, 1, 2], [1, 0, 2]]
    """
    depths = torch.linspace(int(len(scores) == 1), 1, len(scores), dtype=torch.float64).tolist()
    orders = {}
    for depth, (layer, of) in zip(depths, scores.items(), strict=True):
        worth = scaled(of)
        worth = scaled(depth * worth + (1 - depth) * worth.mean(0))
        orders[layer] = _turns(worth, cost * depth)
    return [Ranking({layer: of[label] for layer, of in orders.items()}) for label in range(len(worth))]


def _turns(worth: Tensor, cost: float) -> Tensor:
    """Let classes choose neurons in turns by what they are worth, [C, N], and cost: int64 [C, N]."""
    classes, width = worth.shape
    order, left = np.empty((classes, width), np.int64), worth.numpy().copy()  # ten times as fast as with tensors
    holders = np.zeros(width)
    for turn in range(width):
        unit = cost / max(1.0, classes * turn / width)
        price = unit * holders
        for step in range(classes):
            label = (turn + step) % classes
            best = (left[label] - price).argmax()
            order[label, turn] = best
            left[label, best] = -np.inf
            holders[best] += 1
            price[best] = unit * holders[best]
    return torch.from_numpy(order)


def by_best_rank(rankings: Iterable[Ranking]) -> Ranking:
    """Rank the neurons for some classes by the best rank in any of their rankings, of which there must be at least one.

    So the first neurons are unions of equally long prefixes. Neurons with the same best rank come by their mean rank.

    >>> cat, dog = (Ranking({"conv1": torch.tensor(order)}) for order in ([2, 0, 1], [1, 0, 2]))
    >>> by_best_rank([cat, dog])["conv1"]
    tensor([1, 2, 0])
    """
    first, *others = rankings
    for other in others:
        if other.layers != first.layers:
            raise TorchsliceError("these are rankings of different models; join rankings of the same model only.")
    orders = {}
    for layer, width in first.layers.items():
        ranks = torch.stack([ranking[layer].argsort() for ranking in (first, *others)])  # [C, N]
        orders[layer] = (ranks.amin(0) * len(ranks) * width + ranks.sum(0)).argsort(stable=True)
    return Ranking(orders)


def scaled(scores: Tensor) -> Tensor:
    """Divide the scores of every class by the largest of them: [C, N] -> float64 [C, N], at most 1."""
    scores = scores.double()
    return scores / scores.amax(1, keepdim=True).clamp(min=1e-300)


def widths(
    layers: Mapping[str, int],
    share: float,
    *,
    powers: tuple[float, float] = POWERS,
    steps: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Spread a share in (0, 1] of the network over its layers: how many neurons of each are kept, {layer: count}.

    A layer of N neurons keeps N * share ** p of them, where p changes linearly over the layers: with powers below 1
    first and above 1 last, early layers keep more than late ones. A larger share gives no layer less, and 1 gives all.

    Args:
        layers: N of every layer, in forward order.
        powers: p of the first layer and of the last.
        steps: {layer: number}, of which its count is a multiple, rounded up (at most to N); 1 by default.

    >>> widths({"a": 16, "b": 16, "c": 16}, 0.25, powers=(0.5, 1.5))
    {'a': 8, 'b': 4, 'c': 2}
    """
    if not 0 < share <= 1:
        raise TorchsliceError(f"share must be in (0, 1], got {share}.")
    exponents = torch.linspace(*powers, len(layers), dtype=torch.float64).tolist()  # [L]
    counts = {}
    for (layer, width), power in zip(layers.items(), exponents, strict=True):
        count = max(1, round(width * share**power))
        step = 1 if steps is None else steps[layer]
        counts[layer] = min(width, -(-count // step) * step)
    return counts
