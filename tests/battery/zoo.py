"""The networks every invariant is tested on, made so that cutting anything shows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchslice.graph.find import find_neurons
from torchslice.graph.neurons import Neurons
from torchslice.imports import import_transformers
from torchslice.inputs import Inputs, join, map_tensors, run
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

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.inner, self.norm = nn.Conv2d(12, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20)
        self.back, self.act, self.head = nn.Conv2d(20, 12, 1), nn.ReLU(inplace=True), nn.Linear(12 * 16, num_classes)

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


class TwoInputs(nn.Module):
    """Called as model(image, attributes): a convolutional and a linear branch meet in a hidden layer."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.attributes, self.hidden, self.head = nn.Linear(5, 6), nn.Linear(18, 14), nn.Linear(14, num_classes)

    def forward(self, image: Tensor, attributes: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(image)))
        x = F.relu(self.norm2(self.conv2(F.max_pool2d(x, 2)))).mean((2, 3))
        x = torch.cat([x, F.relu(self.attributes(attributes))], 1)
        return self.head(F.relu(self.hidden(x)))


class Dictionary(TwoInputs):
    """Called as model(attributes=..., image=...); its logits are an entry of a dictionary."""

    def forward(self, *, image: Tensor, attributes: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits = super().forward(image, attributes)
        return {"probabilities": logits.softmax(1), "logits": logits}


@dataclass
class Answer:
    """What some libraries return."""

    logits: Tensor
    loss: Tensor | None = None


class Answering(Reused):
    """Its logits are an attribute of what it returns."""

    def forward(self, x: Tensor) -> Answer:  # type: ignore[override]
        return Answer(super().forward(x))


class Tokens(nn.Module):
    """Reads whole numbers through an embedding."""

    def __init__(self, num_classes: int = 10, vocabulary: int = 11) -> None:
        super().__init__()
        self.embedding, self.conv, self.norm = nn.Embedding(vocabulary, 8), nn.Conv1d(8, 16, 3), nn.BatchNorm1d(16)
        self.hidden, self.head = nn.Linear(16, 12), nn.Linear(12, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).transpose(1, 2)  # [B, 8, length]
        x = F.gelu(self.norm(self.conv(x))).amax(2)
        return self.head(F.relu(self.hidden(x)))


class Parts(nn.Module):
    """A convolution that is split, scaled by parameters, normed by groups, and transposed; a packed gated unit."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(8, 12, 1), nn.Conv2d(8, 8, 1)
        self.scale, self.norm = nn.Parameter(torch.rand(20, 1, 1) + 0.5), nn.GroupNorm(5, 20)
        self.up, self.packed, self.back = nn.ConvTranspose2d(20, 14, 2, 2), nn.Linear(14, 24), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        one, other = F.relu(self.stem(x)).chunk(2, 1)
        x = torch.cat([self.left(one), self.right(other)], 1) * self.scale
        x = F.relu(self.up(F.relu(self.norm(x)))).mean((2, 3))
        x = self.packed(x)
        return self.back(x[:, : x.shape[1] // 2] * F.gelu(x[:, x.shape[1] // 2 :]))


class Heads(nn.Module):
    """Attention by hand: heads, a table of biases, a mask, layer norms of queries, rotated keys."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.num_heads, self.width = 4, 24
        self.embed, self.qkv, self.proj = nn.Linear(7, 20), nn.Linear(20, 72), nn.Linear(24, 20)
        self.norm, self.table = nn.LayerNorm(6), nn.Parameter(torch.randn(9, 4))
        self.register_buffer("places", torch.arange(5)[:, None] - torch.arange(5) + 4)
        self.before, self.head = nn.LayerNorm(20), nn.Linear(20, num_classes)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:  # [B, 5, 7], [B, 5]
        x = self.embed(tokens)
        b, n, _ = x.shape
        q, k, v = self.qkv(self.before(x)).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        k = k * torch.linspace(0, 1, 6) + torch.cat([-k[..., 3:], k[..., :3]], -1) * torch.linspace(1, 0, 6)
        scores = self.norm(q) @ k.transpose(-2, -1) / 6**0.5 + self.table[self.places].permute(2, 0, 1)
        scores = scores.masked_fill(mask[:, None, None] == 0, -1e9)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, self.width)
        return self.head((x + self.proj(y)).mean(1))


def _sequence() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 5, 7), torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])


