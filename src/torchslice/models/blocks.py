"""What the built-in networks are made of."""

from __future__ import annotations

from torch import nn


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


def conv_relu(inputs: int, outputs: int, *, batch_norm: bool = True) -> nn.Sequential:
    """Return a 3x3 convolution with padding 1, batch norm if asked for, and ReLU."""
    norm = [nn.BatchNorm2d(outputs)] if batch_norm else []
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), *norm, nn.ReLU(inplace=True))


def conv_norm(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution without bias that keeps the size but for its stride, and batch norm."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))
