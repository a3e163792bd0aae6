"""Networks that are one chain of convolutions; poolings round up, so that images need not be of 32x32."""

from __future__ import annotations

from torch import Tensor, nn

from .blocks import Chain, convolutions, initialise, linear_relu, scaled

VGG16_PLAN = "64 64 P 128 128 P 256 256 256 P 512 512 512 P 512 512 512 P"


class ConvNet(Chain):
    """Six convolutions with batch norm, for quick experiments on images from 8x8."""

    def __init__(self, num_classes: int = 10, *, channels: int = 3, width: float = 1.0) -> None:
        features = convolutions("32 32 P 64 64 P 128 128 P", channels, width)
        super().__init__(features, nn.Linear(scaled(128, width), num_classes))


class LeNet(nn.Module):
    """Two 5x5 convolutions and three linear layers, after LeNet-5 (LeCun et al. 1998), with ReLU and max pooling."""

    def __init__(self, num_classes: int = 10, *, channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        first, second, third, fourth = (scaled(n, width) for n in (6, 16, 120, 84))
        self.features = nn.Sequential(
            *(nn.Conv2d(channels, first, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2, ceil_mode=True)),
            *(nn.Conv2d(first, second, 5, padding=2), nn.ReLU(inplace=True), nn.AdaptiveMaxPool2d(5)),
        )
        hidden = (*linear_relu(second * 25, third), *linear_relu(third, fourth))
        self.classifier = nn.Sequential(*hidden, nn.Linear(fourth, num_classes))
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


class SimCNN(Chain):
    """Thirteen convolutions and three linear layers (MwT, arXiv 2306.09376), there without batch norm."""

    def __init__(
        self, num_classes: int = 10, *, channels: int = 3, width: float = 1.0, batch_norm: bool = True
    ) -> None:
        n = scaled(512, width)
        hidden = (nn.Dropout(0.5), *linear_relu(n, n), nn.Dropout(0.5), *linear_relu(n, n))
        classifier = nn.Sequential(*hidden, nn.Linear(n, num_classes))
        super().__init__(convolutions(VGG16_PLAN, channels, width, batch_norm=batch_norm), classifier)


class VGG16(Chain):
    """VGG16 with batch norm (arXiv 1409.1556, configuration D) and a classifier 512-512-C, for small images."""

    def __init__(self, num_classes: int = 10, *, channels: int = 3, width: float = 1.0) -> None:
        n = scaled(512, width)
        hidden = (*linear_relu(n, n), nn.Dropout(0.5), *linear_relu(n, n), nn.Dropout(0.5))
        classifier = nn.Sequential(*hidden, nn.Linear(n, num_classes))
        super().__init__(convolutions(VGG16_PLAN, channels, width), classifier)
