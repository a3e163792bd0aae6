"""Code that is named in a string: optional packages and the user's own functions."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .errors import TorchsliceError
from .registry import unknown


def import_optional(module: str, *, extra: str) -> ModuleType:
    """Import a module of an optional package; if the package is missing, the error gives the install line.

    >>> image = import_optional("PIL.Image", extra="vision")
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        raise TorchsliceError(
            f"this needs {package}, which is not installed. Run: pip install 'torchslice[{extra}]'"
        ) from error


def import_object(spec: str) -> Any:
    """Import what "package.module:name" names; modules in the current directory are found too.

    >>> import_object("math:sqrt")(9.0)
    3.0
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name.isidentifier():
        raise TorchsliceError(f"{spec!r} is not of the form package.module:function.")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise TorchsliceError(
            f"{spec!r}: there is no module {error.name!r}, neither installed nor in {here}. "
            f"Install it, or run in the folder that holds it."
        ) from error
    if not hasattr(module, name):
        raise unknown(f"name in module {module_name}:", name, [n for n in vars(module) if not n.startswith("_")])
    return getattr(module, name)


def call(function: Callable[..., Any], what: str, **arguments: Any) -> Any:
    """Call a function with the user's arguments; arguments that it does not take are an error that lists its own.

    `what` names the function in the error, for instance "model 'vgg16'".
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some compiled functions have none
        return function(**arguments)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        taken = ", ".join(str(p.replace(annotation=p.empty)) for p in signature.parameters.values()) or "nothing"
        raise TorchsliceError(f"{what}: {error}. It takes: {taken}.") from error
    return function(**arguments)
