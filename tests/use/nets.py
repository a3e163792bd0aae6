"""Small networks and data with which the numbers are easy to follow."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from torchslice.data import Data, Split


class Tiny(nn.Module):
    """conv, batch norm, relu, twice, then pool, dropout and linear; every width differs."""

    def __init__(self, num_classes: int = 3, channels: int = 1, norm: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, ch, H, W]
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(self.drop(x.mean((2, 3))))


class Tied(nn.Module):
    """Two linear layers that share one weight."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(num_classes, num_classes)
        self.second = nn.Linear(num_classes, num_classes)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def tiny(num_classes: int = 3, **arguments: object) -> nn.Module:
    return Tiny(num_classes, **arguments)  # type: ignore[arg-type]


def tied(num_classes: int = 4) -> nn.Module:
    return Tied(num_classes)


def failing(num_classes: int = 3) -> nn.Module:
    raise RuntimeError("no network today")


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


def stripes(per_class: int = 40, seed: int = 0) -> Data:
    """8x8 images of noise: "red" has no stripes, "green" has columns, "blue" has rows."""
    generator = torch.Generator().manual_seed(seed)
    odd = torch.arange(8) % 2 * 100
    patterns = torch.stack([torch.zeros(8, 8), odd.expand(8, 8), odd.expand(8, 8).T]).to(torch.uint8)  # [3, 8, 8]

    def split(count: int) -> Split:
        labels = torch.arange(3).repeat(count)
        noise = torch.randint(0, 120, (len(labels), 8, 8), generator=generator, dtype=torch.uint8)
        return Split((noise + patterns[labels])[:, None], labels)

    return Data.build("stripes", split(per_class), split(20), classes=["red", "green", "blue"], validation=split(10))


def five_stripes() -> Data:
    """The three classes of stripes, and two with stripes twice as wide."""
    data, wide = stripes(), stripes(seed=1)

    def split(part: str) -> Split:
        one, other = getattr(data, part), getattr(wide, part)
        broad = other.images.repeat_interleave(2, -1)[..., 4:12].repeat_interleave(2, -2)[..., 4:12, :]
        chosen = other.labels > 0
        return Split(torch.cat([one.images, broad[chosen]]), torch.cat([one.labels, other.labels[chosen] + 2]))

    splits = {part: split(part) for part in ("train", "validation", "test")}
    return replace(data, classes=("red", "green", "blue", "broad green", "broad blue"), **splits)
