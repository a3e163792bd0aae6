"""Networks and tasks so small that an epoch takes milliseconds and numbers can be followed by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchslice.data import Images, Task
from torchslice.data import task as make_task


class Tiny(nn.Module):
    """conv, batch norm, relu, twice, then pool, dropout and linear; every width differs."""

    def __init__(self, num_classes: int = 3, *, norm: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, ch, H, W]
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(self.drop(x.mean((2, 3))))


class Viewed(nn.Module):
    """It flattens with `view`, which channels_last memory does not allow."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).view(len(images), -1))


def tiny_net(*, norm: bool = True, dropout: float = 0.0, inplace: bool = False, seed: int = 0) -> nn.Sequential:
    """Three convolutions with 4, 6 and 5 neurons and a linear head for 3 classes."""
    torch.manual_seed(seed)

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        norms: list[nn.Module] = [nn.BatchNorm2d(outputs)] if norm else []
        return [nn.Conv2d(inputs, outputs, 3, padding=1), *norms, nn.ReLU(inplace=inplace)]

    blocks = [*block(1, 4), *block(4, 6), nn.MaxPool2d(2), *block(6, 5)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(5, 3))


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic a random value, so that a neuron taken away is missed."""
    torch.manual_seed(seed)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.1, 1.0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.sub_(0.5)
    return model.eval()


def tiny_task(n: int = 24, *, classes: int = 3, flip: bool = True, crop_padding: int = 1) -> Task:
    """Images 1x6x6 whose brightness tells the class; n training, 9 validation and 9 test images."""
    generator = torch.Generator().manual_seed(7)

    def split(count: int) -> Images:
        labels = torch.arange(count) % classes
        noise = torch.randint(0, 60, (count, 1, 6, 6), generator=generator)
        images = (noise + 60 * labels[:, None, None, None]).to(torch.uint8)
        return Images(images, labels, crop_padding=crop_padding, flip=flip)

    return make_task(split(n), split(9), split(9), name="tiny", classes=[f"class {c}" for c in range(classes)])


def stripes(per_class: int = 40, seed: int = 0) -> Task:
    """8x8 images of noise: "red" has no stripes, "green" has columns, "blue" has rows."""
    generator = torch.Generator().manual_seed(seed)
    odd = torch.arange(8) % 2 * 100
    patterns = torch.stack([torch.zeros(8, 8), odd.expand(8, 8), odd.expand(8, 8).T]).to(torch.uint8)  # [3, 8, 8]

    def split(count: int) -> Images:
        labels = torch.arange(3).repeat(count)
        noise = torch.randint(0, 120, (len(labels), 8, 8), generator=generator, dtype=torch.uint8)
        return Images((noise + patterns[labels])[:, None], labels)

    return make_task(split(per_class), split(10), split(20), name="stripes", classes=["red", "green", "blue"])


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything a model has learnt."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Compare two states bit by bit."""
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
