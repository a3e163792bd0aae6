"""Copies of models: whole ones, and views that share all tensors.

Hooks and modes set on a view never touch the model, which other threads may be running meanwhile.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import TorchsliceError, first_line

PLAIN = (type(None), bool, int, float, str)
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")  # of what a module computes


def copy_of(model: nn.Module, replaced: Mapping[int, Any]) -> nn.Module:
    """Return a copy of a model in which some tensors, by their `id`, are replaced by others.

    Raises TorchsliceError for models that hold what cannot be copied.
    """
    computed = {  # by hooks, such as those of weight_norm, which compute them again
        id(tensor): tensor.detach().clone()
        for module in model.modules()
        for tensor in vars(module).values()
        if isinstance(tensor, Tensor) and not tensor.is_leaf and id(tensor) not in replaced
    }
    memo: dict[int, Any] = {**computed, **replaced}
    modules = list(model.modules())
    try:
        if any(hasattr(type(m), "__deepcopy__") or type(m).__getstate__ is not nn.Module.__getstate__ for m in modules):
            return copy.deepcopy(model, memo)  # they say themselves how they are copied
        for module in modules:
            memo[id(module)] = module.__class__.__new__(module.__class__)
        for module in modules:
            for key, value in vars(module).items():
                memo[id(module)].__dict__[key] = value if type(value) in PLAIN else _copied(value, memo)
        return memo[id(model)]
    except (TypeError, RuntimeError) as error:
        raise TorchsliceError(
            f"the model cannot be copied ({first_line(error)}); take what is no plain data off its modules."
        ) from error


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Copy an attribute as `deepcopy` does, which takes long for the empty dictionaries of hooks of every module."""
    if type(value) in (dict, OrderedDict) and (not value or all(id(item) in memo for item in value.values())):
        copied = memo[id(value)] = type(value)()
        copied.update({key: memo[id(item)] for key, item in value.items()})
        return copied
    return copy.deepcopy(value, memo)


def view_of(model: nn.Module, device: str | None = None) -> nn.Module:
    """Return a copy of the modules of a model that shares every parameter, buffer and constant tensor with it.

    On the device "meta" the tensors have no values.

    >>> view = view_of(model)
    >>> next(view.parameters()) is next(model.parameters()), view is model
    (True, False)
    """
    shared = {
        id(tensor): tensor if device is None else _on(tensor, device)
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        if isinstance(tensor, Tensor)
    }
    return copy_of(model, shared)


def _on(tensor: Tensor, device: str) -> Tensor:
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
