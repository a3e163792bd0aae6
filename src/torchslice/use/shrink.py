"""One step smaller: what can be removed from a network at once, and training that keeps removed weights at zero.

A removed weight is a zero of a plain layer, so what is alive is what is not zero.

Shapes: N neurons of a layer.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..core.find import find_neurons
from ..core.neurons import Neurons
from ..core.surgery import plan
from ..data import Data
from ..slices import Slice
from .costs import Cost
from .extract import extract, retention
from .finetune import Tuned, finetune
from .pruning import PRUNING, removal_order, without_first


@dataclass(frozen=True)
class Removal:
    """What can be removed from a network, counted in weights or in neurons: `most` at all, `usual` in one iteration.

    `size(n)` is what is left without n of them; `apply(n)` makes that network, with the scores of its neurons.
    """

    most: int
    usual: int
    size: Callable[[int], Cost]
    apply: Callable[[int], tuple[nn.Module, dict[str, Tensor]]]


def weights_of(network: nn.Module, neurons: Neurons) -> dict[str, Tensor]:
    """Return the weights of convolutions and linear layers that no other layer shares, in forward order.

    `neurons` are those of the network or of the model that it was cut from.
    """
    owners = Counter(id(p) for module in network.modules() for p in module._parameters.values() if p is not None)
    found = {}
    for name, port in neurons.flow.ports.items():
        weight = network.get_submodule(name)._parameters.get("weight")
        if port.ins is not None and weight is not None and owners[id(weight)] == 1:
            found[name] = weight.detach()
    return found


def size_of(network: nn.Module, neurons: Neurons, masks: Mapping[str, Tensor] | None = None) -> Cost:
    """Count the parameters, and the multiply-accumulates of `weights_of`; weights that are zero, or masked, are not."""
    weights = weights_of(network, neurons)
    alive = {name: int(weight.count_nonzero()) for name, weight in (masks or weights).items()}
    others = sum(p.numel() for p in network.parameters()) - sum(weight.numel() for weight in weights.values())
    return Cost(others + sum(alive.values()), sum(neurons.flow.ports[name].positions * n for name, n in alive.items()))


def removal_of_weights(network: nn.Module, neurons: Neurons, *, method: str, rate: float, least: int) -> Removal:
    """Remove weights by a method of PRUNING, the share `rate` of those alive in one iteration; `least` stay."""
    weights = weights_of(network, neurons)
    alive = sum(int(weight.count_nonzero()) for weight in weights.values())

    def size(removed: int) -> Cost:
        return size_of(network, neurons, PRUNING[method](weights, alive - removed))

    def apply(removed: int) -> tuple[nn.Module, dict[str, Tensor]]:
        small = copy.deepcopy(network)
        masks = PRUNING[method](weights, alive - removed)
        for name, weight in weights_of(small, neurons).items():
            weight.masked_fill_(~masks[name], 0)
        return small, {}

    most = max(0, alive - least)
    return Removal(most, min(most, -int(-alive * rate // 1)), size, apply)


def removal_of_neurons(
    network: nn.Module, neurons: Neurons, example: Tensor, scores: Mapping[str, Tensor], *, rate: float
) -> Removal:
    """Remove neurons with the lowest scores by cutting: in one iteration so many that `rate` of the parameters go."""
    weights = weights_of(network, neurons)
    dense = size_of(network, neurons, {name: torch.ones_like(weight) for name, weight in weights.items()})
    if not scores:
        return Removal(0, 0, lambda removed: dense, lambda removed: (network, {}))
    own = find_neurons(network, example)
    order = removal_order(own, scores)

    def size(removed: int) -> Cost:
        kept = retention(network, own, without_first(order, removed))
        return Cost(round(kept.built_param * dense.parameters), round(kept.built_mac * dense.macs))

    def apply(removed: int) -> tuple[nn.Module, dict[str, Tensor]]:
        return cut_with_scores(network, without_first(order, removed), example, own, scores)

    most = max(int(places.max()) for places in order.values())
    wanted = (1 - rate) * dense.parameters
    return Removal(most, bisect_left(range(most), True, key=lambda n: size(n).parameters <= wanted), size, apply)


def cut_with_scores(
    network: nn.Module, part: Slice, example: Tensor, neurons: Neurons, scores: Mapping[str, Tensor]
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Extract a slice, and take the scores of the neurons that the smaller network has, {layer: [N]}.

    Layers that are down to one neuron have no scores: nothing more can be removed there.
    """
    stay = {name: torch.from_numpy(layer.outs) for name, layer in plan(neurons, part).layers.items()}
    left = {name: score.cpu()[stay[name]] for name, score in scores.items()}
    small = extract(network, part, example, neurons=neurons)
    return small, {name: score for name, score in left.items() if len(score) > 1}


class _Sparse(nn.Module):
    """A network that is run with the weights that are zero at the start at zero, whatever an optimizer does to them."""

    def __init__(self, network: nn.Module, neurons: Neurons) -> None:
        super().__init__()
        self.network = network
        self.names = list(weights_of(network, neurons))
        for number, weight in enumerate(weights_of(network, neurons).values()):
            self.register_buffer(f"alive_{number}", weight != 0)

    def forward(self, *inputs: Tensor) -> Tensor:
        return functional_call(self.network, self.weights(), inputs)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights as they are used, by name."""
        named = ((f"{name}.weight", self.get_buffer(f"alive_{n}")) for n, name in enumerate(self.names))
        return {name: torch.where(alive, self.network.get_parameter(name), 0.0) for name, alive in named}


def finetune_sparse(network: nn.Module, data: Data, *, neurons: Neurons, **settings: Any) -> Tuned:
    """Train as `finetune` does, but leave the weights that are zero exactly zero, whatever momentum and decay do.

    >>> tuned = finetune_sparse(pruned, data, neurons=neurons, epochs=3, weight_decay=1e-4)
    """
    tuned = finetune(_Sparse(network, neurons), data, **settings)
    sparse = cast(_Sparse, tuned.model)
    with torch.no_grad():
        for name, weight in sparse.weights().items():
            sparse.network.get_parameter(name).copy_(weight)
    return replace(tuned, model=sparse.network)
