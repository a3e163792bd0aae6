"""Activations are read after norm and activation function, wherever those are written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.battery.zoo import NETWORKS, Reused, logits, prepared
from torchslice.graph.activations import find_activations, reading
from torchslice.graph.find import find_neurons

IMAGE = torch.randn(2, 3, 8, 8)


class Overwritten(nn.Module):
    """What a hook on any of these layers keeps is overwritten later."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.b, self.head = nn.Conv2d(6, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)), inplace=True)
        y = F.relu_(self.b(x))
        y += x
        y *= 2
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_sliceable_layer_is_read(name: str) -> None:
    neurons = prepared(name)
    where = find_activations(neurons)
    assert list(where.chains) == list(neurons.layers)
    expected = logits(neurons.model, neurons.example)
    with reading(neurons.model, where) as seen:
        assert torch.equal(logits(neurons.model, neurons.example), expected)
    for layer, values in seen.values.items():
        for value in values:
            assert value.shape[where.axis[layer]] == len(neurons.rows[layer])
    assert seen.values.keys() == neurons.layers.keys()


def test_chains_end_after_the_activation() -> None:
    resnet = find_activations(prepared("resnet18"), layers=["layer1.0.conv1", "layer1.0.conv2"]).chains
    assert resnet["layer1.0.conv1"] == ("conv2d", "batch_norm", "relu")
    assert resnet["layer1.0.conv2"] == ("conv2d", "batch_norm")  # the add comes next
    assert len(resnet) == 2
    assert find_activations(prepared("mlp")).chains == {"first": ("linear", "gelu"), "second": ("linear", "relu")}


def test_values_and_gradients_are_those_before_anything_is_overwritten() -> None:
    model = Overwritten().eval()
    where = find_activations(find_neurons(model, IMAGE))
    assert where.chains["b"] == ("conv2d", "relu") and where.copied == {"b"}
    with reading(model, where) as seen:
        scores = model(IMAGE)
    gradients = torch.autograd.grad(scores.sum(), [seen.values["a"][0], seen.values["b"][0]])
    a = F.relu(model.norm(model.a(IMAGE)))
    b = F.relu(model.b(a))
    assert torch.equal(seen.values["a"][0], a) and torch.equal(seen.values["b"][0], b)
    of_b = (2 * model.head.weight.sum(0) / 64)[None, :, None, None].expand(2, -1, 8, 8)
    of_a = of_b + F.conv_transpose2d(of_b * (b > 0), model.b.weight)
    assert torch.allclose(gradients[1], of_b, atol=1e-6) and torch.allclose(gradients[0], of_a, atol=1e-6)


def test_every_use_of_a_layer_is_read() -> None:
    model = Reused().eval()
    with torch.no_grad(), reading(model, find_activations(find_neurons(model, IMAGE))) as seen:
        model(IMAGE)
        assert [len(seen.values[name]) for name in ("stem", "inner", "back")] == [1, 2, 2]
        first = model.norm(model.inner(seen.values["stem"][0])).relu()
    assert torch.equal(seen.values["inner"][0], first)


def test_nothing_stays_on_the_model_after_an_exception() -> None:
    neurons = prepared("mlp")
    with pytest.raises(RuntimeError), reading(neurons.model, find_activations(neurons)):
        neurons.model(torch.randn(2, 5))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in neurons.model.modules())
