"""What the commands share: options, and how they speak."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import TorchsliceError


class Device(StrEnum):
    """Where to run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Gates(StrEnum):
    """What becomes of the gates, see `torchslice.submodel.reuse`."""

    fold = "fold"
    drop = "drop"


class Method(StrEnum):
    """How to train, see `torchslice.runs.METHODS`."""

    modular = "modular"
    mwt = "mwt"
    standard = "standard"


class Precision(StrEnum):
    """What to compute in, see `torchslice.fit`."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


MODEL = "a built-in name (convnet, resnet18, ...), torchvision:NAME, timm:NAME or package.module:function"
DATA = "a built-in name (digits, cifar10, ...), folder:PATH with one folder per class, or package.module:function"

Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to run; auto takes a GPU if there is one.")]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Folder with the files of named data sets (default: $TORCHSLICE_DATA)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL[0].upper() + MODEL[1:] + ".")]
DataSet = Annotated[str, typer.Argument(metavar="DATA", help=DATA[0].upper() + DATA[1:] + ".")]
ModelArguments = Annotated[
    list[str] | None,
    typer.Option(
        "--model-argument", metavar="NAME=VALUE", help="Argument of the model, such as width=0.5. Repeatable."
    ),
]
DataOptions = Annotated[
    list[str] | None,
    typer.Option("--data-option", metavar="NAME=VALUE", help="Option of the data, such as image_size=64. Repeatable."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, made by torchslice train.")]


def say(*texts: object) -> None:
    """Print to standard error; under torchrun, in its first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(*texts, file=sys.stderr, flush=True)


def emit(result: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print the result of a command to standard output, as a JSON document or as text."""
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result, indent=1) if as_json else text, flush=True)


def pairs(texts: Sequence[str] | None) -> dict[str, Any]:
    """Read NAME=VALUE texts; values are JSON where they can be, else text.

    >>> pairs(["width=0.5", "mode=fast"])
    {'width': 0.5, 'mode': 'fast'}
    """
    found: dict[str, Any] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise TorchsliceError(f"{text!r} is not of the form NAME=VALUE, such as width=0.5.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def chosen(
    needs: Mapping[str, tuple[str, tuple[str, ...]]], defaults: Mapping[str, Any], /, **options: Any
) -> dict[str, Any]:
    """Return the options that were given, so are not None; raise for one that would play no part.

    `needs` says what an option needs to play a part: another one, and its values.
    """
    given = {name: value for name, value in options.items() if value is not None}
    values = {**defaults, **given}
    for option in given:
        needed = option
        while needed in needs:
            needed, allowed = needs[needed]
            if values[needed] not in allowed:
                raise TorchsliceError(
                    f"--{option.replace('_', '-')} plays no part with --{needed} {values[needed]}; leave it out, "
                    f"or give --{needed} {' or '.join(allowed)}."
                )
    return given


def class_names(text: str) -> list[str]:
    """Read class names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def shape(text: str) -> tuple[int, ...]:
    """Read a shape like 3x32x32."""
    parts = text.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise TorchsliceError(f"--input-shape {text!r} is not of the form 3x32x32 (channels, height, width).")
    return tuple(map(int, parts))


def check_writable(path: Path) -> None:
    """Raise before long work if a file at `path` could not be written after it."""
    if path.is_dir():
        raise TorchsliceError(f"cannot write {path}: it is a folder; give the name of a file.")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TorchsliceError(
            f"cannot write {path}: {error.strerror or error}; choose a folder you may write to."
        ) from error
