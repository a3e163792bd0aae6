"""How good a model is on the classes that are asked of it.

Shapes: B batch, n samples, C classes, k chosen classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.record import evaluating
from ..data import Data
from ..errors import TorchsliceError
from ..training.placement import fast_format


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers, over all samples and per class; None for a class without a sample. Prints in percent."""

    overall: float
    per_class: tuple[float | None, ...]

    def __str__(self) -> str:
        return f"{self.overall:.2%}"


def restrict_logits(logits: Tensor, classes: Sequence[int]) -> Tensor:
    """Keep the logits [B, C] of the chosen classes, in their order -> [B, k]."""
    return logits[:, list(classes)]


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Count samples by true class (row) and answered class (column): logits [n, C], labels [n] -> int64 [C, C].

    >>> confusion(torch.tensor([[2.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 1])).tolist()
    [[1, 0], [1, 0]]
    """
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).reshape(classes, classes)


def accuracy_of(logits: Tensor, labels: Tensor) -> Accuracy:
    """Score logits [n, C] against labels [n]."""
    table = confusion(logits, labels)  # [C, C]
    pairs = zip(table.diagonal().tolist(), table.sum(1).tolist(), strict=True)
    return Accuracy(int(table.trace()) / len(labels), tuple(right / n if n else None for right, n in pairs))


def predict_logits(model: nn.Module, data: Data, *, split: str = "test", batch_size: int = 256) -> Tensor:
    """Run a model in eval mode over a split of the data, on the model's device -> logits float32 [n, C] on the CPU.

    >>> predict_logits(model, data, split="validation").argmax(1)
    """
    device = device_of(model)
    memory_format = fast_format(model, data.example.to(device))
    found = []
    with evaluating(model):
        for images in batches(data, split, batch_size):
            found.append(model(images.to(device).clone(memory_format=memory_format)).float().cpu())
    logits = torch.cat(found)
    if logits.dim() != 2:
        raise TorchsliceError(f"the model's output is {list(logits.shape)}; needed are class logits [n, C].")
    return logits


def accuracy(model: nn.Module, data: Data, *, split: str = "test", batch_size: int = 256) -> Accuracy:
    """Score a model on a split of data that has the model's classes, in the model's order.

    For a sub-model of some classes, give `data.restrict(classes)`.

    >>> print(accuracy(small, data.restrict(["cat", "dog"])))
    96.20%
    """
    logits = predict_logits(model, data, split=split, batch_size=batch_size)
    if logits.shape[1] != len(data.classes):
        raise TorchsliceError(
            f"the model answers with {logits.shape[1]} classes and {data.name} has {len(data.classes)}; "
            "give data.restrict(classes) with the model's classes in their order."
        )
    return accuracy_of(logits, getattr(data, split).labels.cpu())


def batches(data: Data, split: str, batch_size: int) -> Iterator[Tensor]:
    """Yield the normalised images of a split, float [B, ch, H, W], in their order."""
    if split not in ("train", "validation", "test"):
        raise TorchsliceError(f"unknown split {split!r}; there are train, validation and test.")
    images = getattr(data, split).images
    if len(images) == 0:
        raise TorchsliceError(f"the {split} split of {data.name} is empty; there is nothing to evaluate.")
    for start in range(0, len(images), batch_size):
        yield data.normalise(images[start : start + batch_size])


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer; the CPU for a model that has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
