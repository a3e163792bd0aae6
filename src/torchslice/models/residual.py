"""Networks with residual connections.

Shapes: B batch, C classes, H and W of the images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import conv_norm, conv_relu, initialise, scaled


class ResCNN(nn.Module):
    """Twelve convolutions, three pairs with a residual connection (MwT, arXiv 2306.09376), there without batch norm.

    Channels 64 128 P 128 128+ 256 P 512 P 512 512+ 512 P 512 P 512 512+: P is a 2x2 max pool, + adds the input of the
    pair that ends here after its ReLU. Poolings round up and a global average pool follows, so that not only images of
    32x32 fit.
    """

    def __init__(
        self, num_classes: int = 10, *, channels: int = 3, width: float = 1.0, batch_norm: bool = True
    ) -> None:
        super().__init__()
        small, middle, large, wide = (scaled(n, width) for n in (64, 128, 256, 512))

        def conv(inputs: int, outputs: int) -> nn.Module:
            return conv_relu(inputs, outputs, batch_norm=batch_norm)

        def pair(width: int) -> nn.Module:
            return AddInput(nn.Sequential(conv(width, width), conv(width, width)))

        def pool() -> nn.Module:
            return nn.MaxPool2d(2, ceil_mode=True)

        self.features = nn.Sequential(
            *(conv(channels, small), conv(small, middle), pool()),
            *(pair(middle), conv(middle, large), pool()),
            *(conv(large, wide), pool()),
            *(pair(wide), conv(wide, wide), pool()),
            *(conv(wide, wide), pool()),
            pair(wide),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(wide, num_classes))
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, [B, C], of images [B, channels, H, W]."""
        return self.classifier(self.pool(self.features(images)).flatten(1))


class AddInput(nn.Module):
    """x + body(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of x, which `body` must keep."""
        return x + self.body(x)


class ResNet(nn.Module):
    """Residual network of basic blocks for small images (arXiv 1512.03385, section 4.2): 3x3 stem, no max pool.

    Stage i has `depths[i]` blocks of `widths[i]` channels; every stage but the first halves the image. Where the shape
    changes, the shortcut is a 1x1 convolution with batch norm.
    """

    def __init__(self, depths: Sequence[int], widths: Sequence[int], num_classes: int, channels: int) -> None:
        super().__init__()
        self.stem = conv_norm(channels, widths[0], 3)
        inputs = widths[0]
        stages = []
        for index, (depth, outputs) in enumerate(zip(depths, widths, strict=True)):
            first = BasicBlock(inputs, outputs, stride=1 if index == 0 else 2)
            stages.append(nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(depth - 1))))
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, num_classes)
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
