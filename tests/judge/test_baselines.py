"""Control arms: as wide as what they are compared with, and knowing nothing."""

from __future__ import annotations

import torch
from torch import nn

from tests.nets import Tiny
from torchslice import models
from torchslice.cut.extract import extract
from torchslice.graph.find import find_neurons
from torchslice.judge import cost, random_like, reinitialised
from torchslice.slices import Slice


def test_random_slice_has_the_widths_of_the_slice():
    slice_ = Slice({"a": torch.arange(20) < 7, "b": torch.arange(6) < 1, "c": torch.arange(20) < 12})
    other = random_like(slice_, seed=3)
    assert [int(mask.sum()) for mask in other.masks.values()] == [7, 1, 12] and other.layers == slice_.layers
    assert other != slice_ and other == random_like(slice_, seed=3) and other != random_like(slice_, seed=4)
    assert torch.equal(other["a"] & other["c"], other["a"])  # layers of one width overlap as before


def test_random_slice_is_uniform():
    slice_ = Slice({"a": torch.arange(4) < 1})
    hits = sum(random_like(slice_, seed=seed)["a"].float() for seed in range(400))
    assert hits.sum() == 400 and hits.min() > 60 and hits.max() < 140


def test_network_of_a_random_slice_is_as_large():
    model, images = models.create("resnet20", num_classes=10, width=0.5).eval(), torch.randn(2, 3, 32, 32)
    neurons = find_neurons(model, images)
    slice_ = neurons.random(0.4, seed=1)
    sizes = [cost(extract(neurons, kept), images) for kept in (slice_, random_like(slice_))]
    assert sizes[0] == sizes[1]


def test_reinitialised_forgets_everything():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = Tiny(), nn.Parameter(torch.ones(3))

    model = Scaled().eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(7)
    new, again, other = (reinitialised(model, seed=seed) for seed in (1, 1, 2))
    assert all((tensor == 7).all() for tensor in model.state_dict().values())
    assert not any((tensor == 7).any() for tensor in new.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), again.parameters(), strict=True))
    assert not torch.equal(new.scale, other.scale) and not torch.equal(new.net.head.weight, other.net.head.weight)
