"""Small networks that make reading activations hard, each with a literal twin of its forward that makes it easy.

`literal(x)` computes the same logits out of place and returns them with the activations of every layer, one per use:
[B, N, H, W], [B, N], or tokens [B, T, N].
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchslice as ts
from torchslice.data import Images, Stored, Task
from torchslice.graph.neurons import Neurons
from torchslice.models import create

Literal = tuple[Tensor, dict[str, list[Tensor]]]


class Conv(nn.Module):
    """Batch norm and in-place ReLU modules, then an in-place function; max pooling between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.act = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.b, self.head = nn.Conv2d(4, 5, 3, padding=1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.act(self.norm(self.a(x))), 2)
        x = self.b(x)
        F.leaky_relu_(x, 0.2)
        return self.head(x.mean((2, 3)))

    def literal(self, x: Tensor) -> Literal:
        a = torch.relu(self.norm(self.a(x)))
        b = F.leaky_relu(self.b(F.max_pool2d(a, 2)), 0.2)
        return self.head(b.mean((2, 3))), {"a": [a], "b": [b]}


class Mlp(nn.Module):
    """Functional activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(36, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.elu(self.b(torch.tanh(self.a(x.flatten(1))))))

    def literal(self, x: Tensor) -> Literal:
        a = torch.tanh(self.a(x.flatten(1)))
        b = F.elu(self.b(a))
        return self.head(b), {"a": [a], "b": [b]}


class Reused(nn.Module):
    """One in-place ReLU module for everything, and a residual block that adds in place and runs twice, at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 4, 1)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        for _ in range(2):
            y = self.back(self.act(self.inner(x)))
            y += x
            x = F.avg_pool2d(y, 2)
        return self.head(x.mean((2, 3)))

    def literal(self, x: Tensor) -> Literal:
        stem = torch.relu(self.stem(x))
        one = torch.relu(self.inner(stem))
        y1 = self.back(one)
        middle = F.avg_pool2d(stem + y1, 2)
        two = torch.relu(self.inner(middle))
        y2 = self.back(two)
        logits = self.head(F.avg_pool2d(middle + y2, 2).mean((2, 3)))
        return logits, {"stem": [stem], "inner": [one, two], "back": [y1, y2]}


class Vit(nn.Module):
    """A vision transformer; its heads and MLP units are the neurons."""

    def __init__(self) -> None:
        super().__init__()
        small = {"img_size": 6, "patch_size": 3, "in_chans": 1, "embed_dim": 12, "depth": 2, "num_heads": 2}
        self.vit = create("timm:vit_tiny_patch16_224", num_classes=3, **small)

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x)

    def literal(self, x: Tensor) -> Literal:
        found: dict[str, list[Tensor]] = {}
        blocks = [(f"vit.blocks.{i}.mlp.fc1", block.mlp.act) for i, block in enumerate(self.vit.blocks)]
        handles = [
            act.register_forward_hook(lambda module, inputs, output, name=name: found.update({name: [output]}))
            for name, act in blocks
        ]

        def by_head(name: str, output: Tensor) -> Tensor:  # [B, n, 36]: queries, keys and values of 2 heads
            values = output[..., 24:].unflatten(-1, (2, 6)).transpose(2, 3).flatten(1, 2)  # [B, n * 6, 2]
            found[name] = [values]
            return torch.cat([output[..., :24], values.unflatten(1, (-1, 6)).transpose(2, 3).flatten(2)], -1)

        for i, block in enumerate(self.vit.blocks):
            name = f"vit.blocks.{i}.attn.qkv"
            hook = lambda module, inputs, output, name=name: by_head(name, output)  # noqa: E731
            handles.append(block.attn.qkv.register_forward_hook(hook))
        logits = self.vit(x)
        for handle in handles:
            handle.remove()
        return logits, found


class Words(nn.Module):
    """A dictionary of integers and numbers, nothing of which can have a gradient; it returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.a, self.b = nn.Embedding(9, 7), nn.Linear(7, 6), nn.Linear(8, 5)
        self.head = nn.Linear(5, 3)
        self.requires_grad_(False)

    def forward(self, *, words: Tensor, ages: Tensor) -> dict[str, Tensor]:
        return {"logits": self.literal({"words": words, "ages": ages})[0]}

    def literal(self, x: dict[str, Tensor]) -> Literal:
        a = F.relu(self.a(self.embedding(x["words"])))
        b = torch.tanh(self.b(torch.cat([a.mean(1), x["ages"]], 1)))
        return self.head(b), {"a": [a], "b": [b]}


NETS: dict[str, type[nn.Module]] = {"conv": Conv, "mlp": Mlp, "reused": Reused, "vit": Vit, "words": Words}


def make(name: str) -> tuple[Any, Neurons, Task]:
    """Return a network that answers with every class, its neurons, and 36 samples, a quarter of which it gets wrong."""
    torch.manual_seed(1)
    net = NETS[name]().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    labels = torch.arange(36) % 3
    if name == "words":
        split = Stored({"words": torch.randint(0, 9, (36, 4)), "ages": torch.randn(36, 2)}, labels)
    else:
        split = Images(torch.randint(0, 256, (36, 1, 6, 6), dtype=torch.uint8), labels)
    task = ts.data.task(split, split, split, name="small", classes=["a", "b", "c"])
    with torch.no_grad():
        logits = net.literal(inputs_of(task))[0]
        head = net.vit.head if name == "vit" else net.head
        head.weight.div_(logits.std(0)[:, None])
        head.bias.sub_(logits.mean(0)).div_(logits.std(0))
        answers = net.literal(inputs_of(task))[0].argmax(1)
    labels = torch.where(torch.arange(36) % 4 == 0, (answers + 1) % 3, answers)
    task = replace(task, train=task.train.relabelled(labels))
    return net, ts.find_neurons(net, task.example), task


def inputs_of(task: Task, rows: Tensor | None = None) -> Any:
    """The inputs of training samples, by default all."""
    return next(iter(task.train.read([torch.arange(len(task.train)) if rows is None else rows])))
