"""How good a model is on the classes that are asked of it.

Shapes: B batch, n samples, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import Task, check_task
from ..errors import TorchsliceError
from ..graph.record import check_model, evaluating
from ..inputs import Output, describe, device_of, run, to_device
from .placement import fast_format, in_format
from .ranks import Ranks, current_ranks


@dataclass(frozen=True)
class Accuracy:
    """Fraction of correct answers, over all samples and per class; None for a class without a sample."""

    overall: float
    per_class: tuple[float | None, ...]

    def __str__(self) -> str:
        return f"{self.overall:.2%}"


def accuracy_of(logits: Tensor, labels: Tensor) -> Accuracy:
    """Score logits [n, C] against labels [n]."""
    correct = labels[logits.argmax(1) == labels]
    right, of_all = (of.bincount(minlength=logits.shape[1]).tolist() for of in (correct, labels))
    per_class = tuple(part / n if n else None for part, n in zip(right, of_all, strict=True))
    return Accuracy(len(correct) / len(labels), per_class)


def predict(
    model: nn.Module, task: Task, split: str = "test", *, batch_size: int = 256, output: Output = None
) -> Tensor:
    """Run a model in eval mode over a split, on the model's device and in its precision: float32 [n, C] on the CPU.

    Under torchrun the processes share the samples, and all get the logits of all.

    >>> predict(model, task, "validation").shape
    torch.Size([143, 10])
    """
    check_model(model)
    check_task(task)
    count, device = len(task.split(split)), device_of(model)
    ranks = current_ranks(device)
    ranks = ranks if count >= ranks.count else Ranks()  # too few to share
    memory_format = fast_format(model, to_device(task.example, device))
    own = []
    for inputs, _ in task.batches(split, batch_size, device=device, part=ranks.part):
        with evaluating(model):
            logits = run(model, in_format(inputs, memory_format), output)
        if logits.dim() != 2:
            raise TorchsliceError(f"the model's output is {describe(logits)}; needed are logits [B, C].")
        if not logits.isfinite().all():
            raise TorchsliceError(
                f"the model gives NaN or infinite logits for samples of the {split} split of {task.name}, which are no "
                "answers. Check its weights and the inputs."
            )
        own.append(logits.float())
    return ranks.gathered(torch.cat(own), count).cpu()


def accuracy(
    model: nn.Module,
    task: Task,
    split: str = "test",
    *,
    batch_size: int = 256,
    output: Output = None,
) -> Accuracy:
    """Score a model on a split of a task that has the model's classes, in the model's order.

    For a sub-model of some classes, give `task.restrict(classes)`. Under torchrun the processes share the samples.

    >>> 0 <= accuracy(small, task.restrict(["3", "8"])).overall <= 1
    True
    """
    logits, classes = predict(model, task, split, batch_size=batch_size, output=output), len(task.classes)
    if logits.shape[1] != classes:
        raise TorchsliceError(
            f"the model answers with {logits.shape[1]} classes and {task.name} has {classes}; "
            "give task.restrict(classes) with the model's classes in their order."
        )
    return accuracy_of(logits, task.split(split).labels)
