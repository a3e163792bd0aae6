"""From a network with or without gates to the sub-model of some classes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from torchslice.cut.extract import extract
from torchslice.data import load
from torchslice.errors import TorchsliceError
from torchslice.find import gates
from torchslice.graph.find import find_neurons
from torchslice.judge import accuracy, calibrate, predict, try_recalibration
from torchslice.models import create
from torchslice.slices import union
from torchslice.submodel import reuse, without_gates
from torchslice.training import Training, fit

QUICK = Training(epochs=2, batch_size=32, device="cpu", precision="fp32", progress=False)
CLASSES = ("3", "8")


@pytest.fixture(scope="module")
def task():
    return load("digits").limit(train=400)


@pytest.fixture(scope="module")
def neurons(task):
    torch.manual_seed(0)
    model = create("convnet", num_classes=10, channels=1, width=0.25)
    fit(model, task, QUICK)
    return find_neurons(model.eval(), task.example)


@pytest.fixture(scope="module")
def gated(task, neurons):
    found = gates.attach(find_neurons(copy.deepcopy(neurons.model), task.example))
    fit(found, task, QUICK, objective=gates.objective())
    return found


@pytest.fixture(scope="module")
def slices(task, neurons):
    return {name: neurons.random(0.5, seed=seed) for seed, name in enumerate(task.classes)}


def test_it_is_the_steps_one_after_the_other(task, neurons, slices):
    before = copy.deepcopy(neurons.model.state_dict())
    result = reuse(neurons, task, slices, classes=["8", "3"], recalibration_samples=60, seed=1)
    assert (result.classes, result.slice) == (CLASSES, slices["3"] | slices["8"]) and result.best_epoch is None
    assert result.preprocessing == task.preprocessing
    only = task.restrict(CLASSES)
    small = extract(neurons, result.slice, classes=[3, 8])
    _, best, logits = try_recalibration(small, only, samples=60, seed=1)
    expected, temperature = calibrate(find_neurons(best, task.example), only, logits=logits)
    assert result.temperature == temperature and result.kept == ("extracted" if best is small else "recalibrated")
    assert torch.equal(predict(result.model, only), predict(expected, only))
    assert all(torch.equal(tensor, before[name]) for name, tensor in neurons.model.state_dict().items())
    assert "3" in repr(result) and "kept=" in repr(result)


def test_with_training_the_best_epoch_is_kept(task, neurons, slices):
    result = reuse(neurons, task, slices, classes=CLASSES, training=replace(QUICK, learning_rate=0.01))
    assert list(result.networks) == ["extracted", "recalibrated", "fine-tuned"] and result.kept == "fine-tuned"
    assert result.best_epoch in (0, 1, 2)
    only = task.restrict(CLASSES)
    found = {name: accuracy(network, only, "validation").overall for name, network in result.networks.items()}
    assert found["fine-tuned"] == max(found.values())
    assert accuracy(result.model, only, "validation").overall == found["fine-tuned"]


def test_gates_are_folded_with_the_mean_of_the_classes_or_dropped(task, gated):
    only = task.restrict(CLASSES)
    with torch.no_grad():
        gated.eval()(next(iter(only.train.read([torch.arange(len(only.train))]))))
    expected = gated.fold({name: values.mean(0) for name, values in gated.gate_values.items()})
    logits = {how: predict(without_gates(gated, only, gates=how).model, only) for how in ("fold", "drop")}
    torch.testing.assert_close(logits["fold"], predict(expected, only), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits["drop"], predict(gated.model, only))
    assert not torch.allclose(logits["fold"], logits["drop"], atol=1e-3)
    slices = gates.class_slices(gated, task, progress=False)
    result = reuse(gated, task, slices, classes=CLASSES)
    plain = without_gates(gated, only)
    small = extract(plain, union(slices[name] for name in CLASSES), classes=[3, 8])
    assert torch.equal(predict(result.networks["extracted"], only), predict(small, only))


def test_neurons_without_gates_are_given_back(task, neurons):
    assert without_gates(neurons, task) is neurons


def test_wrong_use(task, neurons, slices):
    with pytest.raises(TorchsliceError, match="at least two classes, got '3' alone"):
        reuse(neurons, task, slices, classes=["3"])
    with pytest.raises(TorchsliceError, match="no slice for class '8'; slices: 3"):
        reuse(neurons, task, {"3": slices["3"]}, classes=CLASSES)
    with pytest.raises(TorchsliceError, match="unknown treatment of gates: 'keep'.*Known: fold, drop"):
        reuse(neurons, task, slices, classes=CLASSES, gates="keep")
    with pytest.raises(TorchsliceError, match=r"got \w+; give find_neurons\(model, example\)"):
        reuse(neurons.model, task, slices, classes=CLASSES)
