"""Code that is named in a string: optional packages and the user's own functions."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from .errors import TorchsliceError
from .registry import unknown

_fragments: list[torch.library.Library] = []  # a declaration lives as long as its Library


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


def import_torchvision() -> ModuleType:
    """Import torchvision, also when its compiled operators cannot be loaded.

    A CUDA build of torchvision beside a CPU build of torch fails with "operator torchvision::nms does not exist".
    Its networks and data sets need no compiled operator, so the missing ones are declared, without a body, and the
    import is repeated.
    """
    try:
        return import_optional("torchvision", extra="vision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):  # which torchvision describes to torch while it is imported
        fragment.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _fragments.append(fragment)
    return import_optional("torchvision", extra="vision")


def import_timm() -> ModuleType:
    """Import timm, which imports torchvision itself."""
    import_torchvision()
    return import_optional("timm", extra="vision")


def import_transformers() -> ModuleType:
    """Import transformers, which imports torchvision where it is installed."""
    if importlib.util.find_spec("torchvision"):
        import_torchvision()
    return import_optional("transformers", extra="text")


def import_object(spec: str) -> Any:
    """Import what "package.module:name" names; modules in the current directory are found too.

    >>> import_object("math:sqrt")(9.0)
    3.0
    """
    module, _, path = spec.partition(":")
    names = path.split(".")  # more than one for what is defined inside a class
    if not module or module.startswith(".") or not all(name.isidentifier() for name in names):
        raise TorchsliceError(f"{spec!r} is not of the form package.module:function.")
    here = os.getcwd()
    if module not in sys.modules and here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise TorchsliceError(
            f"{spec!r}: there is no module {error.name!r}, neither installed nor in {here}. "
            "Install it, or run in the folder that holds it."
        ) from error
    for name in names:
        if not hasattr(found, name):
            home = f"module {module}" if isinstance(found, ModuleType) else repr(spec)
            raise unknown(f"name in {home}:", name, [n for n in dir(found) if not n.startswith("_")])
        found = getattr(found, name)
    return found


def call(function: Callable[..., Any], what: str, /, **arguments: Any) -> Any:
    """Call a function, `what` in errors, with the user's arguments; if it does not take them, the error lists its own.

    >>> call(lambda width=1.0: width, "model 'mine'", width=0.5)
    0.5
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
