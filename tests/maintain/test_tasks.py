"""One answer from several networks, by hand and by search."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from torchslice.errors import TorchsliceError
from torchslice.maintain.tasks import Joined, Learned, Selected, best_bias
from torchslice.slices import Slice

X = torch.tensor([[1.0, 2.0], [0.5, -1.0]])


def test_logits_by_hand() -> None:
    one, other = nn.Identity(), Selected(nn.Identity(), [1])
    assert Joined([one, other], biases=[0, 1.0])(X).tolist() == [[1.0, 2.0, 3.0], [0.5, -1.0, 0.0]]
    logits = Joined([one, one], biases=[0, 0.5], rule="softmax")(X)
    assert torch.allclose(logits[:, :2].exp().sum(1), torch.ones(2))
    assert torch.allclose(logits[:, 2:], logits[:, :2] + 0.5)


def test_all_networks_but_the_last_are_only_asked() -> None:
    model, last = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9), nn.BatchNorm1d(2)), nn.Linear(2, 2)
    joined = Joined([model.requires_grad_(False), last], biases=[0, 0]).train()
    assert last.training and not any(module.training for module in model.modules())
    joined(X).sum().backward()
    assert all(p.grad is None for p in model.parameters()) and last.weight.grad is not None
    assert torch.equal(model[2].running_mean, torch.zeros(2))


def slow_bias(known: Tensor, new: Tensor, labels: Tensor) -> tuple[float, float]:
    """Try every bias between and beyond the margins."""
    margins = sorted({float(a.max() - b.max()) for a, b in zip(known, new, strict=True)})
    best = (0.0, 0.0)
    for low, high in pairwise([margins[0] - 1, *margins, margins[-1] + 1]):
        best = max(best, (mean_accuracy(known, new + (low + high) / 2, labels), (low + high) / 2))
    return best


def mean_accuracy(known: Tensor, new: Tensor, labels: Tensor) -> float:
    correct, is_new = (torch.cat([known, new], 1).argmax(1) == labels).double(), labels >= known.shape[1]
    return float(correct[is_new].mean() + correct[~is_new].mean()) / 2


@pytest.mark.parametrize("seed", range(8))
def test_the_best_bias_is_that_of_a_search(seed: int) -> None:
    torch.manual_seed(seed)
    known, new = torch.randn(60, 3).mul(4).round() / 4, torch.randn(60, 2).mul(4).round() / 4 - 1  # with ties
    labels = torch.randint(5, (60,))
    bias, score = best_bias(known, new, labels)
    assert score == pytest.approx(slow_bias(known, new, labels)[0])
    assert score == pytest.approx(mean_accuracy(known, new + bias, labels))


def test_what_was_learned_becomes_plain_data() -> None:
    for slice_ in (None, Slice({"conv": torch.tensor([True, False])})):
        learned = Learned(("a", "b"), slice_, 0.5)
        assert Learned.from_plain(learned.to_plain()) == learned


def test_wrong_use() -> None:
    with pytest.raises(TorchsliceError, match="unknown rule 'enrgy'. Did you mean 'energy'"):
        Joined([nn.Identity()], biases=[0], rule="enrgy")
    with pytest.raises(TorchsliceError, match="samples of known and of new classes; one of them is missing"):
        best_bias(X, X, torch.tensor([0, 1]))
