"""torchslice neurons."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from .common import Device, DeviceOption, Json, Model, ModelArguments, Seed, emit, pairs, shape


def neurons(
    model: Model,
    num_classes: Annotated[int, typer.Option(help="Number of classes.")] = 10,
    input_shape: Annotated[str, typer.Option(metavar="CxHxW", help="Shape of one input.")] = "3x32x32",
    model_argument: ModelArguments = None,
    seed: Seed = 0,
    device: DeviceOption = Device.auto,
    as_json: Json = False,
) -> None:
    """Show which neurons of a model can be cut, which hang together, and what is pinned and why.

    Example:  torchslice neurons torchvision:densenet121 --input-shape 3x64x64
    """
    import torch

    from .. import models
    from ..core.find import find_neurons
    from ..runs import fitting
    from ..training import choose_placement

    sizes = shape(input_shape)
    place = choose_placement(device.value).device
    torch.manual_seed(seed)
    arguments = {"num_classes": num_classes, **fitting(model, sizes[0]), **pairs(model_argument)}
    network = models.create(model, **arguments).to(place)
    found = find_neurons(network, torch.randn(2, *sizes, device=place))
    result = {
        "model": network.origin,
        "input_shape": sizes,
        "neurons": len(found),
        "layers": {name: asdict(layer) for name, layer in found.layers.items()},
        "followers": found.followers,
        "pinned": found.pinned,
        "head": found.head,
    }
    emit(result, str(found), as_json=as_json)
