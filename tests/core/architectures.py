"""The networks every invariant is tested on, made so that cutting anything shows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchslice.models import create


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 20), nn.Linear(20, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(F.gelu(self.first(x.flatten(1))))))


class Unknown(nn.Module):
    """One convolution is read by a function torchslice does not know; the others are free."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.sorted, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3), nn.Conv2d(12, 14, 3)
        self.head = nn.Linear(14, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.sort(self.sorted(x), dim=1).values
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class Reused(nn.Module):
    """One block is called twice, with in-place and functional activations and a residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.inner, self.norm, self.back = (
            nn.Conv2d(12, 20, 3, padding=1, bias=False),
            nn.BatchNorm2d(20),
            nn.Conv2d(20, 12, 1),
        )
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(12 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        for _ in range(2):
            x = x + self.back(self.act(self.norm(self.inner(x))))
            x = F.leaky_relu_(x, 0.1)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 4), 1))


class Gated(nn.Module):
    """A gated linear unit, squeeze and excitation, per-channel PReLU, a grouped convolution, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 12, 3, padding=1)
        self.grouped, self.norm, self.act = nn.Conv2d(24, 16, 3, groups=4, padding=1), nn.BatchNorm2d(16), nn.PReLU(16)
        self.squeeze, self.excite = nn.Linear(16, 6), nn.Linear(6, 16)
        self.multiplier = nn.Conv2d(16, 32, 3, groups=16)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x) * F.silu(self.b(x)), F.max_pool2d(self.a(x).abs(), 3, 1, 1)], 1)
        x = self.act(self.norm(self.grouped(x)))
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        x = self.multiplier(x * scale[:, :, None, None])
        return self.head(x.clamp(min=0).mean(dim=(-2, -1)))


class PreActivation(nn.Module):
    """Norms that read sums and concatenations, so that a norm serves the neurons of several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(12), nn.Conv2d(12, 12, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(12), nn.Conv2d(12, 8, 3, padding=1)
        self.norm3, self.head = nn.BatchNorm2d(20), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv1(F.relu(self.norm1(x)))
        x = torch.cat([x, self.conv2(F.relu(self.norm2(x)))], 1)
        return self.head(F.relu(self.norm3(x)).mean((2, 3)))


def _image(size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 3, size, size)


#: name -> how to make the network, how to make an example
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (MLP, lambda: torch.randn(3, 3, 4)),
    "unknown": (Unknown, _image(8)),
    "reused": (Reused, _image(8)),
    "gated": (Gated, _image(8)),
    "preactivation": (PreActivation, _image(8)),
    "convnet": (lambda: create("convnet", width=0.5), _image(16)),
    "simcnn": (lambda: create("simcnn", width=0.25), _image(32)),
    "rescnn": (lambda: create("rescnn", width=0.25), _image(32)),
    "mobilenet": (lambda: create("mobilenet", width=0.25), _image(32)),
    "vgg16_bn": (lambda: create("vgg16"), _image(32)),
    "resnet18": (lambda: create("torchvision:resnet18"), _image(64)),
    "resnet50": (lambda: create("torchvision:resnet50"), _image(64)),
    "resnext50": (lambda: create("torchvision:resnext50_32x4d"), _image(64)),
    "mobilenet_v2": (lambda: create("torchvision:mobilenet_v2"), _image(64)),
    "densenet121": (lambda: create("torchvision:densenet121"), _image(64)),
    "efficientnet_b0": (lambda: create("torchvision:efficientnet_b0"), _image(64)),
    "convnext_tiny": (lambda: create("torchvision:convnext_tiny"), _image(64)),
    "vit": (lambda: create("timm:vit_tiny_patch16_224", img_size=64, depth=3), _image(64)),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """Return a network in eval mode whose scores react to every layer, of size about 1, and an example for it."""
    torch.manual_seed(0)
    build, example = ARCHITECTURES[name]
    model, x = build(), example()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
        elif hasattr(module, "layer_scale"):
            nn.init.uniform_(module.layer_scale, 0.2, 0.4)
    model, x = model.eval().to(dtype), x.to(dtype)
    with torch.no_grad():
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        nn.init.normal_(last.weight, std=0.1)
        last.weight.div_(model(x).abs().max())
    return model, x
