"""Which networks there are, and how one is made from its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import TorchsliceError
from ..imports import call, import_object
from ..registry import Registry, unknown
from ..vision import import_timm, import_torchvision
from .mobile import MobileNet
from .plain import VGG16, ConvNet, LeNet, SimCNN
from .residual import ResCNN, resnet18, resnet20

MODELS: Registry[Callable[..., nn.Module]] = Registry("model")
MODELS.register("convnet")(ConvNet)
MODELS.register("lenet")(LeNet)
MODELS.register("simcnn")(SimCNN)
MODELS.register("rescnn")(ResCNN)
MODELS.register("vgg16")(VGG16)
MODELS.register("resnet18")(resnet18)
MODELS.register("resnet20")(resnet20)
MODELS.register("mobilenet")(MobileNet)


def names() -> list[str]:
    """Names of the built-in networks."""
    return MODELS.names()


def create(spec: str, num_classes: int = 10, **arguments: Any) -> nn.Module:
    """Make a new network from a built-in name, "torchvision:NAME", "timm:NAME" or "package.module:function".

    The built-in ones take `channels` (of the input images) and `width` (a factor on their numbers of channels). The
    others pass `num_classes` and `arguments` on; weights are never downloaded. The network's attribute `origin` is the
    plain data that makes it again: `create(origin["factory"], **origin["arguments"])`.

    >>> create("resnet20", num_classes=100, width=0.5).origin
    {'factory': 'resnet20', 'arguments': {'num_classes': 100, 'width': 0.5}}
    """
    if num_classes < 1:
        raise TorchsliceError(f"a model needs at least 1 class, got num_classes={num_classes}.")
    arguments = {"num_classes": num_classes, **arguments}
    what = f"model {spec!r}"
    source, _, name = spec.partition(":")
    if source == "torchvision":
        model = _from_torchvision(name, what, arguments)
    elif source == "timm":
        model = _from_timm(name, what, arguments)
    elif name:
        model = call(import_object(spec), what, **arguments)
    elif spec in MODELS:
        model = call(MODELS[spec], what, **arguments)
    else:
        raise unknown("model", spec, [*names(), "torchvision:NAME", "timm:NAME", "package.module:function"])
    if not isinstance(model, nn.Module):
        raise TorchsliceError(f"{what} returned a {type(model).__name__}; it must return a torch.nn.Module.")
    model.origin = {"factory": spec, "arguments": arguments}  # type: ignore[assignment]
    return model


def _from_torchvision(name: str, what: str, arguments: dict[str, Any]) -> nn.Module:
    models = import_torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        raise unknown("torchvision model", name, known)
    return _build(lambda: models.get_model(name, weights=None, **arguments), what)


def _from_timm(name: str, what: str, arguments: dict[str, Any]) -> nn.Module:
    timm = import_timm()
    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())
    return _build(lambda: timm.create_model(name, pretrained=False, **arguments), what)


def _build(make: Callable[[], nn.Module], what: str) -> nn.Module:
    """Make a network of another library; arguments that it does not take become an error of ours."""
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise TorchsliceError(f"{what}: {error}. Its arguments are described by its own library.") from error
