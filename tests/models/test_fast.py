"""The fast network: its first layer decorrelates patches, its convolutions begin as the identity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from torchslice.data import load
from torchslice.judge import reinitialised
from torchslice.models import create
from torchslice.models.fast import Dirac, Whitening
from torchslice.runs.recipe import make_model
from torchslice.training import Training, fit


def test_whitened_outputs_are_uncorrelated_and_of_one_variance():
    generator = torch.Generator().manual_seed(0)
    mixed = torch.einsum(
        "cd,ndhw->nchw", torch.tensor([[2.0, 1.0], [0.0, 0.5]]), torch.randn(40, 2, 9, 9, generator=generator)
    )
    layer = Whitening(2)
    layer.whiten(mixed)
    outputs = layer(mixed)[:, :8].transpose(0, 1).flatten(1)  # those of one sign
    moments = outputs @ outputs.T / outputs.shape[1]
    torch.testing.assert_close(moments, torch.eye(8), atol=0.01, rtol=0)  # a little below 1, by the 5e-4
    assert torch.equal(layer.weight[8:], -layer.weight[:8])


def test_a_whitening_by_hand():
    layer = Whitening(1)
    layer.whiten(
        torch.tensor([[1.0, 1.0], [1.0, 1.0]]).view(1, 1, 2, 2)
    )  # one patch: second moment 4 along (1, 1, 1, 1) / 2
    sizes = layer.weight.flatten(1).norm(dim=1).sort().values
    expected = [1 / 4.0005**0.5] * 2 + [1 / 0.0005**0.5] * 6
    torch.testing.assert_close(sizes, torch.tensor(expected))


def test_a_convolution_begins_by_passing_its_input_on():
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(Dirac(3, 5)(x)[:, :3], x)
    torch.testing.assert_close(Dirac(3, 2)(x), x[:, :2])


def test_only_the_bias_of_the_whitening_is_trained_and_forgotten():
    photos = load("digits").limit(train=200)
    model = make_model("fast", photos, {"widths": [8, 8, 8]}, seed=1)
    fresh = create("fast", channels=1, widths=[8, 8, 8])
    before = model.whitening.weight.clone()
    assert not torch.equal(before, fresh.whitening.weight)
    fit(model, photos, Training(epochs=1, progress=False, device="cpu", precision="fp32"))
    assert torch.equal(model.whitening.weight, before) and model.whitening.bias.abs().max() > 0
    again = reinitialised(model)
    assert torch.equal(again.whitening.weight, before) and again.whitening.bias.abs().max() == 0
    torch.testing.assert_close(again.groups[1][0].weight[:8], identity(8))


def identity(channels):
    return F.pad(torch.eye(channels)[:, :, None, None], (1, 1, 1, 1))


def test_the_network_of_a_task_is_the_same_every_time():
    photos = load("digits")
    one, other = (make_model("fast", photos, {"width": 0.125}, seed=3) for _ in range(2))
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    fewer = replace(photos, train=photos.train.take(torch.arange(50)))
    assert not torch.equal(make_model("fast", fewer, {"width": 0.125}, seed=3).whitening.weight, one.whitening.weight)


@pytest.mark.parametrize(
    ("given", "channels"), [({}, (64, 128, 128)), ({"width": 0.25, "widths": (64, 256, 100)}, (16, 64, 25))]
)
def test_widths_are_scaled(given, channels):
    assert tuple(group[0].out_channels for group in create("fast", **given).groups) == channels
