"""Networks run in the memory format that suits them, everywhere."""

from __future__ import annotations

import torch
from tests.training.tiny import tiny_data, tiny_net
from torch import nn

from torchslice.training import fit
from torchslice.training.placement import fast_format
from torchslice.use.evaluate import predict_logits
from torchslice.use.finetune import finetune
from torchslice.use.recalibrate import recalibrate

QUIET = {"device": "cpu", "progress": False}


class Viewed(nn.Module):
    """It flattens with `view`, which channels_last memory does not allow."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, images):
        return self.head(self.features(images).view(len(images), -1))


def test_a_network_that_flattens_with_view_goes_all_the_way():
    data, model = tiny_data(), Viewed()
    rows = fit(model, data, epochs=3, batch_size=8, **QUIET)
    assert rows[-1]["loss"] < rows[0]["loss"]
    model = finetune(model, data, epochs=1, batch_size=8, **QUIET).model
    images = data.normalise(data.train.images)
    model = recalibrate(model, images)
    logits = predict_logits(model, data, split="train")
    with torch.no_grad():
        assert (logits - model(images)).abs().max() < 1e-5


def test_the_format_is_channels_last_where_the_network_runs_in_it():
    data = tiny_data()
    images = data.example.expand(2, 3, 6, 6).contiguous()
    assert fast_format(nn.Conv2d(3, 4, 3), images) == torch.channels_last
    assert fast_format(Viewed(), data.example) == torch.contiguous_format
    assert fast_format(nn.Linear(6, 2), torch.zeros(2, 6)) == torch.contiguous_format
    seen = []
    model = tiny_net()
    model[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].stride()))
    predict_logits(model, data)
    assert set(seen) == {(36, 1, 6, 1)}
