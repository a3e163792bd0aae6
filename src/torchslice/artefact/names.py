"""Classes and functions by name: "package.module:Name".

A file may name only what can do no harm: network modules and tensor functions of torch, torchvision, timm,
transformers and torchslice, and configurations of transformers, whose constructors are not called either. For anything
else the user has to permit an import, which runs the code of the imported module.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import re
import sys
from typing import Any

import torch
from torch import nn

from ..errors import TorchsliceError
from ..imports import import_object, import_timm, import_torchvision, import_transformers

CLASSES = (
    *("torch.nn.modules", "torchvision.models", "torchvision.ops"),
    *("timm.layers", "timm.models", "torchslice.models"),
    *("transformers.models", "transformers.activations", "transformers.pytorch_utils"),
)
# Not timm.models and torchvision.models: some of their functions read files and unpickle them.
FUNCTIONS = ("torch.nn.functional", "torch._C._nn", "torchvision.ops", "timm.layers")
IMPORTS = {"torchvision": import_torchvision, "timm": import_timm, "transformers": import_transformers}
GENERATED = (torch.fx.GraphModule, torch.jit.ScriptModule)  # these turn text into code
PART = r"(?!__)[^\W\d]\w*"  # an identifier that does not begin with two underscores
NAME = re.compile(rf"(__main__|{PART}(\.{PART})*):{PART}(\.{PART})*")


def name_of(thing: Any, where: str) -> str:
    """Return the name by which a class or function can be imported; `where` stands in the error if there is none."""
    module, path = getattr(thing, "__module__", None), getattr(thing, "__qualname__", "?")
    for home, name in (("torch.nn.functional", thing.__name__), (module, path), ("torch", thing.__name__)):
        if NAME.fullmatch(f"{home}:{name}") and _find(sys.modules.get(str(home)), name) is thing:
            return f"{home}:{name}"
    raise TorchsliceError(
        f"{where} is {path!r} of {module}, and nothing of this name can be imported from there. An artefact keeps "
        "classes and functions by name: define it at the top of a module, not inside a function."
    )


def resolve(name: str, *, allow_import: bool) -> Any:
    """Return the class or function of a name, in a module that is imported only if it is known or permitted."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise TorchsliceError(f"{name!r} is not of the form package.module:Name.")
    home, _, path = name.partition(":")
    if not is_known(home):
        if not allow_import:
            raise TorchsliceError(
                f"it needs {name!r}, and importing that runs the code of the module {home}. "
                "If you trust the file and the module, load it with allow_import=True."
            )
        return import_object(name)
    package = home.partition(".")[0]
    if package in IMPORTS:
        IMPORTS[package]()
    try:
        found = _find(importlib.import_module(home), path)
    except ImportError:
        found = None
    if found is None:
        raise TorchsliceError(f"there is no {name!r} in the {package} that is installed here.")
    if not allow_import and not _harmless(found):
        raise TorchsliceError(f"{name!r} is neither a network module nor a tensor function, and is never loaded.")
    return found


def _find(found: Any, path: str) -> Any:
    """Return what a dotted path names in a module, None for nothing; the path leads through classes only."""
    *outer, last = path.split(".")
    for part in outer:
        found = getattr(found, part, None)
        if not isinstance(found, type):
            return None
    return getattr(found, last, None)


def _harmless(thing: Any) -> bool:
    """Whether a class or function of a known module was also defined in one, and is of a kind that files may name."""
    home = getattr(thing, "__module__", None) or ""
    if isinstance(thing, type):
        kinds = issubclass(thing, (nn.Module, enum.Enum)) or is_config(thing)
        return _inside(home, CLASSES) and kinds and not issubclass(thing, GENERATED)
    compiled = inspect.isbuiltin(thing) and home == "torch"  # such as conv2d in torch.nn.functional
    return inspect.isroutine(thing) and (compiled or _inside(home, FUNCTIONS))


def is_known(module: str) -> bool:
    """Whether what a module holds may be named without permission."""
    return _inside(module, CLASSES + FUNCTIONS)


def is_config(kind: type) -> bool:
    """Whether a class is a configuration of transformers, which is not imported for that."""
    home = ("transformers.configuration_utils", "PreTrainedConfig")
    return any((base.__module__, base.__name__) == home for base in kind.__mro__)


def _inside(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)
