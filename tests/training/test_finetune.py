"""Fine-tuning: a copy, its best epoch by the validation samples alone, epoch 0 among them."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from tests.nets import Tiny, assert_equal, lively, state, stripes
from torchslice.errors import TorchsliceError
from torchslice.training import Training, accuracy, finetune, fit

QUIET = Training(epochs=8, learning_rate=0.1, batch_size=30, precision="fp32", device="cpu", progress=False)


def test_it_learns_and_keeps_the_best_epoch():
    task, model = stripes(), lively(Tiny())
    before = state(model)
    tuned = finetune(model, task, QUIET)
    curve = [row["validation_accuracy"] for row in tuned.log]
    assert [row["epoch"] for row in tuned.log] == list(range(9)) and curve[0] < 0.5 < 0.9 < max(curve)
    assert tuned.kept == max(epoch for epoch, value in enumerate(curve) if value == max(curve))
    assert tuned.best is tuned.log[tuned.kept]
    assert accuracy(tuned.model, task, "validation").overall == max(curve)
    assert_equal(state(model), before)
    assert not tuned.model.training and tuned.model.conv1.weight.is_contiguous()


def test_an_epoch_in_the_middle_is_kept():
    values = iter([0.2, 0.9, 0.5, 0.9, 0.3])
    states = []

    def look(network):
        states.append(state(network))
        return {"validation_accuracy": next(values), "norm": network.head.weight.detach().norm().item()}

    tuned = finetune(Tiny(), stripes(), replace(QUIET, epochs=4), look=look)
    assert tuned.kept == 3 and tuned.best["epoch"] == 3
    assert_equal(state(tuned.model), states[3])
    assert not torch.equal(states[3]["head.weight"], states[4]["head.weight"])
    assert tuned.best["norm"] == tuned.model.head.weight.detach().norm().item()


def test_training_that_only_hurts_keeps_the_model():
    task = stripes()
    good = finetune(lively(Tiny()), task, QUIET).model
    worse = finetune(good, task, replace(QUIET, epochs=1, learning_rate=30.0))
    assert worse.kept == 0
    assert_equal(state(good), state(worse.model))


def test_it_is_the_training_of_fit():
    task, model, tuned = stripes(), lively(Tiny()), lively(Tiny())
    training = replace(QUIET, epochs=2, learning_rate=0.02, seed=3)
    rows, result = fit(model, task, training), finetune(tuned, task, training)
    assert [row["loss"] for row in rows] == [row["loss"] for row in result.log[1:]]
    best = lively(Tiny())
    assert fit(best, task, training, keep="best")[result.kept]["epoch"] == result.kept
    assert_equal(state(best), state(result.model))


def test_the_default_learning_rate_is_a_tenth_of_that_of_fit(monkeypatch):
    seen = []

    def spy(model, task, training, **options):
        seen.append(training)
        return [{"epoch": 0, "validation_accuracy": 1.0}]

    monkeypatch.setattr(sys.modules[finetune.__module__], "fit", spy)
    finetune(Tiny(), stripes())
    assert seen == [Training(learning_rate=0.01)]


def test_wrong_use():
    with pytest.raises(TorchsliceError, match=r"needed are logits \[2, 2\], one for each class"):
        finetune(Tiny(), stripes().restrict(["red", "blue"]), QUIET)
    with pytest.raises(TorchsliceError, match=r"requires? a gradient"):
        finetune(Tiny().requires_grad_(False), stripes(), QUIET)
