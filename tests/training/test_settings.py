"""Settings: checked when they are made, the learning rates by hand, the optimizers by hand."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import nn

from torchslice.errors import TorchsliceError
from torchslice.training import Training


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"learning_rate": 0.0}, "learning_rate must be a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0"),
        ({"learning_rate": float("inf")}, "learning_rate must be a number above 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more"),
        ({"weight_decay": float("nan")}, "weight_decay must be 0 or more"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'. Did you mean 'adamw'"),
        ({"warmup_fraction": 1}, r"warmup_fraction must be in \[0, 1\), got 1"),
        ({"warmup_fraction": -0.1}, r"warmup_fraction must be in \[0, 1\), got -0.1"),
        ({"epochs": 1.5}, "epochs must be"),
        ({"batch_size": 8.0}, "batch_size must be"),
        ({"learning_rate": "0.1"}, "learning_rate must be"),
        ({"seed": 0.5}, "seed must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**64}, "seed must be"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
    ],
)
def test_bad_settings_are_named_when_they_are_made(given, message):
    with pytest.raises(TorchsliceError, match=message):
        Training(**given)


def test_settings_are_changed_by_replacing():
    training = Training(epochs=3)
    with pytest.raises(FrozenInstanceError):
        training.epochs = 4
    assert replace(training, epochs=4) == Training(epochs=4)
    with pytest.raises(TorchsliceError, match="epochs must be at least 1"):
        replace(training, epochs=0)


def test_plain_data_is_what_decides_the_result():
    one, other = Training(seed=3).to_plain(), Training(seed=3, device="cpu", progress=False).to_plain()
    assert one == other and one["seed"] == 3 and "precision" in one


def test_the_rate_rises_in_the_warmup_and_then_falls_in_a_straight_line():
    training = Training(epochs=5, learning_rate=0.3)
    rates = [round(training.rate(step, 2), 6) for step in range(10)]  # 2 steps up to it, then 8 to zero
    assert rates == [0.1, 0.2, 0.3, 0.2625, 0.225, 0.1875, 0.15, 0.1125, 0.075, 0.0375]
    falling = replace(training, epochs=2, warmup_fraction=0)
    assert [round(falling.rate(step, 2), 6) for step in range(4)] == [0.3, 0.225, 0.15, 0.075]


def test_a_schedule_that_begins_later_is_the_same_schedule():
    whole, rest = Training(epochs=2, learning_rate=0.2), Training(epochs=5, learning_rate=0.2)
    assert [rest.rate(30 + step, 10, first_epoch=3) for step in range(20)] == [
        whole.rate(step, 10) for step in range(20)
    ]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_decay_and_biases_and_norms_do_not(optimizer):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    Training(learning_rate=0.1, weight_decay=0.5, optimizer=optimizer, momentum=0).make_optimizer(model).step()
    decayed = {name for name, parameter in model.named_parameters() if parameter.detach().mean() < 1}
    assert decayed == {"0.weight", "3.weight"} and model[0].weight.mean().item() == pytest.approx(0.95)


def test_only_what_requires_a_gradient_is_optimized():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    groups = Training(weight_decay=0.1).make_optimizer(model).param_groups
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model[1].parameters()}
    with pytest.raises(TorchsliceError, match="parameter.*requires? a gradient; unfreeze what is to be trained"):
        Training().make_optimizer(model.requires_grad_(False))
