"""The cross entropy by hand, and how an objective names itself."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from torchslice.training import CrossEntropy
from torchslice.training.objectives import describe_objective

LOGITS, LABELS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]]), torch.tensor([0, 0, 0])


class Pair(nn.Module):
    def forward(self, x):
        return "logits", x


def test_the_cross_entropy_by_hand():
    loss, correct, parts = CrossEntropy()(nn.Identity(), LOGITS, LABELS)
    one = [torch.tensor(x).exp().log1p().item() for x in (-2.0, 1.0, -2.0)]
    assert abs(loss.item() - sum(one) / 3) < 1e-6 and correct.tolist() == [True, False, True] and parts == {}
    smooth = CrossEntropy(0.1)(nn.Identity(), LOGITS, LABELS)[0]
    assert torch.allclose(smooth, F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1)) and smooth > loss
    low = CrossEntropy()(nn.Identity(), LOGITS.bfloat16(), LABELS)[0]
    assert low.dtype == torch.float32


def test_the_logits_are_picked_from_the_result():
    picked = CrossEntropy(output=lambda result: result[1])(Pair(), LOGITS, LABELS)
    assert torch.equal(picked[0], CrossEntropy()(nn.Identity(), LOGITS, LABELS)[0])


class Own:
    def __call__(self, model, inputs, labels): ...


def test_an_objective_names_itself_alike_in_every_process():
    assert describe_objective(CrossEntropy(0.1)) == "CrossEntropy(label_smoothing=0.1, output=None)"
    assert describe_objective(test_the_cross_entropy_by_hand) == f"{__name__}.test_the_cross_entropy_by_hand"
    assert describe_objective(Own()) == f"{__name__}.Own"
    for objective in (CrossEntropy(output=lambda result: result[1]), partial(test_the_cross_entropy_by_hand, 1)):
        assert " at 0x" not in describe_objective(objective)
