"""Every step of a repair is the verb that it says, and validation samples decide which one is kept."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from tests.nets import Tiny, lively, stripes
from torchslice.cut.extract import extract
from torchslice.data import limit
from torchslice.graph.find import find_neurons
from torchslice.judge import accuracy_of, compensate, predict, recalibrate, repair
from torchslice.slices import Slice

TASK, CLASSES = stripes().restrict(["red", "blue"]), ["red", "blue"]
SLICE = Slice({"conv1": torch.arange(8) < 5, "conv2": torch.arange(6) % 2 == 0})


def test_its_steps_are_one_after_the_other():
    neurons = find_neurons(lively(Tiny()), TASK.example, classes=stripes().classes)
    found = repair(neurons, SLICE, TASK, classes=CLASSES, samples=60, seed=3)
    compensated = compensate(neurons, SLICE, TASK, classes=CLASSES, seed=3)
    drawn = replace(TASK, train=limit(TASK.train, 60, seed=3))
    steps = {
        "extracted": extract(neurons, SLICE, classes=CLASSES),
        "compensated": compensated,
        "recalibrated": recalibrate(compensated, drawn, seed=3),
    }
    assert list(found.networks) == list(found.logits) == list(steps)
    for step, network in steps.items():
        logits = predict(network, TASK, "validation")
        assert torch.equal(found.logits[step], logits) and torch.equal(
            predict(found.networks[step], TASK, "validation"), logits
        )
    assert len({tuple(logits.flatten().tolist()) for logits in found.logits.values()}) == 3
    assert found.model is found.networks[found.kept]


@pytest.mark.parametrize(
    ("scores", "kept"),
    [((0.5, 0.6, 0.7), 2), ((0.5, 0.7, 0.6), 1), ((0.7, 0.6, 0.5), 0), ((0.5, 0.6, 0.6), 2), ((0.6, 0.6, 0.5), 1)],
)
def test_the_last_of_the_best_on_validation_samples_is_kept(monkeypatch, scores, kept):
    labels, left = TASK.validation.labels, iter(scores)

    def answers(network, task, split, *, output):
        assert task is TASK and split == "validation"
        wrong = torch.arange(len(labels)) >= next(left) * len(labels)
        return torch.eye(2)[(labels + wrong) % 2]

    monkeypatch.setattr(sys.modules["torchslice.judge.repair"], "predict", answers)
    neurons = find_neurons(lively(Tiny()), TASK.example, classes=stripes().classes)
    found = repair(neurons, SLICE, TASK, classes=CLASSES)
    assert found.kept == list(found.networks)[kept]
    assert found.accuracy == {step: accuracy_of(logits, labels) for step, logits in found.logits.items()}
    assert found.accuracy[found.kept].overall == pytest.approx(max(scores), abs=1 / len(labels))
