"""The blueprint of a network: enough plain data to build it again, empty, and to check what is put into it.

origin          {"factory", "arguments"}: what builds the network before anything was cut
layers          per sub-module with widths: its type and the widths it has now
tensors         name -> [dtype, shape, channels_last]
shared          name -> name of the stored tensor that it shares
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..core.record import check_model
from ..errors import TorchsliceError

WIDTHS = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_parameters")
# Names of networks of torchslice, torchvision and timm, and of nothing else: no hub, no path, no other module.
HARMLESS_FACTORY = re.compile(r"((torchvision|timm):)?[\w.-]+")


def describe(
    model: nn.Module, factory: str | None, arguments: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the record of a network and its tensors by name, a shared one once."""
    tensors, shared = _unique(model.state_dict())
    record = {
        "origin": _origin(model, factory, arguments),
        "layers": _widths(model),
        "tensors": {name: signature(tensor) for name, tensor in tensors.items()},
        "shared": shared,
    }
    return record, tensors


def rebuild(record: Mapping[str, Any], *, allow_import: bool) -> nn.Module:
    """Build the network of a record with the recorded widths; its tensors have the right shapes and no values yet.

    Raises a TorchsliceError for a factory that is not permitted or fails, and for a network whose layers or tensors
    are not those of the record in path, type, shape or dtype.
    """
    model = _create(record["origin"], allow_import=allow_import)
    _set_widths(model, record)
    _set_shapes(model, record)
    return model


def signature(tensor: Tensor) -> list[Any]:
    """Return [dtype, shape, channels_last]; the memory layout decides which kernel runs and so the last bits."""
    channels_last = (
        tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), channels_last]


# -- describing -------------------------------------------------------------------------------------------------
def _origin(model: nn.Module, factory: str | None, arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the factory and arguments that build the model before it was cut."""
    check_model(model)
    named = {"factory": factory, "arguments": dict(arguments or {})}
    origin = getattr(model, "origin", None) if factory is None else named
    if origin is None:
        raise TorchsliceError(
            f"this {type(model).__name__} does not say what built it; give factory='package.module:function' "
            "(and its arguments=...), or make the model with models.create."
        )
    if factory is None and arguments is not None:
        raise TorchsliceError("arguments=... belongs to factory=...; without it the model's own origin is saved.")
    return origin


def _widths(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return type and widths of every sub-module that has widths."""
    layers = {}
    for name, module in model.named_modules():
        widths = {key: getattr(module, key) for key in WIDTHS if type(getattr(module, key, None)) is int}
        if widths:
            layers[name] = {"type": type(module).__name__, **widths}
    return layers


def _unique(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state dict into the tensors to store by name, and the names that share one of them."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            shared[name] = seen[key]
        else:
            tensors[name], seen[key] = tensor, name
    return tensors, shared


# -- rebuilding -------------------------------------------------------------------------------------------------
def _create(origin: Mapping[str, Any], *, allow_import: bool) -> nn.Module:
    """Call the factory, without touching the caller's random numbers."""
    factory, arguments = origin["factory"], dict(origin["arguments"])
    if not allow_import and not HARMLESS_FACTORY.fullmatch(factory):
        raise TorchsliceError(
            f"its network is built by {factory!r}, and importing that runs the code of that module. "
            "If you trust the file and the module, load it with allow_import=True."
        )
    arguments.pop("checkpoint_path", None)  # would make timm unpickle a file; the weights are here already
    try:
        with torch.random.fork_rng(devices=[]):
            return models.create(factory, **arguments)
    except TorchsliceError:
        raise
    except Exception as error:
        raise TorchsliceError(f"its factory {factory!r} failed with {type(error).__name__}: {error}.") from error


def _set_widths(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Write the recorded widths into the layers, which must be of the recorded types."""
    modules = dict(model.named_modules())
    factory = record["origin"]["factory"]
    for name, layer in record["layers"].items():
        found = type(modules[name]).__name__ if name in modules else "nothing"
        if found != layer["type"]:
            raise TorchsliceError(
                f"layer {name!r} is a {layer['type']}, and the factory {factory!r} builds {found} there."
            )
        for key in WIDTHS:
            if key in layer:
                setattr(modules[name], key, layer[key])


def _set_shapes(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Give every tensor the shape that follows from its layer's widths, which must be the recorded one."""
    factory = record["origin"]["factory"]
    recorded = {**record["tensors"], **{name: record["tensors"][source] for name, source in record["shared"].items()}}
    state = model.state_dict(keep_vars=True)
    if odd := sorted(set(state) ^ set(recorded)):
        where = "is missing, but is part of" if odd[0] in state else "is not part of"
        raise TorchsliceError(f"tensor {odd[0]!r} {where} the network of the factory {factory!r}.")
    for name, tensor in state.items():
        dtype, shape, _ = recorded[name]
        path, _, leaf = name.rpartition(".")
        expected = list(_shape(model.get_submodule(path), leaf, tensor))
        needed = signature(tensor)[0]
        if expected != shape or (dtype != needed and not getattr(torch, dtype).is_floating_point):
            raise TorchsliceError(
                f"tensor {name!r} is {dtype} {shape}, and the network of the factory {factory!r} "
                f"needs {needed} {expected}."
            )
        tensor.data = tensor.new_empty(expected)


def _shape(module: nn.Module, leaf: str, tensor: Tensor) -> tuple[int, ...]:
    """Return the shape a tensor of a layer has by the layer's widths; any other tensor keeps its own."""
    if isinstance(module, nn.modules.conv._ConvNd):
        if leaf != "weight":
            return (module.out_channels,)
        pair = (module.out_channels, module.in_channels)
        outer, inner = reversed(pair) if module.transposed else pair
        return (outer, inner // module.groups, *module.kernel_size)
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features) if leaf == "weight" else (module.out_features,)
    if isinstance(module, nn.modules.batchnorm._NormBase) and tensor.dim() == 1:
        return (module.num_features,)
    if isinstance(module, nn.PReLU):
        return (module.num_parameters,)
    return tuple(tensor.shape)
