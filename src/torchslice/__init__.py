"""Find, cut out and reuse the parts of a neural network that serve the classes you need.

Every name is imported when it is first used, so that `import torchslice` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import data, models, modular, semantic
    from .core.find import find_neurons
    from .core.hold import masked
    from .errors import TorchsliceError
    from .slices import Slice
    from .submodel import reuse
    from .training import fit
    from .use.artefacts import load, save
    from .use.costs import cost, latency_ms
    from .use.evaluate import accuracy
    from .use.extend import extend
    from .use.extract import extract, retention
    from .use.finetune import finetune
    from .use.readapt import readapt
    from .use.recalibrate import recalibrate
    from .use.restructure import restructure
    from .use.settle import settle
    from .use.stages import evaluate_stages
    from .use.widen import widen

_HOMES = {
    "": ("data", "models", "modular", "semantic"),
    ".errors": ("TorchsliceError",),
    ".slices": ("Slice",),
    ".core.find": ("find_neurons",),
    ".core.hold": ("masked",),
    ".training": ("fit",),
    ".use": (
        *("extract", "retention", "recalibrate", "finetune", "accuracy", "evaluate_stages", "cost", "latency_ms"),
        *("restructure", "readapt", "extend", "settle", "widen", "save", "load"),
    ),
    ".submodel": ("reuse",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Slice",
    "TorchsliceError",
    "accuracy",
    "cost",
    "data",
    "evaluate_stages",
    "extend",
    "extract",
    "find_neurons",
    "finetune",
    "fit",
    "latency_ms",
    "load",
    "masked",
    "models",
    "modular",
    "readapt",
    "recalibrate",
    "restructure",
    "retention",
    "reuse",
    "save",
    "semantic",
    "settle",
    "widen",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("torchslice")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'torchslice' has no attribute {name!r}")
    home = _HOME_OF[name]
    value = (
        getattr(importlib.import_module(home, __name__), name)
        if home
        else importlib.import_module(f".{name}", __name__)
    )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
