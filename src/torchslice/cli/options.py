"""Options of the command line, made from the dataclasses that hold the settings: names, types, defaults and help."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated, Any

import typer

from ..errors import TorchsliceError
from . import common


@dataclass(frozen=True)
class Part:
    """Which fields of a dataclass become options; all by default."""

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()


def with_options(command: Callable[..., common.Shown | None]) -> Callable[..., None]:
    """Turn every parameter of a command whose default is a dataclass object into options, one for each field.

    The options have the values of that object as defaults and the texts of its class's docstring as help. The command
    gets an object with the values that were given. `Annotated[..., Part(skip=...)]` leaves fields out.

    A command that returns its result has --json, and one that writes `out`, a FILE, has --force.

    >>> from torchslice.training import Training
    >>> @with_options
    ... def train(training: Training = Training(epochs=3)) -> None:
    ...     print(training.epochs)
    >>> train(epochs=5)
    5
    """
    signature = inspect.signature(command)
    hints = typing.get_type_hints(command, include_extras=True)
    groups, shared = {}, {"as_json": common.Json} if hints["return"] == common.Shown else {}
    if shared and "out" in hints and any(getattr(x, "metavar", "") == "FILE" for x in hints["out"].__metadata__):
        shared["force"] = common.Force
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, keyword, default=False, annotation=shared[name]) for name in shared]
    for parameter in signature.parameters.values():
        hint, default = hints[parameter.name], parameter.default
        if not is_dataclass(default) or isinstance(default, type):
            parameters.append(parameter.replace(annotation=hint))
            continue
        part = next((x for x in getattr(hint, "__metadata__", ()) if isinstance(x, Part)), Part())
        options = _options(default, part)
        groups[parameter.name] = (default, [option.name for option in options])
        parameters += options
    parameters.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)
    spellings = {parameter.name: _spelling(parameter) for parameter in parameters}

    @functools.wraps(command)
    def run(**given: Any) -> None:
        own = {name: given.pop(name, False) for name in shared}
        try:
            if "force" in own and given.get("out"):
                common.check_out(given["out"], force=own["force"])
            for name, (default, names) in groups.items():
                given[name] = replace(default, **{key: given.pop(key) for key in names if key in given})
            shown = command(**given)
            if shown is not None:
                common.emit(*shown, as_json=own["as_json"])
        except TorchsliceError as error:
            raise TorchsliceError(spelled(str(error), spellings)) from error

    run.__signature__ = inspect.Signature([p.replace(kind=keyword) for p in parameters])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def spelled(text: str, spellings: Mapping[str, str]) -> str:
    """Write the names of parameters in an error as the options that they are on the command line.

    >>> spelled("batch_size was 32; name them: classes=.", {"batch_size": "--batch-size", "classes": "--classes"})
    '--batch-size was 32; name them: --classes.'
    """
    for name, word in spellings.items():
        name = rf"(?<![\w.=-]){name}{'s?' if '_' in name else ''}"  # model_arguments are --model-argument
        text = re.sub(rf"{name}=(True\b|(?![^\s.,;:)]))", word, text)
        text = re.sub(rf"{name}=", f"{word} ", text)
        text = re.sub(rf"{name}(?= (must be|was ['\"{{\[\dNTF]))", word, text)
        if "_" in name:
            text = re.sub(rf"{name}(?![\w(])", word, text)
    return text


def _spelling(parameter: inspect.Parameter) -> str:
    """Return what a parameter is on the command line: the metavar of an argument, or an option."""
    metadata = getattr(parameter.annotation, "__metadata__", ())
    argument = next((x for x in metadata if isinstance(x, typer.models.ArgumentInfo)), None)
    return f"--{parameter.name.replace('_', '-')}" if argument is None else str(argument.metavar).strip("[]")


def _options(default: Any, part: Part) -> list[inspect.Parameter]:
    kind = type(default)
    hints, texts = typing.get_type_hints(kind), field_help(kind)
    found = []
    for entry in fields(default):
        if (part.only and entry.name not in part.only) or entry.name in part.skip:
            continue
        option = typer.Option(f"--{entry.name.replace('_', '-')}", help=texts.get(entry.name, ""))
        annotation = Annotated.__class_getitem__((hints[entry.name], option))  # type: ignore[attr-defined]
        value = getattr(default, entry.name)
        found.append(
            inspect.Parameter(entry.name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=annotation)
        )
    return found


def field_help(kind: type) -> dict[str, str]:
    """Return what the "Attributes:" of a class's docstring say of each field.

    >>> from torchslice.training import Training
    >>> field_help(Training)["epochs"]
    'Passes over the training samples.'
    """
    lines = inspect.getdoc(kind) or ""
    text = lines.partition("Attributes:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"    ([\w, ]+): (.*)", line):
            names = [name.strip() for name in match[1].split(",")]
            found |= dict.fromkeys(names, match[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found
