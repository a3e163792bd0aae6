"""What remains makes up for what left: every network comes nearer to the whole one than the cut alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.battery.test_cut import contents
from tests.battery.zoo import NETWORKS, logits, prepared
from torchslice.cut.extract import extract
from torchslice.data import Stored, Task
from torchslice.data import task as make_task
from torchslice.graph.neurons import Neurons
from torchslice.inputs import batch_size, join, map_tensors
from torchslice.judge.compensate import compensate

CLASSES = [1, 4, 9]


def task_of(neurons: Neurons, *, times: int = 30) -> Task:
    """Return a task of random inputs like the example, so many times as many; their labels mean nothing."""

    def other(tensor: Tensor) -> Tensor:
        return torch.randn_like(tensor) if tensor.is_floating_point() else tensor[:, torch.randperm(tensor.shape[1])]

    torch.manual_seed(0)
    inputs = join([neurons.example, *(map_tensors(other, neurons.example) for _ in range(times))])
    split = Stored(inputs, torch.arange(batch_size(inputs)) % 2)
    return make_task(split, split, split, classes=["a", "b"])


@pytest.mark.parametrize("name", NETWORKS)
def test_the_logits_come_nearer_to_those_of_the_whole_network(name: str) -> None:
    neurons = prepared(name)
    task, slice_, before = task_of(neurons), neurons.random(0.7, seed=1), contents(neurons.model)
    cut, made = extract(neurons, slice_, classes=CLASSES), compensate(neurons, slice_, task, classes=CLASSES)
    assert contents(neurons.model) == before
    inputs = task.train.inputs
    whole = logits(neurons.model, inputs)[:, CLASSES]
    far, near = (float((logits(network, inputs) - whole).square().mean()) for network in (cut, made))
    assert near < 0.25 * far, f"{near:.2g} is not below a quarter of {far:.2g}"
    assert [(key, tensor.shape) for key, tensor in made.state_dict().items()] == [
        (key, tensor.shape) for key, tensor in cut.state_dict().items()
    ]
