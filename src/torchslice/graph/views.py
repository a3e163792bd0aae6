"""Copies of models: whole ones, and views that share all tensors.

Hooks and modes set on a view never touch the model, which other threads may be running meanwhile.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TorchsliceError, first_line

PLAIN = (type(None), bool, int, float, str)
OWN = vars(nn.Module()).keys()  # what every module has
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")  # of what a module computes


def copy_of(model: nn.Module, replaced: Mapping[int, Any]) -> nn.Module:
    """Return a copy of a model in which some tensors, by their `id`, are replaced by others.

    Raises TorchsliceError for models that hold what cannot be copied.
    """
    modules = list(model.modules())
    computed = {  # by hooks, such as those of weight_norm, which compute them again
        id(tensor): tensor.detach().clone()
        for module in modules
        for tensor in vars(module).values()
        if isinstance(tensor, Tensor) and not tensor.is_leaf and id(tensor) not in replaced
    }
    buffers = [tensor for module in modules for tensor in module._buffers.values() if id(tensor) not in replaced]
    memo: dict[int, Any] = {**_cloned(buffers), **computed, **replaced}
    try:
        kinds = {type(module) for module in modules}
        if any(hasattr(kind, "__deepcopy__") or kind.__getstate__ is not nn.Module.__getstate__ for kind in kinds):
            return copy.deepcopy(model, memo)  # they say themselves how they are copied
        for module in modules:
            memo[id(module)] = module.__class__.__new__(module.__class__)
        for module in modules:
            for key, value in vars(module).items():
                alone = key in OWN and not value  # most of what there is: hooks that nobody set
                memo[id(module)].__dict__[key] = (
                    value if type(value) in PLAIN else type(value)() if alone else _copied(value, memo)
                )
        return memo[id(model)]
    except (TypeError, RuntimeError) as error:
        raise TorchsliceError(
            f"the model cannot be copied ({first_line(error)}); take what is no plain data off its modules."
        ) from error


def _cloned(buffers: Sequence[Any]) -> dict[int, Tensor]:
    """Copy plain tensors that have their memory for themselves as `deepcopy` does, in a hundredth of its time."""
    plain = [t for t in buffers if type(t) is Tensor and t.layout == torch.strided and not t.requires_grad]
    places = Counter(tensor.data_ptr() for tensor in plain)
    return {
        id(t): t.clone()
        for t in plain
        if t.is_meta or (places[t.data_ptr()] == 1 and t.untyped_storage().nbytes() == t.nbytes)
    }


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Copy an attribute as `deepcopy` does, which takes long."""
    if type(value) is tuple and all(type(item) in PLAIN for item in value):
        return value
    if type(value) in (dict, OrderedDict) and all(id(item) in memo for item in value.values()):
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
