"""Sub-task training: what is trained is what is cut, nothing else moves, and it works end to end."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.core.architectures import ARCHITECTURES, make
from torch import nn

from torchslice.core.find import find_neurons
from torchslice.core.hold import holding, masked
from torchslice.core.surgery import plan, silence
from torchslice.data import load
from torchslice.errors import TorchsliceError
from torchslice.models import create
from torchslice.modular.subtasks import SubTasks
from torchslice.slices import union
from torchslice.training import fit
from torchslice.use.evaluate import accuracy

CLASSES = (1, 4, 7)
RANDOM = ("efficientnet_b0", "convnext_tiny")  # they leave out whole blocks at random while training


def subtasks(name):
    """A network in float64 and training mode without dropout, a copy, an objective with random slices, and a batch."""
    model, example = make(name)
    model, example = model.double(), example.double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    neurons = find_neurons(model, example)
    slices = {str(label): neurons.random(0.3, seed=label) for label in range(neurons.classes)}
    reference = copy.deepcopy(model.train())
    return model, reference, SubTasks(model, slices, example), torch.cat([example] * 3)


class Wrapped(nn.Module):
    """As DistributedDataParallel does: every call goes through the wrapper."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, images):
        return self.module(images)


@pytest.mark.parametrize("how", ["some classes", "wrapped", "all classes"])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in RANDOM])
def test_scores_and_gradients_are_those_of_the_network_held_to_the_slices(name, how):
    model, reference, objective, images = subtasks(name)
    classes = tuple(range(len(objective.slices))) if how == "all classes" else CLASSES
    before = {where: buffer.clone() for where, buffer in model.named_buffers()}
    part = union(objective.slices[label] for label in classes)
    with holding(reference, plan(objective.neurons, part).held):
        expected = reference(images)[:, list(classes)]
    actual = objective.logits(Wrapped(model) if how == "wrapped" else model, images, classes)
    assert (actual - expected).abs().max() <= 1e-9 * expected.abs().max()
    for logits in (actual, expected):
        F.cross_entropy(logits, torch.arange(len(logits)) % 3).backward()
    largest = max(p.grad.abs().max() for p in reference.parameters() if p.grad is not None)
    for (where, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        mine, theirs = (torch.zeros_like(x) if x.grad is None else x.grad for x in (p, q))
        assert (mine - theirs).abs().max() <= 1e-9 * largest, where
    for where, buffer in model.named_buffers():
        assert torch.equal(buffer, before[where]) or how == "all classes", where
    if how == "all classes":  # the network itself is the one held to all slices, its running statistics too
        with torch.no_grad(), holding(reference.eval(), plan(objective.neurons, part).held):
            expected = reference(images)
            assert (model.eval()(images) - expected).abs().max() <= 1e-9 * expected.abs().max()


def small_subtasks():
    model, example = make("convnet")
    neurons = find_neurons(model, example)
    slices = {str(label): neurons.random(0.3, seed=label) for label in range(neurons.classes)}
    return model.train(), SubTasks(model, slices, example), torch.cat([example] * 10), neurons


def test_the_classes_of_the_batch_are_the_sub_task():
    model, objective, images, _ = small_subtasks()
    labels = torch.tensor([7, 1, 4, 4] * 5)
    loss, right, parts = objective(model, images, labels)
    logits = objective.logits(model, images, (1, 4, 7)).float()
    own = torch.tensor([2, 0, 1, 1] * 5)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, own).item())
    assert torch.equal(right, logits.argmax(1) == own) and parts == {}


def test_running_statistics_are_those_of_batches_with_all_classes():
    model, objective, images, neurons = small_subtasks()
    statistics = [buffer.clone() for buffer in model.buffers()]
    objective(model, images, torch.arange(20) % 3)
    assert all(a.equal(b) for a, b in zip(statistics, model.buffers(), strict=True))
    objective(model, images, torch.arange(20) % neurons.classes)
    assert not any(a.equal(b) for a, b in zip(statistics, model.buffers(), strict=True))


def test_a_batch_without_two_images_of_a_class_is_of_all_classes():
    model, objective, images, _ = small_subtasks()
    statistics = [buffer.clone() for buffer in model.buffers()]
    labels = torch.tensor([7, 1, 4])
    loss, _, _ = objective(model, images[:3], labels)
    assert not any(a.equal(b) for a, b in zip(statistics, model.buffers(), strict=True))
    assert loss.item() == pytest.approx(
        F.cross_entropy(objective.logits(model, images[:3], tuple(range(10))), labels).item()
    )


@pytest.mark.parametrize(
    ("classes", "sizes"), [(2, (2, 2, 2, 2)), (3, (3, 2, 3, 3)), (10, (5, 2, 10, 10)), (100, (15, 2, 100, 100))]
)
def test_half_of_the_batches_are_of_all_classes(classes, sizes):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, classes))
    slices = {str(label): find_neurons(model, torch.randn(2, 4)).full() for label in range(classes)}
    assert SubTasks(model, slices, torch.randn(2, 4)).sizes == sizes


def test_one_sub_task_leaves_no_trace_in_the_next():
    model, objective, images, _ = small_subtasks()
    first = objective.logits(model, images, (1, 4))
    objective.logits(model, images, (0, 2, 3, 5, 6, 7, 8))
    assert objective.logits(model, images, (1, 4)).equal(first)


def test_it_trains_with_batches_of_few_classes_and_neurons_of_no_class_stay_zero():
    torch.manual_seed(0)
    data = load("digits").limit(train=200)
    model = create("convnet", channels=1, width=0.25)
    neurons = find_neurons(model, data.example)
    half = neurons.random(0.5)
    slices = dict.fromkeys(data.classes, half)
    objective = SubTasks(model, slices, data.example)
    before = copy.deepcopy(model.state_dict())
    settings = {"classes_per_batch": objective.sizes, "batch_size": 50, "device": "cpu", "progress": False}
    rows = fit(model, data, objective=objective, epochs=16, **settings)
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    inside = half["features.0.0"]
    after = model.state_dict()["features.0.0.weight"]
    assert not after[~inside].any()
    assert after[inside].any() and not after[inside].equal(before["features.0.0.weight"][inside])
    with torch.no_grad(), masked(model, half, data.example):
        held = accuracy(model, replace(data, test=data.validation)).overall
    assert held == pytest.approx(rows[-1]["validation_accuracy"]) and held > 0.5


@pytest.mark.parametrize("name", ["reused", "gated", "convnet", "mobilenet", "resnet18", "resnext50", "vit"])
def test_silenced_neurons_are_held_at_zero_for_good(name):
    model, example = make(name)
    neurons = find_neurons(model, example)
    what = plan(neurons, neurons.random(0.4, seed=3))
    with torch.no_grad():
        with holding(model, what.held):
            expected = model(example)
        whole = model(example)
        silence(model, what)
        assert (model(example) - expected).abs().max() <= 1e-5 < (whole - expected).abs().max()


def test_slices_that_do_not_fit_are_refused():
    model, objective, images, neurons = small_subtasks()
    some = dict(zip("abc", objective.slices, strict=False))
    with pytest.raises(TorchsliceError, match="a slice for each of the 10 classes of the model, got 3"):
        SubTasks(model, some, images[:2])
    other, _ = make("simcnn")
    wrong = find_neurons(other, images[:2]).full()
    with pytest.raises(TorchsliceError, match="slice of another model"):
        SubTasks(model, {str(label): wrong for label in range(10)}, images[:2])
    with pytest.raises(TorchsliceError, match="keeps no neuron|is empty"):
        SubTasks(model, {str(label): neurons.none() for label in range(10)}, images[:2])
