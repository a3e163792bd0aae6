from itertools import pairwise

import pytest
import torch
from torch import nn

from torchslice.errors import TorchsliceError
from torchslice.use.joined import Joined, Known, Selected, best_bias

X = torch.tensor([[1.0, 2.0], [0.5, -1.0]])


def test_scores_by_hand():
    one, other = nn.Identity(), Selected(nn.Identity(), [1])
    assert Joined([one, other], biases=[0, 1.0])(X).tolist() == [[1.0, 2.0, 3.0], [0.5, -1.0, 0.0]]
    scores = Joined([one, one], biases=[0, 0.5], rule="softmax")(X)
    assert torch.allclose(scores[:, :2].exp().sum(1), torch.ones(2)) and torch.allclose(
        scores[:, 2:], scores[:, :2] + 0.5
    )


def test_a_known_network_is_only_asked():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9), nn.BatchNorm1d(2))
    joined = Joined([Known(model), nn.Linear(2, 2)], biases=[0, 0]).train()
    assert joined.networks[1].training and not any(module.training for module in model.modules())
    joined(X).sum().backward()
    assert all(p.grad is None for p in model.parameters()) and joined.networks[1].weight.grad is not None
    assert torch.equal(model[2].running_mean, torch.zeros(2))


def slow_bias(known, new, labels):
    """Try every bias between and beyond the margins."""
    margins = sorted({float(a.max() - b.max()) for a, b in zip(known, new, strict=True)})
    edges = [margins[0] - 1, *margins, margins[-1] + 1]
    best = (0.0, 0.0)
    for low, high in pairwise(edges):
        answer = torch.cat([known, new + (low + high) / 2], 1).argmax(1)
        right = answer == labels
        is_new = labels >= known.shape[1]
        score = (right[is_new].double().mean() + right[~is_new].double().mean()) / 2
        best = max(best, (float(score), (low + high) / 2))
    return best


@pytest.mark.parametrize("seed", range(8))
def test_the_best_bias_is_that_of_a_search(seed):
    torch.manual_seed(seed)
    known, new = torch.randn(60, 3).mul(4).round() / 4, torch.randn(60, 2).mul(4).round() / 4 - 1  # with ties
    labels = torch.randint(5, (60,))
    bias, score = best_bias(known, new, labels)
    assert score == pytest.approx(slow_bias(known, new, labels)[0])
    answer = torch.cat([known, new + bias], 1).argmax(1)
    is_new = labels >= 3
    right = (answer == labels).double()
    assert score == pytest.approx(float(right[is_new].mean() + right[~is_new].mean()) / 2)


def test_wrong_use():
    with pytest.raises(TorchsliceError, match="unknown rule 'enrgy'. Did you mean 'energy'"):
        Joined([nn.Identity()], biases=[0], rule="enrgy")
    with pytest.raises(TorchsliceError, match="samples of known and of new classes; one of them is missing"):
        best_bias(X, X, torch.tensor([0, 1]))
