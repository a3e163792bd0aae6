"""Networks whose gates meet something special."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets import tiny_net


class Residual(nn.Module):
    """A block with a shortcut convolution, and the sum written in place over the norm's output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.conv1, self.norm1 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.short, self.short_norm = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        out = F.relu_(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.short_norm(self.short(x))
        return self.head(F.relu_(out).mean((2, 3)))


class Twice(nn.Module):
    """One convolution that runs two times, each time on what it made before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.again(F.relu(self.stem(x))))
        return self.head(F.relu(self.again(x)).mean((2, 3)))


class Tokens(nn.Module):
    """Linear layers over tokens, as in a transformer's MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 6]
        return self.head((x + self.down(F.relu(self.up(x)))).mean(1))


class Separable(nn.Module):
    """A depthwise convolution lives on the neurons of the convolution before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.point, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
        self.deep, self.deep_norm = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.point(F.relu(self.stem(x)))), inplace=True)
        return self.head(F.relu6(self.deep_norm(self.deep(x)), inplace=True).mean((2, 3)))


class Named(nn.Module):
    """Takes two named inputs and returns a dictionary, the logits under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.age = tiny_net(), nn.Linear(1, 3)

    def forward(self, pixels: Tensor, age: Tensor) -> dict[str, Tensor]:
        return {"scores": self.net(pixels) + self.age(age)}
