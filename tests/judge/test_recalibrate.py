"""Statistics that are computed again: pooled exactly, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.nets import Tiny, lively
from torchslice.data import Stored
from torchslice.data import task as make_task
from torchslice.errors import TorchsliceError
from torchslice.judge import recalibrate
from torchslice.judge.recalibrate import moments, pooled

IMAGES = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 + 1


def stored(inputs):
    """A task with these training inputs."""
    split = Stored(inputs, torch.arange(len(IMAGES if isinstance(inputs, tuple) else inputs)) % 2)
    return make_task(split, split, split, classes=["a", "b"])


def test_moments_do_not_depend_on_the_batches():
    values = torch.randn(50, 3, 4, 4) * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1) + 7
    expected = values.double().transpose(0, 1).flatten(1)
    for sizes in ([50], [1] * 50, [3, 40, 7]):
        mean, variance = pooled([moments(batch) for batch in values.split(sizes)])
        assert torch.allclose(mean, expected.mean(1), rtol=1e-6)
        assert torch.allclose(variance, expected.var(1), rtol=1e-5)


@pytest.mark.parametrize("batch_size", [4, 2])
def test_statistics_by_hand(batch_size):
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    task = stored(torch.tensor([[1.0, 10.0], [2.0, 10.0], [3.0, 40.0], [6.0, 40.0]]))
    norm = recalibrate(model, task, batch_size=batch_size)[0]
    assert norm.running_mean.tolist() == [3.0, 25.0]
    assert norm.running_var.tolist() == pytest.approx([14 / 3, 300.0])  # unbiased, and across the batches
    assert model[0].running_mean.tolist() == [0.0, 0.0]


def test_exact_in_every_layer_when_the_samples_fit_one_batch():
    model, inputs = recalibrate(lively(Tiny()), stored((IMAGES,))), {}
    hooks = [
        norm.register_forward_pre_hook(lambda norm, args: inputs.update({norm: args[0].double()}))
        for norm in (model.norm1, model.norm2)
    ]
    with torch.no_grad():
        model.eval()(IMAGES)
    for hook in hooks:
        hook.remove()
    for norm, values in inputs.items():  # what each norm sees in eval mode has the statistics it holds
        flat = values.transpose(0, 1).flatten(1)
        assert torch.allclose(norm.running_mean.double(), flat.mean(1), rtol=1e-3)
        assert torch.allclose(norm.running_var.double(), flat.var(1), rtol=1e-3)


def test_several_batches_come_close():
    exact, near, same = (recalibrate(lively(Tiny()), stored(IMAGES), batch_size=size) for size in (60, 25, 25))
    assert torch.allclose(exact.norm1.running_var, near.norm1.running_var, rtol=1e-5)  # the first norm is always exact
    assert torch.allclose(exact.norm2.running_mean, near.norm2.running_mean, rtol=0.05)
    assert not torch.equal(exact.norm2.running_mean, near.norm2.running_mean)
    assert torch.equal(near.norm2.running_var, same.norm2.running_var)


def test_only_statistics_change_and_dropout_is_off():
    model = lively(Tiny()).train()
    model.drop.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    new = recalibrate(model, stored(IMAGES))
    assert torch.equal(torch.random.get_rng_state(), state)
    changed = {name for name, tensor in new.state_dict().items() if not torch.equal(tensor, before[name])}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{norm}.{name}" for norm in ("norm1", "norm2") for name in statistics}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert new.training and new.norm1.training and not new.drop.training and new.norm1.momentum == 0.1


def test_model_without_batch_norm_is_an_equal_copy():
    model = lively(Tiny(norm=False))
    new = recalibrate(model, stored(IMAGES))
    assert new is not model and new.conv1.weight is not model.conv1.weight
    assert torch.equal(new(IMAGES), model(IMAGES))


def test_too_few_samples():
    for task, sizes in ((stored(IMAGES[:2]), {"samples": 1}), (stored(IMAGES), {"batch_size": 1})):
        with pytest.raises(TorchsliceError, match="needs batches of at least 2 training samples"):
            recalibrate(Tiny(), task, **sizes)
