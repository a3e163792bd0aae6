"""Which networks there are, and how one is made from its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import TorchsliceError, first_line
from ..imports import call, import_object, import_timm, import_torchvision
from ..registry import unknown
from . import huggingface
from .attention import with_plain_attention
from .fast import Fast
from .mobile import MobileNet
from .plain import VGG16, ConvNet, LeNet, SimCNN
from .residual import ResCNN, resnet18, resnet20

NETWORKS = (ConvNet, Fast, LeNet, SimCNN, ResCNN, VGG16, resnet18, resnet20, MobileNet)
MODELS: dict[str, Callable[..., nn.Module]] = {network.__name__.lower(): network for network in NETWORKS}


def names() -> list[str]:
    """Return the names of the built-in networks.

    >>> names()[:3]
    ['convnet', 'fast', 'lenet']
    """
    return list(MODELS)


def create(spec: str, num_classes: int = 10, **arguments: Any) -> nn.Module:
    """Make a new network, in training mode, with weights drawn from torch's random numbers.

    Args:
        spec: a built-in name, "torchvision:NAME", "timm:NAME", "hf:PATH" (a folder of transformers, or a configuration)
            or "package.module:function".
        num_classes: number of logits.
        arguments: the built-in networks take `channels` (of the input images) and `width` (a factor on their numbers of
            channels), `fast` also `widths`, those of "hf:PATH" what is in their configuration; the others are called
            with `num_classes` and these. Weights are never downloaded.

    >>> create("resnet20", num_classes=100, width=0.5).classifier
    Linear(in_features=32, out_features=100, bias=True)
    """
    if not isinstance(num_classes, int) or num_classes < 1:
        raise TorchsliceError(f"a model needs at least 1 class, got num_classes={num_classes!r}.")
    arguments = {"num_classes": num_classes, **arguments}
    what = f"model {spec!r}"
    source, _, name = str(spec).partition(":")
    own = name and source not in ("torchvision", "timm", "hf")
    try:
        if own:
            model = call(import_object(spec), what, **arguments)
        elif source == "torchvision":
            models = import_torchvision().models
            if name not in (known := models.list_models(module=models)):
                raise unknown("torchvision model", name, known)
            model = with_plain_attention(models.get_model(name, weights=None, **arguments))
        elif source == "timm":
            timm = import_timm()
            if not timm.is_model(name):
                raise unknown("timm model", name, timm.list_models())
            model = timm.create_model(name, pretrained=False, **arguments)
        elif source == "hf":
            model = huggingface.create(name, **arguments)
        elif spec in MODELS:
            if not (channels := arguments.get("channels", 1)) >= 1:
                raise TorchsliceError(f"{what}: images have at least 1 channel, got channels={channels}.")
            model = call(MODELS[spec], what, **arguments)
        else:
            raise unknown(
                "model", spec, [*MODELS, "torchvision:NAME", "timm:NAME", "hf:PATH", "package.module:function"]
            )
    except (TypeError, ValueError, ArithmeticError, RuntimeError, OSError) as error:
        if own or isinstance(error, TorchsliceError):  # mistakes in the user's function are shown as they are
            raise
        raise TorchsliceError(f"{what}: {first_line(error)}. See what its arguments are.") from error
    if not isinstance(model, nn.Module):
        raise TorchsliceError(f"{what} returned a {type(model).__name__}; it must return a torch.nn.Module.")
    return model


def random_texts(spec: str, tokens: int) -> dict[str, torch.Tensor]:
    """Return two texts of so many random tokens, as a network of transformers takes them."""
    known = huggingface.read_config(spec.partition(":")[2]).vocab_size
    return {"input_ids": torch.randint(known, (2, tokens)), "attention_mask": torch.ones(2, tokens, dtype=torch.int64)}


def is_trained(spec: str, num_classes: int) -> bool:
    """Whether a network by name comes trained for so many classes: a classifier in a folder of transformers.

    >>> is_trained("resnet18", 10)
    False
    """
    source, _, path = spec.partition(":")
    return source == "hf" and huggingface.is_trained(path, num_classes)
