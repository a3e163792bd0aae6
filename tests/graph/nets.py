"""Small networks with a piece of forward to try out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions and a head, with `between` between the convolutions."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.between = between
        self.a, self.b, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(self.between(self.a(x)))).mean((2, 3)))


class Does(nn.Module):
    """A convolution and a head, and any forward of these."""

    def __init__(self, forward: Callable[[Does, Any], Any]) -> None:
        super().__init__()
        self.conv, self.head, self.does = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), forward

    def forward(self, x: Any) -> Any:
        return self.does(self, x)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))
