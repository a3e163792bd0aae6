"""None of the classes: scores and areas by hand, and against scikit-learn."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score

from tests.nets import Tiny, lively, stripes
from torchslice.errors import TorchsliceError
from torchslice.graph.find import find_neurons
from torchslice.judge import SCORES, auroc, false_positive_rate, features, nearest, predict, threshold


def test_scores_by_hand() -> None:
    logits = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert SCORES["max logit"](logits).tolist() == [3.0, 0.0]
    assert SCORES["energy"](logits).tolist() == pytest.approx([3.126928, 0.693147])


def test_the_nearest_by_hand() -> None:
    known = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 7.0]])  # of length 1: east, north, north
    found = nearest(torch.tensor([[5.0, 0.0], [0.0, 0.1]]), known, neighbours=2)
    assert found.tolist() == pytest.approx([-(2**0.5), 0.0], abs=1e-3)
    for wrong in (0, 4):
        with pytest.raises(TorchsliceError, match=rf"1..3, the known samples; got {wrong}"):
            nearest(known, known, neighbours=wrong)


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_that_of_scikit_learn(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inside, outside = (torch.randn(n, generator=generator).add(s).mul(4).round() for n, s in ((40, 0.5), (60, 0)))
    truth = [1] * 40 + [0] * 60
    assert auroc(inside, outside) == pytest.approx(roc_auc_score(truth, torch.cat([inside, outside]).numpy()))


@pytest.mark.parametrize("accepted", [0.5, 0.95, 1.0])
def test_a_threshold_accepts_what_it_says(accepted: float) -> None:
    scores = torch.randn(37)
    found = threshold(scores, accepted=accepted)
    assert (scores >= found).float().mean() >= accepted > (scores > found).float().mean()
    assert false_positive_rate(
        scores, torch.tensor([found, found - 1e-3, found + 1]), accepted=accepted
    ) == pytest.approx(2 / 3)
    with pytest.raises(TorchsliceError, match=r"\(0, 1\], got 0"):
        threshold(scores, accepted=0)


def test_features_are_what_the_classifier_gets() -> None:
    task, model = stripes(), lively(Tiny())
    neurons = find_neurons(model.eval(), task.example)
    found = features(neurons, task)
    assert torch.allclose(found @ model.head.weight.T + model.head.bias, predict(model, task), atol=1e-5)
    bare = find_neurons(torch.nn.Sequential(lively(Tiny()), torch.nn.Softmax(1)).eval(), task.example)
    with pytest.raises(TorchsliceError, match="no features"):
        features(bare, task)
