"""Sub-task training: what is trained is what is cut, nothing else moves, and it works end to end."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.battery.zoo import NETWORKS, make
from torchslice.cut.extract import held_view, masked
from torchslice.data import load
from torchslice.errors import TorchsliceError
from torchslice.find.subtasks import objective
from torchslice.graph.find import find_neurons
from torchslice.graph.plan import plan
from torchslice.inputs import join, run
from torchslice.models import create
from torchslice.slices import union
from torchslice.training import Training, accuracy, fit

CLASSES = (1, 4, 7)
RANDOM = ("efficientnet_b0", "convnext_tiny")  # they leave out whole blocks at random while training


def random_slices(neurons, fraction=0.3):
    return {str(label): neurons.random(fraction, seed=label) for label in range(neurons.num_classes)}


def sub_tasks_of(name):
    """A network in float64 and training mode without dropout, a copy, an objective with random slices, and a batch."""
    model, example = make(name, torch.float64)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    neurons, reference = find_neurons(model, example), copy.deepcopy(model).train()
    return model.train(), reference, objective(neurons, random_slices(neurons)), join([example] * 3)


class Wrapped(nn.Module):
    """As DistributedDataParallel does: every call goes through the wrapper."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("how", ["some classes", "wrapped", "all classes"])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in RANDOM])
def test_logits_and_gradients_are_those_of_the_network_held_to_the_slices(name, how):
    model, reference, sub_tasks, inputs = sub_tasks_of(name)
    classes = tuple(range(10)) if how == "all classes" else CLASSES
    before = {where: buffer.clone() for where, buffer in model.named_buffers()}
    held = plan(sub_tasks.neurons, union(sub_tasks.slices[label] for label in classes)).held
    expected = run(held_view(reference, held), inputs)[:, list(classes)]
    actual = sub_tasks.logits(Wrapped(model) if how == "wrapped" else model, inputs, classes)
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
        with torch.no_grad():
            expected = run(held_view(reference.eval(), held), inputs)
        assert (run(model.eval(), inputs) - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.fixture
def small():
    model, example = make("convnet")
    neurons = find_neurons(model, example)
    return model.train(), objective(neurons, random_slices(neurons)), torch.cat([example] * 10), neurons


def test_the_classes_of_the_batch_are_the_sub_task(small):
    model, sub_tasks, images, _ = small
    loss, correct, parts = sub_tasks(model, images, torch.tensor([7, 1, 4, 4] * 5))
    logits, own = sub_tasks.logits(model, images, (1, 4, 7)), torch.tensor([2, 0, 1, 1] * 5)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, own).item())
    assert torch.equal(correct, logits.argmax(1) == own) and parts == {}


def test_running_statistics_are_those_of_batches_with_all_classes(small):
    model, sub_tasks, images, _ = small
    statistics = [buffer.clone() for buffer in model.buffers()]
    sub_tasks(model, images, torch.arange(20) % 3)
    assert all(a.equal(b) for a, b in zip(statistics, model.buffers(), strict=True))
    sub_tasks(model, images, torch.arange(20) % 10)
    assert not any(a.equal(b) for a, b in zip(statistics, model.buffers(), strict=True))


def test_a_batch_without_two_samples_of_a_class_is_of_all_classes(small):
    model, sub_tasks, images, _ = small
    statistics, labels = [buffer.clone() for buffer in model.buffers()], torch.tensor([7, 1, 4])
    loss, _, _ = sub_tasks(model, images[:3], labels)
    assert not any(a.equal(b) for a, b in zip(statistics, model.buffers(), strict=True))
    expected = F.cross_entropy(sub_tasks.logits(model, images[:3], tuple(range(10))), labels)
    assert loss.item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("classes", "sizes"), [(2, (2, 2, 2, 2)), (3, (3, 2, 3, 3)), (10, (5, 2, 10, 10)), (100, (15, 2, 100, 100))]
)
def test_half_of_the_batches_are_of_all_classes(classes, sizes):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, classes))
    neurons = find_neurons(model, torch.randn(2, 4))
    assert objective(neurons, {str(label): neurons.full() for label in range(classes)}).sizes == sizes


def test_one_sub_task_leaves_no_trace_in_the_next(small):
    model, sub_tasks, images, _ = small
    first = sub_tasks.logits(model, images, (1, 4))
    sub_tasks.logits(model, images, (0, 2, 3, 5, 6, 7, 8))
    assert sub_tasks.logits(model, images, (1, 4)).equal(first)


def test_the_output_of_the_neurons_picks_the_logits(small):
    class Scoring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small[0]

        def forward(self, images):
            return {"scores": self.net(images)}

    model, images = Scoring(), small[2]
    neurons = find_neurons(model, images[:2], output=lambda result: result["scores"])
    expected = small[1].logits(small[0], images, (1, 4))
    assert objective(neurons, random_slices(neurons)).logits(model, images, (1, 4)).equal(expected)


def test_it_trains_with_batches_of_few_classes_and_neurons_of_no_class_stay_zero():
    task = load("digits").limit(train=200)
    model = create("convnet", num_classes=10, channels=1, width=0.25)
    neurons = find_neurons(model, task.example, classes=task.classes)
    half = neurons.random(0.5)
    sub_tasks = objective(neurons, dict.fromkeys(reversed(task.classes), half))
    before = copy.deepcopy(model.state_dict())
    training = Training(epochs=16, batch_size=50, device="cpu", precision="fp32", progress=False)
    rows = fit(model, task, training, objective=sub_tasks, classes_per_batch=sub_tasks.sizes)
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    inside, weight = half["features.0.0"], model.get_submodule("features.0.0").weight
    assert not weight[~inside].any()
    assert weight[inside].any() and not weight[inside].equal(before["features.0.0.weight"][inside])
    held = accuracy(masked(neurons, half), task, "validation").overall
    assert held == pytest.approx(rows[-1]["validation_accuracy"]) and held > 0.5


def test_slices_are_put_in_the_order_of_the_named_classes(small):
    model, example = make("convnet")
    neurons = find_neurons(model, example, classes=[f"class {label}" for label in range(10)])
    slices = {f"class {label}": neurons.random(0.3, seed=label) for label in range(10)}
    mixed = {name: slices[name] for name in sorted(slices, reverse=True)}
    assert objective(neurons, mixed).slices == tuple(slices.values())
    with pytest.raises(TorchsliceError, match="there is no slice for class 'class 9'"):
        objective(neurons, {**dict(list(slices.items())[:9]), "other": slices["class 0"]})


def test_slices_that_do_not_fit_are_refused(small):
    _, sub_tasks, images, neurons = small
    some = dict(zip("abc", sub_tasks.slices, strict=False))
    with pytest.raises(TorchsliceError, match="a slice for each of the 10 classes of the model, got 3"):
        objective(neurons, some)
    wrong = find_neurons(make("simcnn")[0], images[:2]).full()
    with pytest.raises(TorchsliceError, match="slice of another model"):
        objective(neurons, {str(label): wrong for label in range(10)})
    with pytest.raises(TorchsliceError, match="keeps no neuron|is empty"):
        objective(neurons, {str(label): neurons.none() for label in range(10)})
