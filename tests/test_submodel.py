"""From a network with or without gates to the sub-model of some classes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

from torchslice import submodel
from torchslice.budget import fit_budget
from torchslice.cut.extract import extract
from torchslice.data import load
from torchslice.errors import TorchsliceError
from torchslice.find import gates
from torchslice.find.semantic import contributions
from torchslice.graph.find import find_neurons
from torchslice.judge import accuracy, calibrate, compensate, predict, recalibrate
from torchslice.models import create
from torchslice.rankings import POWERS, by_best_rank, by_mean_score, by_score
from torchslice.reused import warnings_of
from torchslice.slices import union
from torchslice.submodel import a_minute, reuse, without_gates
from torchslice.training import Accuracy, Training, accuracy_of, cost, finetune, fit

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
def scores(task, neurons):
    return contributions(neurons, task, metric=["avg", "taylor"], samples_per_class=20, progress=False)


@pytest.fixture(scope="module")
def slices(task, neurons):
    return {name: neurons.random(0.5, seed=seed) for seed, name in enumerate(task.classes)}


def test_it_is_the_steps_one_after_the_other(task, neurons, slices):
    before = copy.deepcopy(neurons.model.state_dict())
    result = reuse(neurons, task, slices, classes=["8", "3"], recalibration_samples=60, tune=False, seed=1)
    assert (result.classes, result.slice) == (CLASSES, slices["3"] | slices["8"]) and result.best_epoch is None
    assert result.preprocessing == task.preprocessing
    only = task.restrict(CLASSES)
    small = extract(neurons, result.slice, classes=[3, 8])
    compensated = compensate(neurons, result.slice, only, classes=[3, 8], seed=1)
    steps = {"extracted": small, "compensated": compensated}
    steps["recalibrated"] = recalibrate(compensated, only, samples=60, seed=1)
    assert list(result.networks) == list(steps)
    scores = {step: accuracy(network, only, "validation") for step, network in steps.items()}
    assert scores[result.kept].overall == max(score.overall for score in scores.values())
    expected, temperature = calibrate(find_neurons(steps[result.kept], task.example), only)
    assert result.temperature == temperature
    assert torch.equal(predict(result.model, only), predict(expected, only))
    assert all(torch.equal(tensor, before[name]) for name, tensor in neurons.model.state_dict().items())
    whole = predict(neurons.model, only, "validation")[:, [3, 8]]
    assert result.accuracy["whole"] == accuracy_of(whole, only.validation.labels)
    assert {step: result.accuracy[step] for step in steps} == scores
    assert result.costs == {"whole": cost(neurons.model, task.example), "sub-model": cost(result.model, task.example)}
    assert {name: list(of) for name, of in result.latency.items()} == {"whole": [1, 64], "sub-model": [1, 64]}
    assert json.dumps(result.to_plain())


def test_with_training_the_best_epoch_is_kept(task, neurons, slices):
    result = reuse(neurons, task, slices, classes=CLASSES, training=replace(QUICK, learning_rate=0.01))
    assert (
        list(result.networks) == ["extracted", "compensated", "recalibrated", "fine-tuned"]
        and result.kept == "fine-tuned"
    )
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
    result = reuse(gated, task, slices, classes=CLASSES, tune=False)
    plain = without_gates(gated, only)
    small = extract(plain, union(slices[name] for name in CLASSES), classes=[3, 8])
    assert torch.equal(predict(result.networks["extracted"], only), predict(small, only))


def test_with_a_budget_the_longest_prefixes_of_the_ranking_of_the_classes_are_cut(task, neurons, scores):
    options = {"mac_retention": 0.5, "round_to": 4}

    def made(by):
        return reuse(neurons, task, by, classes=CLASSES, tune=False, progress=False, **options)

    def fitted(ranking, **spread):
        return fit_budget(neurons, ranking, classes=[3, 8], **options, **spread)

    result = made(scores)
    assert result.slice == fitted(by_mean_score({layer: of[[3, 8]] for layer, of in scores["taylor"].items()}))
    assert 0.4 < result.metrics["mac_retention"] <= 0.5
    rankings = {name: by_score({layer: of[i] for layer, of in scores["avg"].items()}) for i, name in enumerate("0123")}
    rankings["8"] = rankings.pop("0")
    assert made(rankings).slice == fitted(by_best_rank([rankings["3"], rankings["8"]]), powers=POWERS)
    only = task.restrict(CLASSES)
    whole = find_neurons(extract(neurons, neurons.full(), classes=[3, 8]), task.example)
    assert made(None).slice == fitted(
        by_mean_score(contributions(whole, only, correct_only=False, progress=False)["taylor"])
    )


def test_it_is_tuned_for_a_minute_unless_told_otherwise(task, neurons, slices, monkeypatch):
    given = []

    def spy(model, task, training, **options):
        given.append(training)
        return finetune(model, task, replace(QUICK, epochs=1), **options)

    monkeypatch.setattr(submodel, "finetune", spy)
    found = reuse(neurons, task, slices, classes=CLASSES, seed=4, progress=False)
    small = found.networks["extracted"]
    macs = cost(small, task.example).macs
    assert given == [
        replace(a_minute(small, macs, len(task.restrict(CLASSES).train)), seed=4, progress=False, device="cpu")
    ]
    # forward and back 3 times the MACs of a sample: 2 epochs of 100 samples are 3.2e12
    assert a_minute(small, int(3.2e12 / 600), 100) == Training(epochs=2, learning_rate=0.05)
    assert a_minute(torch.nn.Linear(2, 2), 4, 100) == Training(epochs=20, learning_rate=0.01)
    monkeypatch.setattr(submodel, "device_of", lambda model: torch.device("cuda"))
    assert a_minute(small, int(3.2e12 / 600), 1500) == Training(epochs=4, learning_rate=0.05)  # 30 times as many there


def test_what_is_weak_is_said():
    labels, remedies = torch.tensor([0] * 6 + [1] * 4), ("a larger budget", "more epochs of tuning")

    def said(whole, part, per_class=(0.5, 0.5), before=(0.5, 0.5), unsure=False):
        scores = Accuracy(whole, before), Accuracy(part, per_class)
        return warnings_of(CLASSES, *scores, labels, remedies, unsure)

    assert said(0.9, 0.871) == ()
    (unsure,) = said(0.9, 0.9, unsure=True)
    assert "divided by the most that is tried: on 10 validation samples" in unsure
    (weak,) = said(0.9, 0.85, (0.9, 0.8), (0.9, 0.9))
    assert weak == (
        "the sub-model is 5.0 points worse than the whole network, most on '8' (80.0% instead of 90.0%). "
        "Try a larger budget or more epochs of tuning."
    )
    (nothing,) = said(0.64, 0.5)
    assert "64.0%" in nothing and "60.0%: there is nothing in it to keep" in nothing
    assert said(0.9, 0.9, (0.9, None), (0.9, None)) == (
        "there is no validation sample of 8, so nothing is known of them.",
    )
    labels = torch.tensor([0] * 97 + [1] * 3)  # naming the first class is right on 97 %
    assert said(1.0, 1.0) == () and "nothing in it to keep" in said(0.98, 0.97)[0]
    assert "3.0 points worse" in said(1.0, 0.97, (1.0, 0.0), (1.0, 1.0))[0]


def test_neurons_without_gates_are_given_back(task, neurons):
    assert without_gates(neurons, task) is neurons


def test_wrong_use(task, neurons, slices):
    with pytest.raises(TorchsliceError, match="at least two classes, got '3' alone"):
        reuse(neurons, task, slices, classes=["3"])
    with pytest.raises(TorchsliceError, match="nothing for class '8'; there is for 3"):
        reuse(neurons, task, {"3": slices["3"]}, classes=CLASSES)
    with pytest.raises(TorchsliceError, match="unknown treatment of gates: 'keep'.*Known: fold, drop"):
        reuse(neurons, task, slices, classes=CLASSES, gates="keep")
    with pytest.raises(TorchsliceError, match=r"got \w+; give find_neurons\(model, example\)"):
        reuse(neurons.model, task, slices, classes=CLASSES)
    with pytest.raises(TorchsliceError, match="training= plays no part with tune=False"):
        reuse(neurons, task, slices, classes=CLASSES, tune=False, training=QUICK)
    without = replace(task, train=task.train.take(task.train.labels != 8))
    with pytest.raises(TorchsliceError, match="class '8' has no training sample in digits"):
        reuse(neurons, without, slices, classes=CLASSES)
    with pytest.raises(TorchsliceError, match="the model answers with 10 classes and digits has 3"):
        reuse(neurons, task.restrict(["8", "3", "5"]), slices, classes=CLASSES)
    gated = gates.attach(find_neurons(neurons.model, task.example, classes=task.classes))
    with pytest.raises(TorchsliceError, match="logit 0 of the network is '0', and class 0 of digits is '9'"):
        reuse(gated, task.restrict(task.classes[::-1]), slices, classes=CLASSES)


def test_wrong_budgets(task, neurons, slices, scores):
    for by in (None, scores):
        with pytest.raises(TorchsliceError, match="how much is to be kept.*mac_retention=0.2"):
            reuse(neurons, task, by, classes=CLASSES)
    with pytest.raises(TorchsliceError, match="class slices have no order.*give contributions"):
        reuse(neurons, task, slices, classes=CLASSES, mac_retention=0.5)
    with pytest.raises(TorchsliceError, match="needs contributions or class rankings, got list"):
        reuse(neurons, task, [], classes=CLASSES, mac_retention=0.5)
    with pytest.raises(TorchsliceError, match=r"no sub-model fits mac_retention=0.01: the smallest.*needs 0\.\d+"):
        reuse(neurons, task, scores, classes=CLASSES, mac_retention=0.01)
