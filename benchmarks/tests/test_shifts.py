"""Attacks, corruptions and damage: by hand, within their reach, and the same for the same seed."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.experiment import inputs_of
from benchmarks.shifts import ATTACKS, BLUR, CONTRAST, CORRUPTIONS, NOISE, damaged, fgsm, pgd, shifted
from torchslice import TorchsliceError, Training, accuracy, finetune, fit, models
from torchslice.data import Images, Task, limit, load

from .nets import Tiny, lively, stripes

TASK = stripes()
QUIET = Training(batch_size=30, precision="fp32", device="cpu", progress=False)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    trained = finetune(lively(Tiny()), TASK, replace(QUIET, epochs=8, learning_rate=0.1)).model
    trained.zero_grad()
    return trained


def score(model: nn.Module, images: Images, task: Task = TASK) -> float:
    return accuracy(model, replace(task, test=images)).overall


class Sum(nn.Module):
    """Logit of class 1: sum of the pixels of the left half, minus those of the right half; of class 0: 0."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.flatten(1).reshape(len(x), x.shape[2], -1).chunk(2, dim=2)
        logit = left.sum((1, 2)) - right.sum((1, 2))
        return torch.stack([torch.zeros_like(logit), logit], 1)


def test_fgsm_by_hand() -> None:
    pixels = torch.tensor([[[[100, 100]]], [[[3, 250]]]], dtype=torch.uint8)
    images = Images(pixels, torch.tensor([1, 0]), (0.5,), (0.25,))
    made = fgsm(Sum(), images, epsilon=10)
    # class 1 is hurt by less on the left and more on the right, class 0 by the opposite; grey levels end at 0 and 255
    assert made.images.flatten().tolist() == [90, 110, 13, 240]
    edge = fgsm(Sum(), images.relabelled(torch.tensor([0, 1])), epsilon=10)
    assert edge.images.flatten().tolist() == [110, 90, 0, 255] and torch.equal(edge.labels, torch.tensor([0, 1]))


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_attacks_fool_the_model_within_their_reach(model: nn.Module, name: str) -> None:
    made = shifted(name, model, TASK.test, epsilon=60, seed=3)
    moved = (made.images.int() - TASK.test.images.int()).abs()
    assert moved.max() == 60 and torch.equal(made.labels, TASK.test.labels)
    noisy = (TASK.test.images + 60 * torch.randn(TASK.test.images.shape).sign()).clamp(0, 255).byte()
    assert score(model, made) < score(model, replace(TASK.test, images=noisy)) - 0.1
    assert torch.equal(made.images, shifted(name, model, TASK.test, epsilon=60, seed=3).images)
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_pgd_starts_at_random_and_raises_the_loss_more_than_fgsm(model: nn.Module) -> None:
    one, other = (pgd(model, TASK.test, 30, seed) for seed in (0, 1))
    assert not torch.equal(one.images, other.images)

    def loss(images: Images) -> float:
        with torch.no_grad():
            return nn.functional.cross_entropy(model(inputs_of(images, torch.device("cpu"))), images.labels).item()

    assert loss(one) > loss(fgsm(model, TASK.test, 30)) > loss(TASK.test)


def test_corruptions_by_hand() -> None:
    flat = torch.full((2, 3, 20, 20), 128, dtype=torch.uint8)
    assert torch.equal(CORRUPTIONS["blur"](flat, 0), flat) and torch.equal(CORRUPTIONS["contrast"](flat, 0), flat)
    noisy = CORRUPTIONS["noise"](flat, 0).float()
    assert abs(noisy.mean() - 128) < 4 and abs(noisy.std() - NOISE) < 3
    assert not torch.equal(noisy, CORRUPTIONS["noise"](flat, 1).float())
    dot = torch.zeros(1, 1, 11, 11, dtype=torch.uint8)
    dot[0, 0, 5, 5] = 255
    blurred = CORRUPTIONS["blur"](dot, 0).float()[0, 0]
    bell = torch.exp(-(torch.arange(-4.0, 5) ** 2) / (2 * BLUR**2))
    expected = 255 * torch.outer(bell, bell) / bell.sum() ** 2
    assert (blurred[1:10, 1:10] - expected).abs().max() <= 0.5 and abs(blurred.sum() - 255) < 30
    halves = torch.tensor([[[[0, 200]]]], dtype=torch.uint8)
    assert CORRUPTIONS["contrast"](halves, 0).flatten().tolist() == [100 - CONTRAST * 100, 100 + CONTRAST * 100]


def test_shifts_are_known_by_name(model: nn.Module) -> None:
    for name in CORRUPTIONS:
        made = shifted(name, model, TASK.test, epsilon=0)
        assert made.images.shape == TASK.test.images.shape and not torch.equal(made.images, TASK.test.images)
    with pytest.raises(TorchsliceError, match="unknown shift 'fsgm'. Did you mean 'fgsm'"):
        shifted("fsgm", model, TASK.test, epsilon=0)


@pytest.mark.parametrize("points", [0.1, 0.5])
def test_damage_costs_the_training_accuracy_it_is_asked_for(model: nn.Module, points: float) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hurt = damaged(model, TASK, points, seed=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    lost = accuracy(model, TASK, "train").overall - accuracy(hurt, TASK, "train").overall
    assert points <= lost < points + 0.25
    changed = {name: tensor != before[name] for name, tensor in hurt.state_dict().items()}
    fraction = sum(int(c.sum()) for c in changed.values()) / sum(p.numel() for p in model.parameters() if p.dim() > 1)
    weights = {"conv1.weight", "conv2.weight", "head.weight"}
    assert 0 < fraction < 1 and {name for name, c in changed.items() if c.any()} <= weights
    assert torch.equal(hurt.conv2.weight, damaged(model, TASK, points, seed=1).conv2.weight)
    assert not torch.equal(hurt.conv2.weight, damaged(model, TASK, points, seed=2).conv2.weight)


@pytest.mark.parametrize("name", ["deepfool", "cw"])
def test_attacks_of_the_toolbox(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # its progress bars start a thread, also where none is shown
    digits = load("digits")
    network = models.create("convnet", channels=1, width=0.125)
    fit(network, digits, replace(QUIET, epochs=4, learning_rate=0.05, batch_size=32))
    network.zero_grad()
    images = limit(digits.test, 10)
    made = ATTACKS[name](network, images, 0, 0)
    assert score(network, made, digits) < score(network, images, digits) - 0.3
    assert torch.equal(made.labels, images.labels) and all(p.grad is None for p in network.parameters())


def test_without_the_toolbox(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(TorchsliceError, match="DeepFool comes from .* pip install adversarial-robustness-toolbox"):
        ATTACKS["deepfool"](model, TASK.test, 0, 0)
