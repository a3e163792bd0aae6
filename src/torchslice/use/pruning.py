"""Which weights of a network to keep, and which neurons to give up first.

A pruning method is a pure function of all weights and of how many may stay; a weight that is zero is gone already, so
what stays shrinks from call to call. New methods can be registered in PRUNING.

Shapes: L layers, N neurons of a layer. Weights are {layer: Tensor}, in forward order, masks bool of the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..core.neurons import Neurons
from ..errors import TorchsliceError
from ..registry import Registry
from ..slices import Slice

LAST_LAYER_SHARE = 0.2  # of its weights, which Uniform+ keeps at least
#: name -> function (weights, count) -> masks with at most `count` weights that are not zero
PRUNING: Registry[Callable[[Mapping[str, Tensor], int], dict[str, Tensor]]] = Registry("pruning method")


@PRUNING.register("lamp")
def lamp(weights: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Keep the `count` weights with the highest LAMP scores of all layers."""
    return _highest({name: lamp_scores(weight) for name, weight in weights.items()}, count)


@PRUNING.register("global")
def global_magnitude(weights: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Keep the `count` weights of the largest magnitudes of all layers, which may leave a layer empty."""
    return _highest({name: weight.abs() for name, weight in weights.items()}, count)


@PRUNING.register("uniform+")
def uniform_plus(weights: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Keep the largest magnitudes of every layer, in the numbers that `uniform_plus_counts` says."""
    return _highest_each(weights, uniform_plus_counts({name: w.shape for name, w in weights.items()}, count))


@PRUNING.register("erk")
def erk(weights: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Keep the largest magnitudes of every layer, in the numbers that `erk_counts` says."""
    return _highest_each(weights, erk_counts({name: w.shape for name, w in weights.items()}, count))


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
    """Share `count` weights out at one density, but all of a first convolution and at least 20 % of the last layer.

    Uniform+ of Gale et al. (arXiv 1902.09574, section 6.1), there for ResNet50. Numbers are rounded down.

    >>> uniform_plus_counts({"conv": torch.Size([2, 1, 3, 3]), "a": torch.Size([5, 8]), "b": torch.Size([2, 5])}, 38)
    {'conv': 18, 'a': 16, 'b': 4}
    """
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    first, last = next(iter(shapes)), list(shapes)[-1]
    dense = {first} if len(shapes[first]) > 2 else set()
    rest = count - sum(sizes[name] for name in dense)
    density = rest / max(1, sum(size for name, size in sizes.items() if name not in dense))
    least = 0.0 if last in dense else LAST_LAYER_SHARE
    if density < least:
        middle = sum(size for name, size in sizes.items() if name not in dense | {last})
        density = max(0.0, rest - least * sizes[last]) / max(1, middle)
    densities = {name: 1.0 if name in dense else max(density, least) if name == last else density for name in sizes}
    return {name: _rounded_down(min(1.0, densities[name]) * size) for name, size in sizes.items()}


def erk_counts(shapes: Mapping[str, torch.Size], count: int) -> dict[str, int]:
    """Share `count` weights out in proportion to n_out + n_in + k_h + k_w of each layer; full layers stay dense.

    Erdos-Renyi-Kernel of Evci et al. (arXiv 1911.11134, section 3). Numbers are rounded down.

    >>> erk_counts({"a": torch.Size([100, 50]), "b": torch.Size([10, 100])}, 260)
    {'a': 150, 'b': 110}
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

    Scores are divided by the Euclidean norm of their layer (Molchanov et al., arXiv 1611.06440, section 2.2). Coupled
    neurons have one place, by their mean score. The best neuron of every layer comes last, so that
    no layer is left without one.

    Args:
        scores: how critical each neuron is, float [N] per layer, at least 0.
    """
    wires = {name: neurons.wires[neurons.flow.ports[name].outs] for name in neurons.layers}
    total = np.zeros(int(neurons.wires.max()) + 1)  # [wires]
    members = np.zeros_like(total)
    for name, at in wires.items():
        score = scores[name].double().cpu()
        np.add.at(total, at, (score / score.norm().clamp(min=1e-300)).numpy())
        np.add.at(members, at, 1)
    mean = total / members.clip(min=1)
    best = {int(at[mean[at].argmax()]) for at in wires.values()}
    others = np.array(sorted({int(wire) for at in wires.values() for wire in at} - best), dtype=int)
    place = np.full(len(total), len(others))
    place[others[mean[others].argsort(kind="stable")]] = np.arange(len(others))
    return {name: torch.from_numpy(place[at]) for name, at in wires.items()}


def without_first(order: Mapping[str, Tensor], removed: int) -> Slice:
    """Return the slice without the neurons at the first `removed` places of `removal_order`."""
    return Slice({layer: place >= removed for layer, place in order.items()})


def worthiest(model: nn.Module, neurons: Neurons, scores: Mapping[str, Tensor], param_share: float) -> Slice:
    """Return the neurons with the highest scores per parameter, as many as fit into a share of all parameters.

    Scores are divided by the Euclidean norm of their layer; the parameters of a neuron are its row of the weight, its
    bias, and those of a norm of its own. So cheap neurons come first, such as those of early convolutions.

    Args:
        scores: how critical each neuron is, float [N] per layer, at least 0.
        param_share: in (0, 1].

    >>> readapt(model, worthiest(model, neurons, scores, 0.2), new_samples, data)
    """
    if not 0 < param_share <= 1:
        raise TorchsliceError(f"param_share must be in (0, 1], got {param_share:g}.")
    left = param_share * sum(p.numel() for p in model.parameters())
    costs, worth = {}, []
    for name, layer in neurons.layers.items():
        modules = {model.get_submodule(part) for part in (name, layer.hold)}
        costs[name] = sum(p[0].numel() for module in modules for p in module.parameters(recurse=False))
        score = scores[name].double().cpu()
        value = score / score.norm().clamp(min=1e-300) / costs[name]
        worth += [(-float(v), len(costs), i, name) for i, v in enumerate(value)]
    masks = neurons.none().masks
    for _, _, i, name in sorted(worth):
        if costs[name] <= left:
            masks[name][i] = True
            left -= costs[name]
    return Slice(masks)


def _highest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Mark the `count` highest scores of all layers together, never a zero; ties are broken by place."""
    flat = torch.cat([score.detach().flatten() for score in scores.values()])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[: max(0, count)]] = True
    parts = (chosen & (flat > 0)).split([score.numel() for score in scores.values()])
    return {name: part.reshape(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def _highest_each(weights: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Mark the largest magnitudes of every layer, as many as `counts` says."""
    return {name: _highest({name: weight.abs()}, counts[name])[name] for name, weight in weights.items()}


def _rounded_down(number: float) -> int:
    """Round down, but for an error of floating point just below a whole number."""
    return int(max(0.0, number) + 1e-9)
