"""Networks that take something else than one image, trained on small tasks of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from tests.battery.zoo import NETWORKS, Answering, Dictionary, Tokens, TwoInputs
from torchslice.data import Stored, Task
from torchslice.data import task as make_task
from torchslice.graph.find import find_neurons
from torchslice.graph.neurons import Neurons
from torchslice.inputs import Inputs, map_tensors
from torchslice.training import Training, fit

CLASSES = ("ant", "bee", "cat", "dog")
KINDS = {"two inputs": TwoInputs, "dictionary": Dictionary, "answering": Answering, "tokens": Tokens}
QUICK = Training(epochs=2, batch_size=16, learning_rate=0.05, device="cpu", precision="fp32", progress=False)


@dataclass(frozen=True, eq=False)
class Sealed(Stored):
    """A split that nobody may read."""

    def read(self, *args: object, **options: object):
        raise AssertionError("the test split was read")


def sealed(task: Task) -> Task:
    """Return a task whose test split cannot be read: nothing may be chosen by it."""
    return replace(task, test=Sealed(task.test.inputs, task.test.labels))


def inputs_by_class(sample: Inputs, labels: Tensor, seed: int) -> Inputs:
    """Return inputs of the kind of `sample`: noise around a pattern of each class, or tokens."""
    generator = torch.Generator().manual_seed(seed)

    def of(tensor: Tensor) -> Tensor:
        shape = (len(labels), *tensor.shape[1:])
        if not tensor.is_floating_point():
            chosen = torch.rand(shape, generator=generator) < 0.7
            return torch.where(chosen, labels[:, None], torch.randint(11, shape, generator=generator))
        patterns = torch.randn(10, *tensor.shape[1:], generator=torch.Generator().manual_seed(0))
        return patterns[labels] + 0.5 * torch.randn(shape, generator=generator)

    return map_tensors(of, sample)


def learnable(name: str, *, classes: int = len(CLASSES), seed: int = 1) -> Task:
    """Return a task that a network can learn in a few epochs: 24 training samples a class."""

    def split(per_class: int, seed: int) -> Stored:
        labels = torch.arange(per_class * classes) % classes
        return Stored(inputs_by_class(NETWORKS[name][1](), labels, seed), labels)

    names = [*CLASSES, "eel", "fox"][:classes]
    return make_task(split(24, seed), split(6, seed + 1), split(6, seed + 2), classes=names, name=name)


@cache
def trained(name: str) -> tuple[Neurons, Task]:
    """Return the neurons of a trained network and its task; both are shared, so nobody may change them."""
    torch.manual_seed(0)
    model, task = KINDS[name](num_classes=len(CLASSES)), learnable(name)
    fit(model, task, replace(QUICK, epochs=6, learning_rate=0.1))
    return find_neurons(model, task.example, classes=task.classes), task
