"""The last finished epoch on disk: one safetensors file, whole or absent, and a readable log of the metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import TorchsliceError
from ..files import atomic_write, digest_of, plain
from .ranks import is_first

FILE = "checkpoint.safetensors"
BEST = "best.safetensors"
METRICS = "metrics.jsonl"
MODEL, OPTIMIZER = "model.", "optimizer."  # prefixes of the names of tensors


class Checkpoint:
    """The state of a training run in a folder: weights, buffers, the optimizer's state, settings and history.

    >>> checkpoint = Checkpoint(folder, {"learning_rate": 0.05, "epochs": 2})
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> checkpoint.save(model, optimizer, [{"epoch": 1, "loss": 0.5}])
    >>> checkpoint.restore(model, optimizer)
    ([{'epoch': 1, 'loss': 0.5}], 0, None)
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))

    @property
    def path(self) -> Path:
        """The file that is written after every epoch."""
        return self.folder / FILE

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, history: list[dict[str, Any]], first_epoch: int = 0
    ) -> None:
        """Write the state after an epoch; the previous one stays until the new file is whole."""
        state = {"settings": self.settings, "first_epoch": first_epoch, "history": history}
        _write(self.path, {**_of_model(model), **_of_optimizer(model, optimizer)}, state)
        self._log(history)

    def _log(self, history: list[dict[str, Any]]) -> None:
        """Write the readable log, unless it is there already."""
        text, path = "".join(json.dumps(row) + "\n" for row in history), self.folder / METRICS
        if not path.is_file() or path.read_bytes() != text.encode():
            atomic_write(path, text)

    def save_best(self, model: nn.Module) -> None:
        """Write the weights of the best epoch so far; before `save`, which says that there is one."""
        _write(self.folder / BEST, _of_model(model), {})

    def best(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the weights of the best epoch so far."""
        saved = read_checkpoint(self.folder / BEST)[1]
        _check(self.folder / BEST, saved, _of_model(model))
        return {name.removeprefix(MODEL): tensor for name, tensor in saved.items()}

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[list[dict[str, Any]], int, dict[str, Tensor] | None]:
        """Load the state of the last finished epoch; return history, where the schedule began, and the best weights.

        A finished run goes on where more epochs are asked for: a new schedule begins at its end. A damaged file, other
        settings or another model are a TorchsliceError; nothing is changed then.
        """
        if not self.path.exists():
            return [], 0, None
        state, saved = read_checkpoint(self.path)
        before, now, history = state["settings"], self.settings, state["history"]
        changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        last, first_epoch = history[-1]["epoch"] if history else 0, state["first_epoch"]
        if changed == ["epochs"] and now["epochs"] > before["epochs"] == last:
            changed, first_epoch = [], last
        if changed:
            words = [f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in changed]
            more = " A run can be continued with more epochs once it is finished." if changed == ["epochs"] else ""
            raise TorchsliceError(
                f"{self.folder} holds a run with other settings: {'; '.join(words)}. "
                f"Use the same settings to resume, or another folder to start anew.{more}"
            )
        best = self.best(model) if now.get("keep") == "best" else None
        self._load(model, optimizer, saved)
        if is_first():
            self._log(history)  # whoever wrote the checkpoint may have been killed before it
        return history, first_epoch, best

    def _load(self, model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
        parameters = dict(model.named_parameters())
        current = _of_model(model)
        states = {name: tensor for name, tensor in saved.items() if name.startswith(OPTIMIZER)}
        expected = dict(current)
        for name, tensor in states.items():
            owner = parameters.get(name.removeprefix(OPTIMIZER).partition(".")[2])
            if owner is not None:
                expected[name] = tensor if tensor.dim() == 0 else owner
        _check(self.path, saved, expected)
        with torch.no_grad():
            for name, tensor in current.items():
                tensor.copy_(saved[name])
        for name, tensor in states.items():
            key, _, owner_name = name.removeprefix(OPTIMIZER).partition(".")
            parameter = parameters[owner_name]
            if tensor.dim():  # in the memory format of the parameter
                tensor = torch.empty_like(parameter).copy_(tensor).detach()
            optimizer.state[parameter][key] = tensor


def read_checkpoint(path: Path, *, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the state that a checkpoint describes and its tensors, if they are asked for; damage is an error."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            state = json.loads(metadata["training"])
            if state != {} or path.name != BEST:
                _check_state(state)
            saved = {name: file.get_tensor(name) for name in file.keys() if tensors}  # noqa: SIM118
        whole = not tensors or digest_of(saved, metadata["training"]) == metadata["sha256"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise TorchsliceError(
            f"{path} is damaged or no checkpoint of torchslice ({error}). Delete it or choose another folder."
        ) from error
    if not whole:
        raise TorchsliceError(f"{path} is damaged: its content does not match its hash. Delete it and train anew.")
    return state, saved


def _check_state(state: Any) -> None:
    """Raise KeyError or TypeError unless this is what `save` wrote."""
    settings, first_epoch, history = state["settings"], state["first_epoch"], state["history"]
    epochs = [row["epoch"] for row in history]
    if not isinstance(settings, dict) or not all(isinstance(number, int) for number in (first_epoch, *epochs)):
        raise TypeError("its settings or its history are not as they were written")


def _write(path: Path, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    copies, text = plain(tensors), json.dumps(state)
    metadata = {"training": text, "sha256": digest_of(copies, text)}

    def write(temporary: Path) -> None:
        try:
            save_file(copies, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    atomic_write(path, write)


def _check(path: Path, saved: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name in sorted({*expected, *saved}):
        mine, theirs = expected.get(name), saved.get(name)
        if mine is None or theirs is None or mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            raise TorchsliceError(
                f"{path} is of another model: {name} is {_form(theirs)} in the file and {_form(mine)} in the "
                "model. Resume with the same model, or choose another folder."
            )


def _of_model(model: nn.Module) -> dict[str, Tensor]:
    return {f"{MODEL}{name}": tensor for name, tensor in model.state_dict().items()}


def _of_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{OPTIMIZER}{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _form(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
