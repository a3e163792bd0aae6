"""Accuracy and predictions: by hand, and independent of batch size, modes and structure of the inputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.battery.zoo import Dictionary
from tests.nets import Tiny, assert_equal, state, stripes
from torchslice.data import Stored, Task
from torchslice.data import task as make_task
from torchslice.errors import TorchsliceError
from torchslice.training import accuracy, accuracy_of, predict
from torchslice.training.ranks import Ranks

LOGITS = torch.tensor([[3.0, 1, 2], [0, 5, 4], [1, 0, 9], [7, 0, 8], [2, 6, 5]])  # answers 0 1 2 2 1
LABELS = torch.tensor([0, 1, 2, 0, 0])


class Stripes(nn.Module):
    """Knows stripes: compares odd with even columns and rows."""

    def forward(self, x):
        columns = (x[..., 1::2] - x[..., ::2]).mean((1, 2, 3))
        rows = (x[..., 1::2, :] - x[..., ::2, :]).mean((1, 2, 3))
        return torch.stack([torch.full_like(rows, 0.7), columns, rows], dim=1)


def test_figures_by_hand():
    score = accuracy_of(LOGITS, LABELS)
    assert score.overall == 0.6 and score.per_class == (1 / 3, 1.0, 1.0)
    assert str(score) == "60.00%"
    assert accuracy_of(LOGITS[:2], torch.tensor([0, 1])).per_class == (1.0, 1.0, None)


def test_a_model_that_knows_is_always_right():
    task = stripes()
    assert accuracy(Stripes(), task).overall == 1.0
    assert accuracy(Stripes(), task, "validation").per_class == (1.0, 1.0, 1.0)
    assert accuracy_of(predict(Stripes(), task), task.test.labels) == accuracy(Stripes(), task)


def test_batches_and_modes_do_not_matter():
    task, model = stripes(), Tiny().train()
    before = state(model)
    logits = predict(model, task, batch_size=1000)
    assert logits.shape == (60, 3) and not logits.requires_grad and logits.dtype == torch.float32
    assert all(module.training for module in model.modules())
    assert_equal(state(model), before)
    assert torch.allclose(predict(model, task, batch_size=7), logits, atol=1e-6)
    (inputs, _) = next(task.batches("test", 100))
    with torch.no_grad():
        assert torch.allclose(model.eval()(inputs), logits, atol=1e-6)


def test_processes_share_the_samples(monkeypatch):
    task, shares = stripes(), []
    expected = predict(Stripes(), task)

    class Half(Ranks):
        def sum(self, tensor):
            shares.append(tensor)
            return tensor

    for rank in (0, 1):
        monkeypatch.setattr("torchslice.training.evaluate.current_ranks", lambda device, rank=rank: Half(rank, 2))
        accuracy(Stripes(), task)
    assert torch.equal(sum(shares), expected)


def test_any_inputs_and_any_output():
    inputs = {"image": torch.randn(30, 3, 8, 8), "attributes": torch.randn(30, 5)}
    task = make_task((inputs, torch.arange(30) % 3), validation_fraction=0.2)
    model = Dictionary(num_classes=3).eval()
    picked = predict(model, task, output=lambda result: result["probabilities"])
    torch.testing.assert_close(picked, predict(model, task).softmax(1))
    assert accuracy(model, task, output=lambda r: r["probabilities"]) == accuracy(model, task)


def test_half_precision_gives_float32():
    split = Stored(torch.randn(8, 4).bfloat16(), torch.arange(8) % 2)
    task = Task("half", ("a", "b"), split, split, split)
    assert predict(nn.Linear(4, 2).bfloat16(), task).dtype == torch.float32


def test_wrong_use():
    task = stripes()
    with pytest.raises(TorchsliceError, match=r"with 3 classes and stripes has 2; give task.restrict\(classes\)"):
        accuracy(Tiny(), task.restrict(["red", "blue"]))
    with pytest.raises(TorchsliceError, match="unknown split 'tests'. Did you mean 'test'"):
        accuracy(Tiny(), task, "tests")
    with pytest.raises(TorchsliceError, match=r"output is a tensor float32 \[60, 3, 1\]; needed are logits \[B, C\]"):
        predict(nn.Sequential(Tiny(), nn.Unflatten(1, (3, 1))), task)
    with pytest.raises(TorchsliceError, match="batch_size must be at least 1, got 0"):
        predict(Tiny(), task, batch_size=0)


def test_logits_that_are_not_numbers_are_no_answers():
    class Broken(Stripes):
        def forward(self, x):
            return super().forward(x) * math.nan

    with pytest.raises(TorchsliceError, match="gives NaN or infinite logits"):
        accuracy(Broken(), stripes())
