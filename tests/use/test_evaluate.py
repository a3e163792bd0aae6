import pytest
import torch
from torch import nn

from torchslice.errors import TorchsliceError
from torchslice.use.evaluate import accuracy, accuracy_of, confusion, predict_logits, restrict_logits

from .nets import Tiny, stripes

LOGITS = torch.tensor([[3.0, 1, 2], [0, 5, 4], [1, 0, 9], [7, 0, 8], [2, 6, 5]])  # answers 0 1 2 2 1
LABELS = torch.tensor([0, 1, 2, 0, 0])


class Stripes(nn.Module):
    """Knows stripes: compares odd with even columns and rows."""

    def forward(self, x):
        columns = (x[..., 1::2] - x[..., ::2]).mean((1, 2, 3))
        rows = (x[..., 1::2, :] - x[..., ::2, :]).mean((1, 2, 3))
        return torch.stack([torch.full_like(rows, 0.7), columns, rows], dim=1)


def test_scores_by_hand():
    assert confusion(LOGITS, LABELS).tolist() == [[1, 1, 1], [0, 1, 0], [0, 0, 1]]
    score = accuracy_of(LOGITS, LABELS)
    assert score.overall == 0.6 and score.per_class == (1 / 3, 1.0, 1.0)
    assert str(score) == "60.00%"


def test_class_without_a_sample_has_no_accuracy():
    assert accuracy_of(LOGITS[:2], torch.tensor([0, 1])).per_class == (1.0, 1.0, None)


def test_restricting_changes_the_answer():
    pair = restrict_logits(LOGITS, [0, 2])
    assert pair.tolist() == [[3, 2], [0, 4], [1, 9], [7, 8], [2, 5]]
    assert restrict_logits(LOGITS, [2, 0])[0].tolist() == [2, 3]


def test_a_model_that_knows_is_always_right():
    data = stripes()
    assert accuracy(Stripes(), data).overall == 1.0
    assert accuracy(Stripes(), data, split="validation").per_class == (1.0, 1.0, 1.0)


def test_batches_and_modes_do_not_matter():
    data, model = stripes(), Tiny().train()
    logits = predict_logits(model, data, batch_size=1000)
    assert logits.shape == (60, 3) and not logits.requires_grad and model.training
    assert torch.allclose(predict_logits(model, data, batch_size=7), logits, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(model.eval()(data.normalise(data.test.images)), logits, atol=1e-6)


def test_wrong_use():
    data = stripes()
    with pytest.raises(TorchsliceError, match=r"with 3 classes and stripes has 2; give data.restrict\(classes\)"):
        accuracy(Tiny(), data.restrict(["red", "blue"]))
    with pytest.raises(TorchsliceError, match="unknown split 'tests'; there are train, validation and test"):
        accuracy(Tiny(), data, split="tests")
    with pytest.raises(TorchsliceError, match=r"output is \[60, 3, 1\]; needed are class logits \[n, C\]"):
        predict_logits(nn.Sequential(Tiny(), nn.Unflatten(1, (3, 1))), data)
