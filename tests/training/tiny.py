"""A data set and networks so small that an epoch takes milliseconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchslice.data import Data, Split


def tiny_data(n: int = 24, *, classes: int = 3, flip: bool = True, crop_padding: int = 1) -> Data:
    """Images 1x6x6 whose brightness tells the class; n training, 9 validation and 9 test images."""
    generator = torch.Generator().manual_seed(7)

    def split(count: int) -> Split:
        labels = torch.arange(count) % classes
        noise = torch.randint(0, 60, (count, 1, 6, 6), generator=generator)
        return Split((noise + 60 * labels[:, None, None, None]).to(torch.uint8), labels)

    return Data.build(
        "tiny",
        split(n),
        split(9),
        validation=split(9),
        classes=[f"class {c}" for c in range(classes)],
        crop_padding=crop_padding,
        flip=flip,
    )


def tiny_net(*, norm: bool = True, dropout: float = 0.0, inplace: bool = False, seed: int = 0) -> nn.Sequential:
    """Three convolutions with 4, 6 and 5 neurons and a linear head for 3 classes."""
    torch.manual_seed(seed)

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        norms: list[nn.Module] = [nn.BatchNorm2d(outputs)] if norm else []
        return [nn.Conv2d(inputs, outputs, 3, padding=1), *norms, nn.ReLU(inplace=inplace)]

    return nn.Sequential(
        *block(1, 4),
        *block(4, 6),
        nn.MaxPool2d(2),
        *block(6, 5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(5, 3),
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything a model has learnt."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Compare two states bit by bit."""
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
