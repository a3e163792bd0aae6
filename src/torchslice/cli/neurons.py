"""torchslice neurons."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer

from .. import models
from ..errors import TorchsliceError
from ..graph.find import find_neurons
from ..inputs import to_device
from ..runs.recipe import fitting
from ..runs.source import Opening
from ..training.placement import choose_device
from . import common
from .options import Part


def neurons(
    model: common.Model,
    num_classes: Annotated[int, typer.Option(min=1, help="Number of classes.")] = 10,
    input_shape: Annotated[
        str, typer.Option(metavar="CxHxW", help="Shape of one input; of texts their number of tokens.")
    ] = "3x32x32",
    opening: Annotated[Opening, Part(only=("model_argument",))] = Opening(),
    seed: common.Seed = 0,
    device: common.DeviceOption = "auto",
) -> common.Shown:
    """Show which neurons of a model can be cut, which hang together, and what is pinned and why.

    Example:  torchslice neurons torchvision:densenet121 --input-shape 3x64x64
    """
    sizes, place = _shape(input_shape), choose_device(device)
    torch.manual_seed(seed)
    try:
        texts = model.startswith("hf:") and len(sizes) == 1
        example = models.random_texts(model, *sizes) if texts else torch.randn(2, *sizes)
    except RuntimeError as error:
        raise TorchsliceError(f"there is no memory for an example: input_shape was {input_shape!r}.") from error
    arguments = {"num_classes": num_classes, **fitting(model, example), **opening.model_arguments}
    found = find_neurons(models.create(model, **arguments).to(place), to_device(example, place))
    result: dict[str, Any] = {
        "model": model,
        "arguments": arguments,
        "input_shape": sizes,
        "neurons": len(found),
        "layers": {name: asdict(layer) for name, layer in found.layers.items()},
        "followers": found.followers,
        "pinned": found.pinned,
        "assumptions": [str(assumption) for assumption in found.assumptions],
        "head": found.head,
    }
    return result, str(found)


def _shape(text: str) -> tuple[int, ...]:
    """Read a shape like 3x32x32, or a number."""
    parts = text.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise TorchsliceError(
            f"input_shape must be of the form 3x32x32 (channels, height, width), or of texts a number of "
            f"tokens; got {text!r}."
        )
    return tuple(map(int, parts))
