"""The kinds of slices every invariant is tested on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from torchslice.graph.neurons import Neurons
from torchslice.slices import Slice


def few(neurons: Neurons, count: int) -> Slice:
    """Keep `count` neurons, spread out, in every other layer, and everything elsewhere."""
    masks = neurons.full().masks
    for name in [name for name, layer in neurons.layers.items() if layer.count > count][::2]:
        keep = torch.linspace(0, neurons.layers[name].count - 1, count).round().long()
        masks[name] = torch.zeros_like(masks[name]).index_fill_(0, keep, True)
    return Slice(masks)


SLICES: dict[str, Callable[[Neurons], Slice]] = {
    "half": lambda neurons: neurons.random(0.5, tied=False, seed=1),
    "tied half": lambda neurons: neurons.random(0.5, seed=1),
    "tenth": lambda neurons: neurons.random(0.1, seed=2),
    "one": lambda neurons: few(neurons, 1),
    "three": lambda neurons: few(neurons, 3),
}
