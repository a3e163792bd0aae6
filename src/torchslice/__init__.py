"""Find, cut out and reuse the parts of a neural network that serve the classes you need.

Every name is imported when it is first used, so that `import torchslice` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import data, judge, models
    from .artefact import export, load, save
    from .cut.extract import extract, masked, retention
    from .errors import TorchsliceError
    from .find import gates, semantic, subtasks
    from .graph.find import find_neurons
    from .maintain import compose, extend, readapt, remove, replace, restructure, update
    from .show import report
    from .slices import Slice
    from .submodel import reuse
    from .training import Training, accuracy, finetune, fit

_HOMES = {
    ".": ("data", "judge", "models"),
    ".find": ("gates", "semantic", "subtasks"),
    ".errors": ("TorchsliceError",),
    ".slices": ("Slice",),
    ".graph.find": ("find_neurons",),
    ".cut.extract": ("extract", "masked", "retention"),
    ".training": ("Training", "accuracy", "finetune", "fit"),
    ".submodel": ("reuse",),
    ".maintain": ("compose", "extend", "readapt", "remove", "replace", "restructure", "update"),
    ".artefact": ("export", "load", "save"),
    ".show": ("report",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = {*_HOMES["."], *_HOMES[".find"]}

__all__ = [
    "Slice",
    "TorchsliceError",
    "Training",
    "accuracy",
    "compose",
    "data",
    "export",
    "extend",
    "extract",
    "find_neurons",
    "finetune",
    "fit",
    "gates",
    "judge",
    "load",
    "masked",
    "models",
    "readapt",
    "remove",
    "replace",
    "report",
    "restructure",
    "retention",
    "reuse",
    "save",
    "semantic",
    "subtasks",
    "update",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("torchslice")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'torchslice' has no attribute {name!r}")
    home = _HOME_OF[name]
    if name in _MODULES:
        value = importlib.import_module(f"{home.rstrip('.')}.{name}", __name__)
    else:
        value = getattr(importlib.import_module(home, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
