"""Class slices, or class rankings, in a JSON file, tied to the weights they were found in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ..errors import TorchsliceError
from ..files import atomic_write, digest_of
from ..rankings import Ranking
from ..slices import Slice, union

FORMAT_VERSION = 2
T = TypeVar("T", Slice, Ranking)
R = TypeVar("R")


def digest_of_model(model: nn.Module) -> str:
    """Return the SHA-256 over a network's parameters and buffers."""
    return digest_of({name: tensor.detach().cpu() for name, tensor in model.state_dict().items()})


@dataclass(frozen=True)
class SliceFile:
    """A file of class slices, or of class rankings; `about` says how they were found."""

    path: Path

    def write(self, found: Mapping[str, Slice] | Mapping[str, Ranking], weights: str, about: Mapping[str, Any]) -> None:
        """Write what was found by class in a network whose weights have the digest `weights`."""
        head = json.dumps({"format_version": FORMAT_VERSION, "weights_sha256": weights, **about})

        def write(temporary: Path) -> None:
            """Write class by class, as plain data takes many times the memory of slices."""
            with temporary.open("w") as file:
                file.write(f'{head[:-1]}, "classes": {{')
                for number, name in enumerate(found):
                    file.write(f"{', ' if number else ''}{json.dumps(name)}: {json.dumps(found[name].to_plain())}")
                file.write("}}")

        atomic_write(self.path, write)

    def read(self, kind: type[T], weights: str, remedy: str) -> dict[str, T]:
        """Return the slices, or rankings, by class; those of other weights are an error that says the remedy."""
        return self._read(weights, remedy, lambda content: _by_class(kind, content))

    def critical(self, weights: str, remedy: str) -> Slice:
        """Return what all classes together need: what was found so, else the union of the class slices."""

        def found(content: dict[str, Any]) -> Slice:
            if "critical" in content:
                return Slice.from_plain(content["critical"])
            return union(_by_class(Slice, content).values())

        return self._read(weights, remedy, found)

    def _read(self, weights: str, remedy: str, take: Callable[[dict[str, Any]], R]) -> R:
        """Return what `take` makes of the content; raise for other weights and for damage."""
        content = read_json(self.path, "classes", "weights_sha256")
        if content["weights_sha256"] != weights:
            raise TorchsliceError(f"{self.path} belongs to other weights; {remedy}")
        try:
            return take(content)
        except Exception as error:  # damaged data can be wrong in any way
            raise TorchsliceError(f"{self.path} is damaged ({error}); {remedy}") from error


def _by_class(kind: type[T], content: dict[str, Any]) -> dict[str, T]:
    return {name: kind.from_plain(plain) for name, plain in content["classes"].items()}


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Return the JSON object in a file, which must have the given keys and a version that is known here."""
    try:
        content = json.loads(path.read_text())
        missing = [key for key in ("format_version", *keys) if key not in content]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise TorchsliceError(
            f"{path} is not of torchslice, or damaged ({error}); name another file, or make it again."
        ) from error
    if missing or not isinstance(content, dict):
        raise TorchsliceError(f"{path} is not of torchslice, or damaged: it has no {', '.join(missing)}.")
    if content["format_version"] != FORMAT_VERSION:
        raise TorchsliceError(
            f"{path} has format version {content['format_version']!r} and this torchslice reads {FORMAT_VERSION}; make "
            "it again, or use the torchslice that wrote it."
        )
    return content
