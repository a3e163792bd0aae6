"""Networks of depthwise separable convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from .blocks import conv_norm, initialise, scaled

# (channels, stride) of the thirteen separable convolutions
SEPARABLE = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


class MobileNet(nn.Module):
    """MobileNet v1 (arXiv 1704.04861, table 1) for small images: the stem and the first block keep their size."""

    def __init__(self, num_classes: int = 10, *, channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        inputs = scaled(32, width)
        self.stem = nn.Sequential(*conv_norm(channels, inputs, 3), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential()
        for outputs, stride in SEPARABLE:
            depthwise = (*conv_norm(inputs, inputs, 3, stride=stride, groups=inputs), nn.ReLU(inplace=True))
            pointwise = (*conv_norm(inputs, scaled(outputs, width), 1), nn.ReLU(inplace=True))
            self.blocks.append(nn.Sequential(*depthwise, *pointwise))
            inputs = scaled(outputs, width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, [B, C], of images [B, channels, H, W]."""
        x = self.blocks(self.stem(images))  # [B, 1024 * width, H / 16, W / 16]
        return self.classifier(self.pool(x).flatten(1))
