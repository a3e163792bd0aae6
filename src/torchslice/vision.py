"""torchvision and timm, also where the installed torchvision was built for another kind of torch."""

from __future__ import annotations

import sys
from types import ModuleType

import torch

from .imports import import_optional

# Operators that torchvision describes to torch while it is imported, and that its compiled part declares.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_fragments: list[torch.library.Library] = []  # a declaration lives as long as its Library


def import_torchvision() -> ModuleType:
    """Import torchvision, also when its compiled operators cannot be loaded.

    A CUDA build of torchvision beside a CPU build of torch fails with "operator torchvision::nms does not exist".
    Its networks and data sets need no compiled operator, so the missing ones are declared, without a body, and the
    import is repeated. An import that works is left alone.
    """
    try:
        return import_optional("torchvision", extra="vision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        fragment.define(schema)
    _fragments.append(fragment)
    return import_optional("torchvision", extra="vision")


def import_timm() -> ModuleType:
    """Import timm, which imports torchvision itself."""
    import_torchvision()
    return import_optional("timm", extra="vision")
