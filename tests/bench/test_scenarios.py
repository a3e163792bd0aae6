from dataclasses import replace

import pytest
import torch
from tests.use.nets import Tiny, lively, stripes
from torch import Tensor, nn

from torchslice import models
from torchslice.bench.scenarios import ATTACKS, BLUR, CONTRAST, CORRUPTIONS, NOISE, damaged, fgsm, pgd, shifted
from torchslice.data import Split, load
from torchslice.errors import TorchsliceError
from torchslice.training import fit
from torchslice.use.evaluate import accuracy
from torchslice.use.finetune import finetune

DATA = stripes()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    options = {"batch_size": 30, "precision": "fp32", "device": "cpu", "progress": False}
    trained = finetune(lively(Tiny()), DATA, epochs=8, learning_rate=0.1, **options).model
    trained.zero_grad()
    return trained


class Sum(nn.Module):
    """Score of class 1 is the sum of the pixels of the left half, minus those of the right half; class 0 scores 0."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.flatten(1).reshape(len(x), x.shape[2], -1).chunk(2, dim=2)
        score = left.sum((1, 2)) - right.sum((1, 2))
        return torch.stack([torch.zeros_like(score), score], 1)


def test_fgsm_by_hand():
    images = torch.tensor([[[[100, 100]]], [[[3, 250]]]], dtype=torch.uint8)
    made = fgsm(Sum(), DATA, Split(images, torch.tensor([1, 0])), epsilon=10)
    # class 1 is hurt by less on the left and more on the right, class 0 by the opposite; grey levels end at 0 and 255
    assert made.images.flatten().tolist() == [90, 110, 13, 240]
    edge = fgsm(Sum(), DATA, Split(images, torch.tensor([0, 1])), epsilon=10)
    assert edge.images.flatten().tolist() == [110, 90, 0, 255] and torch.equal(edge.labels, torch.tensor([0, 1]))


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_attacks_fool_the_model_within_their_reach(model, name):
    split = DATA.test
    made = shifted(name, model, DATA, split, epsilon=60, seed=3)
    moved = (made.images.int() - split.images.int()).abs()
    assert moved.max() == 60 and torch.equal(made.labels, split.labels)
    noisy = Split((split.images + 60 * torch.randn(split.images.shape).sign()).clamp(0, 255).byte(), split.labels)
    scores = {
        key: accuracy(model, replace(DATA, test=value)).overall
        for key, value in {"clean": split, "noisy": noisy, "attacked": made}.items()
    }
    assert scores["attacked"] < scores["noisy"] - 0.1, scores
    assert torch.equal(made.images, shifted(name, model, DATA, split, epsilon=60, seed=3).images)
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_pgd_starts_at_random_and_raises_the_loss_more_than_fgsm(model):
    split = DATA.test
    one, other = (pgd(model, DATA, split, 30, seed) for seed in (0, 1))
    assert not torch.equal(one.images, other.images)

    def loss(samples: Split) -> float:
        with torch.no_grad():
            return nn.functional.cross_entropy(model(DATA.normalise(samples.images)), samples.labels).item()

    assert loss(one) > loss(fgsm(model, DATA, split, 30)) > loss(split)


def test_corruptions_by_hand():
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


def test_shifts_are_known_by_name(model):
    for name in CORRUPTIONS:
        made = shifted(name, model, DATA, DATA.test, epsilon=0)
        assert made.images.shape == DATA.test.images.shape and not torch.equal(made.images, DATA.test.images)
    with pytest.raises(TorchsliceError, match="unknown shift 'fsgm'. Did you mean 'fgsm'"):
        shifted("fsgm", model, DATA, DATA.test, epsilon=0)


@pytest.mark.parametrize("points", [0.1, 0.5])
def test_damage_costs_the_training_accuracy_it_is_asked_for(model, points):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hurt = damaged(model, DATA, points, seed=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    lost = accuracy(model, DATA, split="train").overall - accuracy(hurt, DATA, split="train").overall
    assert points <= lost < points + 0.25
    changed = {name: tensor != before[name] for name, tensor in hurt.state_dict().items()}
    share = sum(int(c.sum()) for c in changed.values()) / sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert 0 < share < 1 and {n for n, c in changed.items() if c.any()} <= {
        "conv1.weight",
        "conv2.weight",
        "head.weight",
    }
    assert torch.equal(hurt.conv2.weight, damaged(model, DATA, points, seed=1).conv2.weight)
    assert not torch.equal(hurt.conv2.weight, damaged(model, DATA, points, seed=2).conv2.weight)


@pytest.mark.parametrize("name", ["deepfool", "cw"])
def test_attacks_of_the_toolbox(name, monkeypatch):
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # its progress bars start a thread, also where none is shown
    data = load("digits")
    model = models.create("convnet", channels=1, width=0.125)
    fit(model, data, epochs=4, batch_size=32, precision="fp32", device="cpu", progress=False)
    model.zero_grad()
    split = data.test.limit(10)
    made = ATTACKS[name](model, data, split, 0, 0)
    right = [accuracy(model, replace(data, test=samples)).overall for samples in (split, made)]
    assert right[1] < right[0] - 0.3 and torch.equal(made.labels, split.labels)
    assert all(p.grad is None for p in model.parameters())


def test_without_the_toolbox(model, monkeypatch):
    def refuse(name):
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", refuse)
    with pytest.raises(TorchsliceError, match="DeepFool comes from .* pip install adversarial-robustness-toolbox"):
        ATTACKS["deepfool"](model, DATA, DATA.test, 0, 0)
