"""What the commands share: arguments and options, checks before any work, and how commands speak."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import TorchsliceError

if TYPE_CHECKING:
    from ..runs.source import Source
    from ..training import Training
    from ..training.placement import Placement


MODEL = "a built-in name (convnet, resnet18, ...), torchvision:NAME, timm:NAME, hf:PATH or package.module:function"
DATA = (
    "A built-in name (digits, cifar10, trec, ...), folder:PATH with one folder per class, csv:PATH with text and "
    "label, or package.module:function"
)
SOURCE = "Folder of a run, file that torchslice saved, or a MODEL with --weights: " + MODEL

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL[0].upper() + MODEL[1:] + ".")]
DataSet = Annotated[str, typer.Argument(metavar="DATA", help=DATA + ".")]
SourceName = Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE + ".")]
SourceData = Annotated[
    str | None,
    typer.Argument(metavar="[DATA]", help=DATA + "; of its classes. A run knows its own.", show_default=False),
]
Out = Annotated[Path, typer.Option(metavar="FILE", help="File to write, such as part.safetensors.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite a file that exists.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of everything random.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto (a GPU if there is one), cpu or cuda.")]
Shown = tuple[Mapping[str, Any], str]  # the result of a command: of --json, and as text
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else.")]
GatesOption = Annotated[
    Literal["fold", "drop"],
    typer.Option("--gates", help="Of a run with gates: fold their mean into the weights, or drop them as published."),
]
NeuronFraction = Annotated[
    float | None,
    typer.Option(
        help="Critical is this fraction of every layer's neurons, by contribution (default: the class slices).",
        show_default=False,
    ),
]
Metric = Annotated[str, typer.Option(metavar="NAME", help="Of contributions: avg, var, ens, taylor or deeplift.")]
SamplesPerClass = Annotated[int, typer.Option(min=1, help="Training samples per class.")]
Renormalise = Annotated[
    bool, typer.Option("--renormalise", help="Let every part normalise images as it was trained, by its mean and std.")
]
Classes = Annotated[str, typer.Option(metavar="A,B,...", help="Names of classes, separated by commas.")]


def say(*texts: object) -> None:
    """Print to standard error; under torchrun, in its first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(*texts, file=sys.stderr, flush=True)


def complain(error: TorchsliceError) -> None:
    """Print an error in one line; under torchrun every process that is connected says its own, with its number."""
    from ..training.ranks import is_connected, is_first

    if is_first() or is_connected():
        number = f", process {os.environ['RANK']}" if is_connected() else ""
        print(f"torchslice{number}:", " ".join(str(error).split()), file=sys.stderr, flush=True)


def emit(result: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print the result of a command to standard output, as a JSON document or as text."""
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result, indent=1) if as_json else text, flush=True)


def names(text: str) -> list[str]:
    """Read names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(text: str, option: str) -> list[float]:
    """Read numbers separated by commas."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise TorchsliceError(f"{option} {text!r} is not a number, or several such as 0,1.") from error


def flag(name: str) -> str:
    """Return the option of a parameter."""
    return f"--{name.replace('_', '-')}"


def given_options(context: typer.Context) -> set[str]:
    """Names of the parameters that the user gave on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def check_needs(context: typer.Context, needs: Mapping[str, tuple[str, Sequence[str]]], **settled: Any) -> None:
    """Raise for an option that was given and would play no part.

    `needs` says what an option needs to play a part: another one, and its values, none if any will do. `settled` are
    the values of options that are not what the user gave.
    """
    values = {**context.params, **settled}
    for option in sorted(given_options(context) & {*needs}):
        needed = option
        while needed in needs:
            needed, allowed = needs[needed]
            if not allowed and not values[needed]:
                raise TorchsliceError(f"{flag(option)} plays no part without {flag(needed)}; leave it out.")
            if allowed and values[needed] not in allowed:
                raise TorchsliceError(
                    f"{flag(option)} plays no part with {flag(needed)} {values[needed]}; leave it out, or give "
                    f"{flag(needed)} {' or '.join(allowed)}."
                )


def check_training(context: typer.Context, training: Training) -> Placement:
    """Return where and how precisely to train; raise for what cannot be, and for settings that play no part."""
    from ..training.placement import choose_placement

    check_needs(context, {"momentum": ("optimizer", ("sgd",))}, optimizer=training.optimizer)
    return choose_placement(training.device, training.precision)


def check_gates(context: typer.Context, opened: Source) -> None:
    """Raise for --gates where there are none."""
    from ..graph.neurons import Neurons

    if "gates" in given_options(context) and isinstance(opened.network, Neurons):
        raise TorchsliceError(f"--gates plays no part, for {opened.name} has none; leave it out.")


def check_out(path: Path, *, force: bool) -> None:
    """Raise before long work if a file at `path` could not be written after it, or would be overwritten."""
    from ..files import mode_of

    mode_of(path)
    if path.name == "run.json" or (path.parent / "run.json").exists():
        raise TorchsliceError(f"cannot write {path} into the folder of a run; choose another folder.")
    if path.exists() and not force:
        raise TorchsliceError(f"{path} exists; give --force to overwrite it, or another name.")
    check_folder(path)


def check_folder(path: Path) -> None:
    """Raise if no file can be written at `path`."""
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


def next_step(command: str, *words: object) -> str:
    """Return the line that says which command comes next.

    >>> next_step("evaluate", "my pets.safetensors", "cifar10")
    "Next:  torchslice evaluate 'my pets.safetensors' cifar10"
    """
    return f"Next:  {shlex.join(['torchslice', command, *map(str, words)])}"


def next_evaluate(out: Path, source: Source, data: Sequence[str]) -> str:
    """Return the line that says how a network that was made of a source is evaluated."""
    return next_step("evaluate", out, *data, *(["--allow-import"] if source.own else []))
