"""Widening by hand: which rows and columns are new and what is in them; and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.battery.zoo import PreActivation, Reused, prepared
from tests.nets import Tiny, lively
from torchslice.cut.extract import extract
from torchslice.cut.widen import grow, last_wire, new_places, why_fixed, widen
from torchslice.errors import TorchsliceError
from torchslice.graph.find import find_neurons
from torchslice.models import create
from torchslice.slices import Slice

IMAGES = torch.linspace(-1, 1, 2 * 8 * 8).reshape(2, 1, 8, 8)
SLICE = Slice({"conv1": torch.arange(8) < 5, "conv2": torch.arange(6) % 2 == 0})


def test_a_slice_is_found_again_and_computes_the_same_bits() -> None:
    neurons = find_neurons(lively(Tiny()), IMAGES, classes=["red", "green", "blue"])
    wide = widen(neurons, factor=1.3)
    assert wide.fresh.layers == {"conv1": 10, "conv2": 8} and not wide.fixed
    assert wide.fresh["conv1"].tolist() == [False] * 8 + [True] * 2
    assert wide.neurons.classes == neurons.classes and wide.model is wide.neurons.model
    lifted = wide.lift(SLICE)
    assert lifted["conv2"].tolist() == [True, False, True, False, True, False, False, False]
    assert not lifted & wide.fresh and len(lifted) == len(SLICE)
    one, other = extract(neurons, SLICE), extract(wide.neurons, lifted)
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    assert torch.equal(one(IMAGES), other(IMAGES))


def test_named_layers_only() -> None:
    wide = widen(find_neurons(lively(Tiny()), IMAGES), counts={"conv2": 4})
    assert wide.fresh.layers == {"conv1": 8, "conv2": 10} and len(wide.fresh) == 4
    coupled = widen(prepared("reused"), counts={"back": 2})  # the stem feeds the same stream
    assert coupled.fresh.layers["stem"] == 14 and coupled.fresh["stem"].sum() == 2


def test_places_by_hand() -> None:
    ids, wires = np.array([0, 0, 1, 1, 2, 2]), np.array([5, 6, 5])
    places, new = new_places(ids, wires, {5: 2, 9: 1})
    assert places.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 4, 5, 4, 5, 4, 5]
    assert new.tolist() == [False, False, True, True, True, True, False, False, False, False, True, True, True, True]


def test_rows_and_columns_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.PReLU(3), nn.Flatten(), nn.Linear(12, 4), nn.ReLU())
    model.append(nn.Linear(4, 2))
    neurons = find_neurons(model.eval(), torch.randn(2, 1, 4, 4))
    wide = grow(neurons, {last_wire(neurons, "0"): 2, last_wire(neurons, "4"): 1}, seed=0)
    conv, norm, prelu, hidden, head = wide[0], wide[1], wide[2], wide[4], wide[6]
    assert (conv.out_channels, norm.num_features, prelu.num_parameters) == (5, 5, 5)
    assert (hidden.in_features, hidden.out_features, head.in_features, head.out_features) == (20, 5, 5, 2)
    assert torch.equal(conv.weight[:3], model[0].weight) and 0 < conv.weight[3:].abs().max() <= 1 / 3
    assert torch.equal(norm.weight[3:], torch.ones(2)) and torch.equal(norm.running_var[3:], torch.ones(2))
    assert not norm.bias[3:].any() and not norm.running_mean[3:].any()
    assert torch.equal(hidden.weight[:4, :12], model[4].weight) and not hidden.weight[:4, 12:].any()
    assert hidden.weight[4].abs().min() > 0 and hidden.weight[4].abs().max() <= 20**-0.5
    assert torch.equal(head.weight[:, :4], model[6].weight) and not head.weight[:, 4:].any()


def test_channels_in_the_middle_of_a_concatenation() -> None:
    model = PreActivation().eval()
    neurons = find_neurons(model, torch.randn(2, 3, 8, 8))
    wide = grow(neurons, {last_wire(neurons, "stem"): 1}, seed=0)  # joined with conv2 before norm3
    assert wide.norm3.num_features == 21 and wide.conv1.out_channels == 13
    assert torch.equal(wide.norm3.weight[:12], model.norm3.weight[:12])
    assert torch.equal(wide.norm3.weight[13:], model.norm3.weight[12:])
    assert not wide.head.weight[:, 12].any() and torch.equal(wide.head.weight[:, 13:], model.head.weight[:, 12:])


def test_new_rows_follow_the_seed_and_no_random_number_is_used() -> None:
    neurons = find_neurons(create("convnet", width=0.25).eval(), torch.randn(2, 3, 8, 8))
    before = torch.random.get_rng_state()
    one, same, other = (widen(neurons, factor=1.2, seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(tensor, same[key]) for key, tensor in one.items())
    assert not torch.equal(one["features.0.0.weight"], other["features.0.0.weight"])


def test_grouped_convolutions_keep_their_width() -> None:
    neurons = prepared("gated")
    reason = "'grouped' is a grouped convolution, whose groups must be equally wide"
    why = {layer: why_fixed(neurons, layer) for layer in neurons.layers}
    assert why == {"a": reason, "b": reason, "grouped": reason, "squeeze": None}
    wide = widen(neurons, factor=1.5)
    assert wide.fixed == {"a": reason, "b": reason, "grouped": reason}
    assert wide.fresh.layers == {"a": 12, "b": 12, "grouped": 16, "squeeze": 9}
    with pytest.raises(TorchsliceError, match="layer 'a' cannot be widened: 'grouped' is a grouped convolution"):
        widen(neurons, counts={"a": 1})
    only = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(TorchsliceError, match="no layer of this network can be widened; '0': '1' is a grouped"):
        widen(find_neurons(only, torch.randn(2, 2, 1, 1)), factor=2)


class Written(Tiny):
    """Its forward knows how many channels there are, though no reshape shows it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if self.conv1.out_channels == 8 else 2.0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "give either factor=, such as 1.25, or counts="),
        ({"factor": 2, "counts": {"conv1": 1}}, "give either factor=, such as 1.25, or counts="),
        ({"factor": 1}, r"factor must be above 1 \(and below 100\), got 1"),
        ({"factor": float("nan")}, r"factor must be above 1 \(and below 100\), got nan"),
        ({"counts": {"conv3": 1}}, "unknown layer 'conv3'. Did you mean"),
        ({"counts": {"conv1": 0}}, "layer 'conv1' must get at least 1 neuron, got 0"),
    ],
)
def test_bad_settings(options, text: str) -> None:
    with pytest.raises(TorchsliceError, match=text):
        widen(find_neurons(lively(Tiny()), IMAGES), **options)


def test_a_forward_that_depends_on_a_width_is_found_out() -> None:
    with pytest.raises(TorchsliceError, match="the widened network differs from what it must compute by"):
        widen(find_neurons(lively(Written()), IMAGES), factor=1.5)


def test_coupled_layers_get_the_same_channels() -> None:
    neurons = find_neurons(Reused().eval(), torch.randn(2, 3, 8, 8))
    wide = widen(neurons, factor=1.5)
    assert wide.fresh.layers == {"stem": 18, "inner": 30, "back": 18}
