import sys

import pytest
import torch

from torchslice.errors import TorchsliceError
from torchslice.training import fit
from torchslice.use.evaluate import accuracy
from torchslice.use.finetune import finetune

from .nets import Tiny, lively, stripes

SETTINGS = {"batch_size": 30, "precision": "fp32", "device": "cpu", "progress": False}


def test_it_learns_and_keeps_the_best_epoch():
    data, model = stripes(), lively(Tiny())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = finetune(model, data, epochs=8, learning_rate=0.1, **SETTINGS)
    curve = tuned.validation_accuracy
    assert len(curve) == 9 and curve[0] < 0.5 < 0.9 < max(curve)
    assert tuned.best_epoch == max(epoch for epoch, value in enumerate(curve) if value == max(curve))
    assert accuracy(tuned.model, data, split="validation").overall == max(curve)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not tuned.model.training and tuned.model.conv1.weight.is_contiguous()


def test_an_epoch_in_the_middle_is_kept(monkeypatch):
    values = iter([0.2, 0.9, 0.5, 0.9, 0.3])
    states = []

    def watch(model, data, *, split):
        assert split == "validation"
        states.append(model.head.weight.detach().clone())
        return type("Score", (), {"overall": next(values)})

    monkeypatch.setattr(sys.modules[finetune.__module__], "accuracy", watch)
    tuned = finetune(Tiny(), stripes(), epochs=4, **SETTINGS)
    assert tuned.best_epoch == 3 and torch.equal(tuned.model.head.weight, states[3])
    assert not torch.equal(states[3], states[4])


def test_training_that_only_hurts_keeps_the_model(monkeypatch):
    data = stripes()
    good = finetune(lively(Tiny()), data, epochs=8, learning_rate=0.1, **SETTINGS).model
    worse = finetune(good, data, epochs=1, learning_rate=1e6, **SETTINGS)
    assert worse.best_epoch == 0
    assert all(torch.equal(a, b) for a, b in zip(good.parameters(), worse.model.parameters(), strict=True))


def test_it_is_the_training_of_fit():
    data, model, tuned = stripes(), lively(Tiny()), lively(Tiny())
    rows = fit(model, data, epochs=2, learning_rate=0.02, seed=3, **SETTINGS)
    result = finetune(tuned, data, epochs=2, learning_rate=0.02, seed=3, **SETTINGS)
    assert [row["validation_accuracy"] for row in rows] == pytest.approx(list(result.validation_accuracy[1:]))
    if result.best_epoch == 2:
        assert torch.equal(model.head.weight, result.model.head.weight)


def test_wrong_use():
    with pytest.raises(TorchsliceError, match="at least 1 epoch and a learning_rate above 0, got 0 and 0.01"):
        finetune(Tiny(), stripes(), epochs=0)
    with pytest.raises(TorchsliceError, match="answers with 3 classes and stripes has 2"):
        finetune(Tiny(), stripes().restrict(["red", "blue"]), **SETTINGS)
    with pytest.raises(TorchsliceError, match="no parameter that requires a gradient"):
        finetune(Tiny().requires_grad_(False), stripes(), **SETTINGS)
