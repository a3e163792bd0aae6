"""What a found slice and its sub-model are compared with."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..inputs import device_of
from ..slices import Slice


def random_like(slice_: Slice, *, seed: int = 0) -> Slice:
    """Return a random slice that keeps as many neurons of every layer as `slice_` does.

    All layers of one width are shuffled alike, so that coupled layers overlap as they did and residual streams are as
    wide in the network cut from the result as in the one cut from `slice_`.

    >>> random_like(Slice({"conv1": torch.tensor([True, False, False])}), seed=1)
    Slice(1 of 3 neurons, 33.3%, in 1 layers)
    """
    orders = {n: torch.randperm(n, generator=torch.Generator().manual_seed(seed + n)) for n in slice_.layers.values()}
    return Slice({layer: slice_[layer][orders[width]] for layer, width in slice_.layers.items()})


def reinitialised(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Return an untrained copy of a model, every layer drawn anew by its own `reset_parameters`.

    Parameters that no layer can reset (class tokens, layer scales) are drawn with mean 0 and deviation 0.02; those of
    norms become 1, and their biases 0. Drawn on the CPU, so that every device starts from the same numbers.

    >>> untrained = reinitialised(small, seed=1)
    """
    device = device_of(model)
    model = copy.deepcopy(model).cpu()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if reset is not None:
                reset()
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if type(module).__name__.endswith("Norm"):
                    parameter.fill_(name != "bias")
                else:
                    parameter.normal_(std=0.02)
    return model.to(device)