def transformer(name: str, **config: Any) -> nn.Module:
    """A transformers classifier of two layers and ten classes with random weights."""
    transformers = import_transformers()
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 24, "intermediate_size": 40}
    made = getattr(transformers, f"{name}Config")(vocab_size=40, num_labels=10, pad_token_id=0, **sizes, **config)
    return getattr(transformers, f"{name}ForSequenceClassification")(made)


def _words() -> dict[str, Tensor]:
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, 5:] = 0
    return {"input_ids": torch.randint(1, 40, (2, 8)) * mask, "attention_mask": mask}


def _image(size: int) -> Callable[[], Inputs]:
    return lambda: torch.randn(2, 3, size, size)


def _both() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 8, 8), torch.randn(2, 5)


def _named() -> dict[str, Tensor]:
    return {"attributes": torch.randn(2, 5), "image": torch.randn(2, 3, 8, 8)}


SWIN = {"img_size": 32, "window_size": 4, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 24, "drop_path_rate": 0}
#: name -> how to make the network, how to make an example
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "mlp": (MLP, lambda: torch.randn(3, 3, 4)),
    "unknown": (Unknown, _image(8)),
    "reused": (Reused, _image(8)),
    "gated": (Gated, _image(8)),
    "preactivation": (PreActivation, _image(8)),
    "two inputs": (TwoInputs, _both),
    "dictionary": (Dictionary, _named),
    "answering": (Answering, _image(8)),
    "tokens": (Tokens, lambda: torch.randint(11, (2, 9))),
    "convnet": (lambda: create("convnet", width=0.5), _image(16)),
    "fast": (lambda: create("fast", width=0.25), _image(16)),
    "simcnn": (lambda: create("simcnn", width=0.25), _image(32)),
    "rescnn": (lambda: create("rescnn", width=0.25), _image(32)),
    "mobilenet": (lambda: create("mobilenet", width=0.25), _image(32)),
    "vgg16": (lambda: create("vgg16", width=0.25), _image(32)),
    "resnet18": (lambda: create("torchvision:resnet18"), _image(32)),
    "resnet50": (lambda: create("torchvision:resnet50"), _image(32)),
    "resnext50": (lambda: create("torchvision:resnext50_32x4d"), _image(32)),
    "mobilenet_v2": (lambda: create("torchvision:mobilenet_v2"), _image(32)),
    "densenet121": (lambda: create("torchvision:densenet121"), _image(32)),
    "efficientnet_b0": (lambda: create("torchvision:efficientnet_b0"), _image(32)),
    "convnext_tiny": (lambda: create("torchvision:convnext_tiny"), _image(32)),
    "parts": (Parts, _image(8)),
    "heads": (Heads, _sequence),
    "bert": (lambda: transformer("Bert"), _words),
    "gpt2": (lambda: transformer("GPT2"), _words),
    "llama": (lambda: transformer("Llama", num_key_value_heads=2), _words),
    "swin": (lambda: create("timm:swin_tiny_patch4_window7_224", **SWIN), _image(32)),
    "vit": (lambda: create("timm:vit_tiny_patch16_224", img_size=64, depth=3), _image(64)),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Inputs]:
    """Return a network in eval mode whose logits react to every layer, of size about 1, and an example for it."""
    torch.manual_seed(0)
    build, example = NETWORKS[name]
    model, inputs = build(), example()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
        elif hasattr(module, "layer_scale"):
            nn.init.uniform_(module.layer_scale, 0.2, 0.4)
    model = model.eval().to(dtype)
    inputs = map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, inputs)
    with torch.no_grad():
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        nn.init.normal_(last.weight, std=0.1)
        last.weight.div_(run(model, inputs).abs().max())
    return model, inputs


@cache
def prepared(name: str) -> Neurons:
    """Return the neurons of a network, shared by all tests of a process: nobody may change it."""
    return find_neurons(*make(name))


def copied(name: str) -> Neurons:
    """Return the neurons of a copy of a network that a test may change."""
    neurons = prepared(name)
    return neurons.on(copy.deepcopy(neurons.model))


def unseen(example: Inputs) -> Inputs:
    """Return an example together with as many other inputs of the same kind."""

    def other(tensor: Tensor) -> Tensor:
        return torch.randn_like(tensor) if tensor.is_floating_point() else tensor.flip(0, -1)

    return join([example, map_tensors(other, example)])


def logits(network: nn.Module, inputs: Inputs, **options: Any) -> Tensor:
    """Run a network without gradients."""
    with torch.no_grad():
        return run(network, inputs, **options)
