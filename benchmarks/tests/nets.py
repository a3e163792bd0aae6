"""A network and a task so small that an epoch takes milliseconds."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from torchslice.data import Images, Task, task


class Tiny(nn.Module):
    """conv, batch norm, relu, twice, then pool and linear; every width differs."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, ch, H, W]
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(x.mean((2, 3)))


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


def stripes(per_class: int = 40, seed: int = 0) -> Task:
    """8x8 images of noise: "red" has no stripes, "green" has columns, "blue" has rows."""
    generator = torch.Generator().manual_seed(seed)
    odd = torch.arange(8) % 2 * 100
    patterns = torch.stack([torch.zeros(8, 8), odd.expand(8, 8), odd.expand(8, 8).T]).to(torch.uint8)  # [3, 8, 8]

    def split(count: int) -> Images:
        labels = torch.arange(3).repeat(count)
        noise = torch.randint(0, 120, (len(labels), 8, 8), generator=generator, dtype=torch.uint8)
        return Images((noise + patterns[labels])[:, None], labels)

    train, test = split(per_class), split(20)
    return task(train, split(10), test, classes=["red", "green", "blue"], name="stripes")


def five_stripes() -> Task:
    """The three classes of stripes, and two with stripes twice as wide."""
    narrow, wide = stripes(), stripes(seed=1)

    def split(one: Images, other: Images) -> Images:
        broad = other.images.repeat_interleave(2, -1)[..., 4:12].repeat_interleave(2, -2)[..., 4:12, :]
        chosen = other.labels > 0
        new = replace(one, images=broad[chosen], labels=other.labels[chosen] + 2)
        return one.join(new)

    splits = {name: split(narrow.split(name), wide.split(name)) for name in ("train", "validation", "test")}
    return replace(narrow, classes=("red", "green", "blue", "broad green", "broad blue"), **splits)
