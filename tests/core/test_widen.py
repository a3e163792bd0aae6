"""Channels that are added change nothing that is computed, over all architectures."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.core.architectures import ARCHITECTURES, PreActivation, make
from torchslice.core.find import find_neurons
from torchslice.core.widen import grow, last_wire, new_places, why_fixed
from torchslice.models import create


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_wider_network_computes_the_same_until_its_new_channels_are_read(name):
    model, example = make(name)
    neurons = find_neurons(model, example)
    layers = [layer for layer in neurons.layers if why_fixed(neurons, layer) is None]
    extra = {last_wire(neurons, layer): 3 for layer in layers} | {last_wire(neurons, neurons.head[0]): 2}
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    wide = grow(model, neurons, extra, seed=0)
    with torch.no_grad():
        expected, scores = model(example), wide(example)
    assert scores.shape == (len(example), 12) and torch.allclose(scores[:, :10], expected, atol=1e-5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [type(module) for module in wide.modules()] == [type(module) for module in model.modules()]
    found = find_neurons(wide, example)  # what is new can be cut like the rest
    wider = {layer: found.layers[layer].count - neurons.layers[layer].count for layer in neurons.layers}
    assert all(wider[layer] >= 3 for layer in layers) and found.layers.keys() == neurons.layers.keys()
    with torch.no_grad():  # a class that is new reads the new channels
        for parameter in wide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        assert not torch.allclose(wide(example)[:, :10], expected, atol=1e-3)


def test_places_by_hand():
    ids, wires = np.array([0, 0, 1, 1, 2, 2]), np.array([5, 6, 5])
    places, new = new_places(ids, wires, {5: 2, 9: 1})
    assert places.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 4, 5, 4, 5, 4, 5]
    assert new.tolist() == [False, False, True, True, True, True, False, False, False, False, True, True, True, True]


def test_rows_and_columns_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.PReLU(3), nn.Flatten(), nn.Linear(12, 4), nn.ReLU())
    model.append(nn.Linear(4, 2))
    neurons = find_neurons(model.eval(), torch.randn(2, 1, 4, 4))
    wide = grow(model, neurons, {last_wire(neurons, "0"): 2, last_wire(neurons, "4"): 1}, seed=0)
    conv, norm, prelu, hidden, head = wide[0], wide[1], wide[2], wide[4], wide[6]
    assert (conv.out_channels, norm.num_features, prelu.num_parameters) == (5, 5, 5)
    assert (hidden.in_features, hidden.out_features, head.in_features, head.out_features) == (20, 5, 5, 2)
    assert torch.equal(conv.weight[:3], model[0].weight) and 0 < conv.weight[3:].abs().max() <= 1 / 3
    assert torch.equal(norm.weight[3:], torch.ones(2)) and torch.equal(norm.running_var[3:], torch.ones(2))
    assert not norm.bias[3:].any() and not norm.running_mean[3:].any()
    assert torch.equal(hidden.weight[:4, :12], model[4].weight) and not hidden.weight[:4, 12:].any()
    assert hidden.weight[4].abs().min() > 0 and hidden.weight[4].abs().max() <= 20**-0.5
    assert torch.equal(head.weight[:, :4], model[6].weight) and not head.weight[:, 4:].any()


def test_channels_in_the_middle_of_a_concatenation():
    model, example = PreActivation().eval(), torch.randn(2, 3, 8, 8)
    neurons = find_neurons(model, example)
    wide = grow(model, neurons, {last_wire(neurons, "stem"): 1}, seed=0)  # joined with conv2 before norm3
    assert wide.norm3.num_features == 21 and wide.conv1.out_channels == 13
    assert torch.equal(wide.norm3.weight[:12], model.norm3.weight[:12])
    assert torch.equal(wide.norm3.weight[13:], model.norm3.weight[12:])
    assert not wide.head.weight[:, 12].any() and torch.equal(wide.head.weight[:, 13:], model.head.weight[:, 12:])


def test_new_rows_follow_the_seed_and_no_random_number_is_used():
    model, example = create("convnet", width=0.25), torch.randn(2, 3, 8, 8)
    neurons = find_neurons(model, example)
    extra = {last_wire(neurons, layer): 1 for layer in neurons.layers}
    before = torch.random.get_rng_state()
    one, same, other = (grow(model, neurons, extra, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(tensor, same[key]) for key, tensor in one.items())
    assert not torch.equal(one["features.0.0.weight"], other["features.0.0.weight"])


def test_groups_stay_equally_wide():
    model, example = make("gated")
    neurons = find_neurons(model, example)
    reason = "'grouped' is a grouped convolution, whose groups must be equally wide"
    assert {layer: why_fixed(neurons, layer) for layer in neurons.layers} == {
        **{"a": reason, "b": reason, "grouped": reason},
        "squeeze": None,
    }
