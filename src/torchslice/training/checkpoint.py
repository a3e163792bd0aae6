"""The last finished epoch on disk: one safetensors file, whole or absent, and a readable log of the metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import TorchsliceError
from ..files import atomic_write

FILE = "checkpoint.safetensors"
METRICS = "metrics.jsonl"


class Checkpoint:
    """The state of a training run in a folder: weights, buffers, momentum, arguments and history.

    >>> checkpoint = Checkpoint("runs/one", {"learning_rate": 0.05})
    >>> checkpoint.save(model, optimizer, history)
    >>> history = checkpoint.restore(model, optimizer)  # [] where nothing was saved yet
    """

    def __init__(self, folder: str | Path, arguments: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.arguments: dict[str, Any] = json.loads(json.dumps(arguments))

    @property
    def path(self) -> Path:
        """The file that is written after every epoch."""
        return self.folder / FILE

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, history: list[dict[str, Any]]) -> None:
        """Write the state after an epoch; the previous one stays until the new file is whole."""
        tensors = {name: _plain(tensor) for name, tensor in _tensors(model, optimizer).items()}
        state = {"arguments": self.arguments, "epoch": len(history), "history": history}

        def write(path: Path) -> None:
            try:
                save_file(tensors, path, metadata={"training": json.dumps(state)})
            except SafetensorError as error:
                raise OSError(str(error)) from error

        atomic_write(self.path, write)
        atomic_write(self.folder / METRICS, "".join(json.dumps(row) + "\n" for row in history))

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        """Load the state of the last finished epoch and return the history so far, [] if there is none.

        A damaged file, other arguments or another model are a TorchsliceError; nothing is changed then.
        """
        if not self.path.exists():
            return []
        try:
            with safe_open(self.path, "pt") as file:
                state = json.loads(file.metadata()["training"])
                saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise TorchsliceError(
                f"{self.path} is damaged or no checkpoint of torchslice ({error}). Delete it or choose another folder."
            ) from error
        before, now = state["arguments"], self.arguments
        changed = [
            f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise TorchsliceError(
                f"{self.folder} holds a run with other arguments: {'; '.join(changed)}. "
                "Use the same arguments to resume, or another folder to start anew."
            )
        self._load(model, optimizer, saved)
        return state["history"]

    def _load(self, model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
        current = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        momentum = {name: tensor for name, tensor in saved.items() if name.startswith("momentum.")}
        parameters = {f"momentum.{name}": parameter for name, parameter in model.named_parameters()}
        expected = {**current, **{name: parameters.get(name) for name in momentum}}
        for name in sorted({*expected, *saved}):
            mine, theirs = expected.get(name), saved.get(name)
            if mine is None or theirs is None or mine.shape != theirs.shape or mine.dtype != theirs.dtype:
                raise TorchsliceError(
                    f"{self.path} is of another model: {name} is {_form(theirs)} in the file and {_form(mine)} in the "
                    "model. Resume with the same model, or choose another folder."
                )
        with torch.no_grad():
            for name, tensor in current.items():
                tensor.copy_(saved[name])
        for name, tensor in momentum.items():
            buffer = torch.empty_like(parameters[name]).copy_(tensor)  # in the memory format of the parameter
            optimizer.state[parameters[name]]["momentum_buffer"] = buffer.detach()


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    momentum = {name: optimizer.state.get(p, {}).get("momentum_buffer") for name, p in model.named_parameters()}
    return {
        **{f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        **{f"momentum.{name}": buffer for name, buffer in momentum.items() if buffer is not None},
    }


def _plain(tensor: Tensor) -> Tensor:
    """Copy a tensor to contiguous memory of its own on the CPU: the file format takes no shared or strided ones."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _form(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
