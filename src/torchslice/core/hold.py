"""Hold neurons at zero while a model runs: the reference that every extracted network is checked against."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..slices import Slice
from .find import find_neurons
from .flow import Flags
from .surgery import plan


@contextlib.contextmanager
def holding(model: nn.Module, held: Mapping[str, Flags]) -> Iterator[None]:
    """Hold outputs of sub-modules at zero inside the block.

    `held` maps names to bool [n] over axis 1, over the last axis for linear layers.
    """

    def zero(flags: Tensor) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            axis = -1 if isinstance(module, nn.Linear) else 1
            shape = [1] * output.dim()
            shape[axis] = -1
            return output.masked_fill(flags.to(output.device).view(shape), 0)

        return hook

    handles = []
    try:
        for name, flags in held.items():
            handles.append(model.get_submodule(name).register_forward_hook(zero(torch.as_tensor(flags))))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def masked(model: nn.Module, part: Slice, example: Tensor) -> Iterator[nn.Module]:
    """Run `model` inside the block with the neurons outside `part` held at zero.

    A neuron is held after the norm that follows it; a norm or depthwise convolution whose input channel is held is
    held there too. The hooks are removed at the end of the block, also after an exception.

    >>> with masked(model, slices["cat"] | slices["dog"], data.example):
    ...     logits = model(images)
    """
    with holding(model, plan(find_neurons(model, example), part).held):
        yield model
