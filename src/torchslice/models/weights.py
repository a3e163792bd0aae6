"""Weights that were trained elsewhere, read from a file without running anything that is in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TorchsliceError
from ..files import read_safetensors
from .attention import Attention

WRAPPINGS = ("state_dict", "model_state_dict", "model")  # keys under which training scripts keep a state_dict
PREFIXES = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy the state_dict of a file into a network, which must have exactly these tensors.

    A state_dict inside of a checkpoint is found under "state_dict", "model_state_dict" or "model", and the prefixes of
    DataParallel and torch.compile are removed. If anything does not fit, nothing is changed.

    Args:
        model: the network that the weights were trained in.
        path: a .safetensors file, or a file of torch.save, which is read with `weights_only=True`.

    >>> torch.save(model.state_dict(), folder / "weights.pt")
    >>> load_weights(ts.models.create("convnet", channels=1, width=0.25), folder / "weights.pt")
    """
    path = Path(path)
    if not path.is_file():
        raise TorchsliceError(f"there is no file {path}; give a .safetensors file or a .pt file with a state_dict.")
    needed, found = model.state_dict(), _state_dict(path)
    for prefix in (*PREFIXES, *PREFIXES):  # either may come first
        if all(name.startswith(prefix) for name in found) and not all(name.startswith(prefix) for name in needed):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            module.rename(found, f"{name}.")
    for name, tensor in needed.items():
        if name.endswith("num_batches_tracked"):  # files from before torch 0.4.1 have none
            found.setdefault(name, tensor)
    for name in [*needed, *found]:
        wanted, given = _shape(needed, name), _shape(found, name)
        if wanted != given:
            raise TorchsliceError(
                f"the weights of {path} do not fit the network: {name!r} is {given} in the file and {wanted} in the "
                "network. Give the MODEL that was trained, with its number of classes and arguments. Nothing was "
                "changed."
            )
    model.load_state_dict(found)


def _state_dict(path: Path) -> dict[str, Any]:
    """Return the state_dict that a file holds, itself or under one of the usual keys."""
    content = _read(path)
    wrapped = (content[key] for key in WRAPPINGS if isinstance(content, Mapping) and key in content)
    state = next((value for value in wrapped if isinstance(value, Mapping)), content)
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        held = f"the keys {list(content)[:8]}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise TorchsliceError(
            f"{path} holds {held} and no state_dict, neither itself nor under {', '.join(map(repr, WRAPPINGS))}. "
            "Save the state_dict: torch.save(model.state_dict(), path)."
        )
    return {str(name): value for name, value in state.items()}


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        metadata, tensors = read_safetensors(path)
        if "torchslice" in metadata:
            raise TorchsliceError(f"{path} holds a whole network that torchslice saved; use torchslice.load.")
        return tensors
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a damaged or hostile file raises all kinds
        raise TorchsliceError(
            f"{path} is not a file of tensors alone ({type(error).__name__}). Write it anew where it was trained: "
            "torch.save(model.state_dict(), path)."
        ) from error


def _shape(state: Mapping[str, Any], name: str) -> list[int] | str:
    if name not in state:
        return "absent"
    return list(state[name].shape) if isinstance(state[name], Tensor) else type(state[name]).__name__
