"""A network that learns fast: whitened inputs, GELU, and convolutions that begin by passing their input on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import scaled


class Fast(nn.Module):
    """Seven convolutions for small photographs, after airbench (arXiv 2404.00498, section 3), for images from 8x8.

    A 2x2 convolution, see `Whitening`, then three groups of two 3x3 convolutions with batch norm and GELU; the first
    convolution of a group is followed by a 2x2 max pool. Before it is trained, call `whiten` with training images.

    Args:
        widths: channels of the three groups, times `width`.
    """

    def __init__(
        self, num_classes: int = 10, *, channels: int = 3, width: float = 1.0, widths: Sequence[int] = (64, 128, 128)
    ) -> None:
        super().__init__()
        self.whitening = Whitening(channels)
        self.activation = nn.GELU()
        self.groups = nn.Sequential()
        inputs = self.whitening.out_channels
        for outputs in (scaled(n, width) for n in widths):
            # The last pool rounds up: it is the one that small images need, and there it costs little.
            pool = nn.MaxPool2d(2, ceil_mode=len(self.groups) == len(widths) - 1)
            first = (Dirac(inputs, outputs), pool, nn.BatchNorm2d(outputs), nn.GELU())
            second = (Dirac(outputs, outputs), nn.BatchNorm2d(outputs), nn.GELU())
            self.groups.append(nn.Sequential(*first, *second))
            inputs = outputs
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.classifier = nn.Linear(inputs, num_classes)

    def whiten(self, images: Tensor) -> None:
        """Choose the filters of the first convolution by images [n, channels, H, W], as the network takes them."""
        self.whitening.whiten(images)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, [B, C], of images [B, channels, H, W]."""
        x = self.groups(self.activation(self.whitening(images)))  # [B, widths[-1], (H - 1) / 8, (W - 1) / 8]
        return self.classifier(self.pool(x).flatten(1))


class Whitening(nn.Conv2d):
    """A 2x2 convolution whose outputs are uncorrelated and of one variance, each of them with both signs.

    With the eigenvectors e and the eigenvalues v of the second moments of patches, its filters are e / sqrt(v + 5e-4)
    and their negatives. They are not trained, only the bias is. Random until `whiten` is called.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 8 * channels, 2)
        nn.init.kaiming_normal_(self.weight.requires_grad_(False))

    def reset_parameters(self) -> None:
        """Forget what was learned, which is the bias."""
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def whiten(self, images: Tensor) -> None:
        """Set the filters from images [n, channels, H, W]."""
        patches = F.unfold(images.double(), 2).transpose(0, 1).flatten(1)  # [channels * 4, all patches]
        values, vectors = torch.linalg.eigh(patches @ patches.T / patches.shape[1])
        filters = (vectors / (values + 5e-4).sqrt()).T
        self.weight.data.copy_(torch.cat([filters, -filters]).view_as(self.weight))


class Dirac(nn.Conv2d):
    """A 3x3 convolution without bias whose first filters begin as the identity; the others are PyTorch's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)

    def reset_parameters(self) -> None:
        """Draw the weights."""
        super().reset_parameters()
        nn.init.dirac_(self.weight.detach()[: self.in_channels])
