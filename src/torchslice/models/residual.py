"""Networks with residual connections."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Chain, conv_norm, convolutions, initialise, scaled


class ResCNN(Chain):
    """Twelve convolutions, three pairs with a residual connection (MwT, arXiv 2306.09376), there without batch norm."""

    def __init__(
        self, num_classes: int = 10, *, channels: int = 3, width: float = 1.0, batch_norm: bool = True
    ) -> None:
        middle, wide = scaled(128, width), scaled(512, width)
        part = partial(convolutions, width=width, batch_norm=batch_norm)
        features = nn.Sequential(
            *part("64 128 P", channels),
            AddInput(part("128 128", middle)),
            *part("256 P 512 P", middle),
            AddInput(part("512 512", wide)),
            *part("512 P 512 P", wide),
            AddInput(part("512 512", wide)),
        )
        super().__init__(features, nn.Sequential(nn.Dropout(0.5), nn.Linear(wide, num_classes)))


class AddInput(nn.Module):
    """x + body(x), a body that keeps the shape."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ResNet(nn.Module):
    """Residual network of basic blocks for small images (arXiv 1512.03385, section 4.2): 3x3 stem, no max pool.

    Stage i has `depths[i]` blocks of `widths[i]` channels; every stage but the first halves the image. Where the shape
    changes, the shortcut is a 1x1 convolution with batch norm.
    """

    def __init__(self, depths: Sequence[int], widths: Sequence[int], num_classes: int, channels: int) -> None:
        super().__init__()
        self.stem = conv_norm(channels, widths[0], 3)
        self.stages = nn.Sequential()
        for depth, inputs, outputs in zip(depths, (widths[0], *widths[:-1]), widths, strict=True):
            first = BasicBlock(inputs, outputs, stride=2 if self.stages else 1)
            self.stages.append(nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(depth - 1))))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(widths[-1], num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, [B, C], of images [B, channels, H, W]."""
        x = self.stages(F.relu(self.stem(images)))
        return self.classifier(self.pool(x).flatten(1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; ReLU follows the addition."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv_norm(inputs, outputs, 3, stride=stride)
        self.conv2 = conv_norm(outputs, outputs, 3)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


def resnet18(num_classes: int = 10, *, channels: int = 3, width: float = 1.0) -> ResNet:
    """Return ResNet18 for small images: 64 128 256 512 channels, two blocks each."""
    return ResNet((2, 2, 2, 2), [scaled(n, width) for n in (64, 128, 256, 512)], num_classes, channels)


def resnet20(num_classes: int = 10, *, channels: int = 3, width: float = 1.0) -> ResNet:
    """Return ResNet20: 16 32 64 channels, three blocks each, with 1x1 convolutions for shortcuts."""
    return ResNet((3, 3, 3), [scaled(n, width) for n in (16, 32, 64)], num_classes, channels)
