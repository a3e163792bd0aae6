"""Which weights of a network to keep, and which neurons to give up first.

A pruning method is a pure function of all weights and of how many may stay; a weight that is zero is gone already, so
what stays shrinks from call to call. New methods can be registered in PRUNING.

Shapes: L layers, N neurons of a layer. Weights are {layer: Tensor}, in forward order, masks bool of the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import TorchsliceError
from ..graph.neurons import Neurons
from ..graph.tied import mean_scores
from ..registry import Registry

LAST_LAYER_FRACTION = 0.2  # of its weights, which Uniform+ keeps at least
Method = Callable[[Mapping[str, Tensor], int], dict[str, Tensor]]
#: name -> function (weights, count) -> masks with at most `count` weights that are not zero
PRUNING: Registry[Method] = Registry("pruning method")


def by_score(score: Callable[[Tensor], Tensor]) -> Method:
    """Keep the weights with the highest scores of all layers."""
    return lambda weights, count: _highest({name: score(weight) for name, weight in weights.items()}, count)


def by_layer(divide: Callable[[Mapping[str, torch.Size], int], dict[str, int]]) -> Method:
    """Keep the largest magnitudes of every layer, as many as `divide` gives to it."""

    def keep(weights: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        counts = divide({name: weight.shape for name, weight in weights.items()}, count)
        return {name: _highest({name: weight.abs()}, counts[name])[name] for name, weight in weights.items()}

    return keep


def lamp_scores(weight: Tensor) -> Tensor:
    """Score the weights u of a layer by w_u^2 / sum of w_v^2 over all v with abs(w_v) >= abs(w_u), float64 in [0, 1].

    The score of Lee et al. (arXiv 2010.07611, section 3); weights of one magnitude have one score.

    >>> lamp_scores(torch.tensor([1.0, -2.0, 2.0]))
    tensor([0.1111, 0.5000, 0.5000], dtype=torch.float64)
    """
    squares = weight.detach().double().flatten().square()
    ascending = squares.sort().values
    as_large = ascending.flip(0).cumsum(0).flip(0)  # sum over each weight and all after it
    scores = squares / as_large[torch.searchsorted(ascending, squares)]
    return scores.nan_to_num(nan=0.0).reshape(weight.shape)  # 0 / 0 where the layer is empty


def uniform_plus_counts(shapes: Mapping[str, torch.Size], count: int) -> dict[str, int]:
    """Divide `count` weights among the layers at one density, but keep a first convolution and 20 % of the last layer.

    Uniform+ of Gale et al. (arXiv 1902.09574, section 6.1), there for ResNet50. Numbers are rounded down.
    """
    counts = {name: shape.numel() for name, shape in shapes.items()}
    first, last = next(iter(shapes)), list(shapes)[-1]
    others = {name: size for name, size in counts.items() if name != first or len(shapes[first]) <= 2}
    left: float = count - sum(counts.values()) + sum(others.values())
    if last in others and left < LAST_LAYER_FRACTION * sum(others.values()):
        size = others.pop(last)
        counts[last] = _rounded_down(LAST_LAYER_FRACTION * size)
        left -= LAST_LAYER_FRACTION * size
    density = min(1.0, left / max(1, sum(others.values())))
    return counts | {name: _rounded_down(density * size) for name, size in others.items()}


def erk_counts(shapes: Mapping[str, torch.Size], count: int) -> dict[str, int]:
    """Divide `count` weights in proportion to n_out + n_in + k_h + k_w of each layer; full layers stay dense.

    Erdos-Renyi-Kernel of Evci et al. (arXiv 1911.11134, section 3). Numbers are rounded down.
    """
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    free, scale = set(shapes), 0.0
    while free:
        left = count - sum(size for name, size in sizes.items() if name not in free)
        scale = left / sum(sum(shapes[name]) for name in free)
        full = {name for name in free if scale * sum(shapes[name]) >= sizes[name]}
        if not full:
            break
        free -= full
    return {n: _rounded_down(scale * sum(shapes[n])) if n in free else size for n, size in sizes.items()}


def removal_order(neurons: Neurons, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the place of every neuron in the order in which neurons are given up, int64 [N] per layer.

    Neurons that leave together share one place, by the mean of their scores, which are at least 0, see
    `graph.tied.mean_scores`. The best neuron of every layer comes last, so that no layer loses all.
    """
    sets, means = neurons.sets, mean_scores(neurons.sets, scores)
    at, flat = (torch.cat([of[name] for name in means]) for of in (sets, means))  # [all neurons]
    mean = torch.full([int(at.max()) + 1], torch.inf, dtype=torch.float64).index_copy_(0, at, flat)  # [sets]
    mean[[int(sets[name][score.argmax()]) for name, score in means.items()]] = torch.inf
    order = mean.argsort(stable=True)
    last = int(mean.isfinite().sum())
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)).clamp(max=last))
    return {name: place[sets[name]] for name in means}


def checked_scores(neurons: Neurons, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the scores of the layers; raise unless there is one of at least 0 for every neuron."""
    for name, layer in neurons.layers.items():
        score = scores.get(name)
        if score is None or score.shape != (layer.count,) or not (score >= 0).all():
            given = "none" if score is None else f"{list(score.shape)}, least {score.min().item():g}"
            raise TorchsliceError(
                f"layer {name!r} needs scores [{layer.count}] of at least 0, one for each neuron; got {given}."
            )
    return {name: scores[name] for name in neurons.layers}


def _highest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Mark the `count` highest scores of all layers together, never a zero; ties are broken by place."""
    flat = torch.cat([score.detach().flatten() for score in scores.values()])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[: max(0, count)]] = True
    parts = (chosen & (flat > 0)).split([score.numel() for score in scores.values()])
    return {name: part.reshape(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def _rounded_down(number: float) -> int:
    """Round down, but for an error of floating point just below a whole number."""
    return int(max(0.0, number) + 1e-9)


PRUNING.register("lamp")(by_score(lamp_scores))
PRUNING.register("global")(by_score(torch.abs))  # it may leave a layer empty
PRUNING.register("uniform+")(by_layer(uniform_plus_counts))
PRUNING.register("erk")(by_layer(erk_counts))
