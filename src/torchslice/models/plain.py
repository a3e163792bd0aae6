"""Networks that are one chain of 3x3 convolutions.

Shapes: B batch, C classes, H and W of the images. Images of 32x32 leave five poolings as 1x1; poolings round up and a
global average pool follows, so other sizes fit too.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .blocks import conv_relu, initialise, scaled

VGG16_GROUPS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def _features(groups: Sequence[Sequence[int]], channels: int, batch_norm: bool) -> nn.Sequential:
    """Return groups of convolutions of these widths, a 2x2 max pool after each group."""
    layers: list[nn.Module] = []
    for group in groups:
        for outputs in group:
            layers.append(conv_relu(channels, outputs, batch_norm=batch_norm))
            channels = outputs
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers)


class _Chain(nn.Module):
    """Features, global average pool, classifier: [B, channels, H, W] -> [B, C]."""

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = classifier
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(images)).flatten(1))


class ConvNet(_Chain):
    """Six convolutions with batch norm, 32 32 | 64 64 | 128 128 channels, for quick experiments on images from 8x8."""

    def __init__(self, num_classes: int = 10, *, channels: int = 3, width: float = 1.0) -> None:
        groups = [[scaled(n, width)] * 2 for n in (32, 64, 128)]
        super().__init__(_features(groups, channels, batch_norm=True), nn.Linear(groups[-1][-1], num_classes))


class LeNet(nn.Module):
    """Two 5x5 convolutions and three linear layers, after LeNet-5 (LeCun et al. 1998), with ReLU and max pooling."""

    def __init__(self, num_classes: int = 10, *, channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        first, second, third, fourth = (scaled(n, width) for n in (6, 16, 120, 84))
        self.features = nn.Sequential(
            nn.Conv2d(channels, first, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Conv2d(first, second, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.AdaptiveMaxPool2d(5),
        )
        self.classifier = nn.Sequential(
            nn.Linear(second * 25, third),
            nn.ReLU(inplace=True),
            nn.Linear(third, fourth),
            nn.ReLU(inplace=True),
            nn.Linear(fourth, num_classes),
        )
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


class SimCNN(_Chain):
    """Thirteen convolutions and three linear layers (MwT, arXiv 2306.09376), there without batch norm."""

    def __init__(
        self, num_classes: int = 10, *, channels: int = 3, width: float = 1.0, batch_norm: bool = True
    ) -> None:
        groups = [[scaled(n, width) for n in group] for group in VGG16_GROUPS]
        hidden = scaled(512, width)
        classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, num_classes),
        )
        super().__init__(_features(groups, channels, batch_norm), classifier)


class VGG16(_Chain):
    """VGG16 with batch norm (arXiv 1409.1556, configuration D) and a classifier 512-512-C, for small images."""

    def __init__(self, num_classes: int = 10, *, channels: int = 3, width: float = 1.0) -> None:
        groups = [[scaled(n, width) for n in group] for group in VGG16_GROUPS]
        hidden = scaled(512, width)
        classifier = nn.Sequential(
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(hidden, num_classes),
        )
        super().__init__(_features(groups, channels, batch_norm=True), classifier)
