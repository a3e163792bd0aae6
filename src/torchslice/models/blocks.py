"""What the built-in networks are made of."""

from __future__ import annotations

from torch import Tensor, nn


def scaled(channels: int, width: float) -> int:
    """Return `channels` times the factor `width`, rounded, at least 1."""
    return max(1, round(channels * width))


def initialise(model: nn.Module) -> None:
    """Draw the weights of the convolutions as in arXiv 1502.01852, equation 10, for ReLU; set their biases to zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def conv_norm(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution without bias that keeps the size but for its stride, and batch norm."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def convolutions(plan: str, channels: int, width: float, *, batch_norm: bool = True) -> nn.Sequential:
    """Return what a plan such as "64 64 P 128 P" says, from left to right, for inputs of `channels` channels.

    A number is a 3x3 convolution to that many channels (times `width`), batch norm if asked for, and ReLU. P is a 2x2
    max pool that rounds up.
    """
    layers: list[nn.Module] = []
    for item in plan.split():
        if item == "P":
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        else:
            inputs, channels = channels, scaled(int(item), width)
            norm = [nn.BatchNorm2d(channels)] if batch_norm else []
            layers.append(nn.Sequential(nn.Conv2d(inputs, channels, 3, padding=1), *norm, nn.ReLU(inplace=True)))
    return nn.Sequential(*layers)


def linear_relu(inputs: int, outputs: int) -> nn.Sequential:
    """Return a linear layer and ReLU."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(inplace=True))


class Chain(nn.Module):
    """Features, global average pool, classifier: images [B, channels, H, W] of any size to logits [B, C]."""

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = classifier
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(images)).flatten(1))
