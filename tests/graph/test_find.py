"""What is found, and what is pinned and why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.battery.zoo import Gated, Reused, Unknown, prepared
from tests.graph.nets import IMAGE, Net
from torchslice.cut.extract import extract, masked
from torchslice.errors import TorchsliceError
from torchslice.graph.find import find_neurons


def test_layers_are_in_forward_order_with_their_counts() -> None:
    neurons = find_neurons(Net(), IMAGE)
    assert {name: layer.count for name, layer in neurons.layers.items()} == {"a": 12, "b": 6}
    assert [(layer.kind, layer.axis) for layer in neurons.layers.values()] == [("conv", 1), ("conv", 1)]
    assert list(neurons.pinned) == ["head"] and neurons.head == ("head",)
    assert neurons.num_classes == 4 and len(neurons) == 18
    hidden = prepared("mlp").layers["first"]
    assert (hidden.kind, hidden.axis, hidden.mask_after) == ("linear", -1, "first")


def test_resnet_couples_what_its_adds_join() -> None:
    layers = prepared("resnet18").layers
    assert layers["layer2.0.conv2"].coupled == ("layer2.0.downsample.0", "layer2.1.conv2")
    assert layers["layer2.0.conv1"].coupled == ()
    assert layers["layer2.0.conv2"].mask_after == "layer2.0.bn2"


def test_depthwise_convolutions_follow_their_producer() -> None:
    neurons = prepared("mobilenet_v2")
    assert neurons.followers["features.2.conv.1.0"] == ("features.2.conv.0.0",)
    assert neurons.layers["features.2.conv.0.0"].followers == ("features.2.conv.1.1",)
    assert "features.2.conv.1.0" not in neurons.layers


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda x: torch.sort(x, dim=1).values, "read by sort: a function torchslice does not know"),
        (torch.sigmoid, "sigmoid turns zero into something else"),
        (lambda x: x + 1, "add turns zero into something else"),
        (lambda x: F.hardtanh(x, 0.5, 1.0), "hardtanh turns zero into something else"),
        (nn.GroupNorm(1, 12), "read by group_norm in 'between': it mixes the channels"),
        (lambda x: F.softmax(x, 1), "softmax mixes the channels"),
        (lambda x: x.view(2, 3, 4, 8, 8).transpose(1, 2).reshape(2, 12, 8, 8), "view writes the width into the code"),
        (lambda x: x.roll(3, 1), "roll writes the width into the code"),
        (lambda x: x.roll(x.shape[1] // 2, 1), "roll writes the width into the code"),
        (lambda x: torch.cat(x.split([5 * x.shape[1] // 12, x.shape[1] - 5 * x.shape[1] // 12], 1)[::-1], 1), "split"),
        (lambda x: torch.cat([x[:, 5:], x[:, :5]], 1), "getitem writes the width into the code"),
        (lambda x: x[:, torch.arange(11, -1, -1)], "getitem writes the width into the code"),
        (lambda x: x[:, :12] + x[:, [0] * 12], "add spreads it over other channels"),
        (lambda x: torch.where(x > 0, x, -x), "read by gt"),
        (lambda x: x * torch.linspace(0, 1, 12)[:, None, None], "joined by mul with a value whose channels are not"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 0, 0)), "works along the channels"),
        (lambda x: 1 / (x.abs() + 1), "div"),
        (lambda x: x / x.norm(dim=1, keepdim=True), "read by norm"),
        (lambda x: x.permute(0, 2, 3, 1).cumsum(-1).permute(0, 3, 1, 2), "read by cumsum"),
    ],
)
def test_what_cannot_be_exact_is_pinned_with_its_reason(between, reason: str) -> None:
    neurons = find_neurons(Net(between).eval(), IMAGE)
    assert reason in neurons.pinned["a"] and list(neurons.layers) == ["b"]
    extract(neurons, neurons.random(0.5))


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2),
        lambda x: x[:, :, ::2, 1:],
        lambda x: F.pad(x, (1, 1, 1, 1)),
        lambda x: F.interpolate(x.clamp(-1, 1), scale_factor=2, mode="bilinear"),
        lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
        lambda x: x * torch.sigmoid(x),
        lambda x: (x.pow(2) * 3 / 2 - x).unsqueeze(0).squeeze(0),
        lambda x: torch.maximum(x, -x).flatten(2).unflatten(2, (8, 8)),
        lambda x: x.clone().to(torch.float32),
        lambda x: x.reshape(x.shape[0], x.shape[1], -1).view(x.shape[0], x.shape[1], 8, 8),
        lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
        lambda x: torch.cat([x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1),
        lambda x: x.flip(1),
        lambda x: torch.addcmul(x, x, x, value=2),
        lambda x: torch.stack([x, 2 * x]).sum(0),
    ],
)
def test_what_is_exact_is_free(between) -> None:
    model = Net(between).eval()
    neurons = find_neurons(model, IMAGE)
    assert list(neurons.layers) == ["a", "b"]
    slice_ = neurons.random(0.5)
    small = extract(neurons, slice_)
    assert 6 <= small.a.out_channels < 12  # halves are evened out
    with torch.no_grad():
        held = masked(neurons, slice_)(IMAGE)
        assert (small(IMAGE) - held).abs().max() <= 1e-6
        assert (model(IMAGE) - held).abs().max() > 1e-3


def test_a_width_written_into_forward_is_pinned_only_where_it_is_fixed() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.fixed = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 16)
            self.free, self.head = nn.Linear(16, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x)).view(-1, 8 * 36)
            x = torch.relu(self.fixed(x))
            x = x.view(x.size(0), x.size(1))
            return self.head(torch.relu(self.free(x)))

    neurons = find_neurons(Written(), IMAGE)
    assert neurons.pinned["a"] == "view writes the width into the code"
    assert list(neurons.layers) == ["fixed", "free"]


def test_the_unknown_operation_pins_its_layer_only() -> None:
    assert list(find_neurons(Unknown(), IMAGE).layers) == ["stem", "last"]


def test_attention_is_pinned_and_its_mlp_is_free() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(x).mean(1))

    assert list(find_neurons(Tokens(), torch.randn(2, 5, 16)).layers) == ["block.linear1"]


def test_a_squeeze_layer_is_free_and_its_excitation_follows_the_stream() -> None:
    neurons = find_neurons(Gated(), IMAGE)
    assert list(neurons.layers) == ["a", "b", "grouped", "squeeze"]
    assert neurons.followers["excite"] == ("grouped",)
    gated = prepared("gated")
    assert extract(gated, gated.random(0.25)).excite.out_features < 16


def test_shared_and_computed_parameters_are_pinned() -> None:
    class Shared(Net):
        def __init__(self) -> None:
            super().__init__(self.three)
            self.c, self.d, self.e = (nn.Conv2d(12, 12, 3, padding=1) for _ in range(3))
            self.d.weight = self.c.weight

        def three(self, x: Tensor) -> Tensor:
            return F.relu(self.e(self.d(F.relu(self.c(F.relu(x))))))

    model = Shared()
    neurons = find_neurons(model, IMAGE)
    assert neurons.pinned["c"] == "shares a parameter with 'd'"
    assert "shares a parameter" in neurons.pinned["a"] and list(neurons.layers) == ["e", "b"]
    nn.utils.parametrizations.weight_norm(model.b)
    with pytest.raises(TorchsliceError, match="b: its weight is computed from other parameters"):
        find_neurons(model, IMAGE)


def test_a_layer_that_is_called_behind_the_models_back_is_pinned() -> None:
    model, outside = Net(), nn.Conv2d(12, 12, 1)
    model.inside = outside
    model.between = lambda x: torch.relu(outside(x))  # a closure, which a copy of the model does not know
    neurons = find_neurons(model, IMAGE)
    assert list(neurons.layers) == ["b"] and "inside" in neurons.pinned


def test_a_convolution_without_its_own_forward_result_is_pinned() -> None:
    class Shifted(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2 + 1

    model = Net()
    model.a = Shifted(3, 12, 3, padding=1)
    assert find_neurons(model, IMAGE).pinned["a"] == "its class Shifted does more than its layer"


def test_a_layer_of_one_neuron_and_an_unused_layer_are_pinned() -> None:
    model = Net(lambda x: x)
    model.spare = nn.Linear(3, 3)
    model.a, model.b = nn.Conv2d(3, 1, 3), nn.Conv2d(1, 6, 3)
    neurons = find_neurons(model, IMAGE)
    assert neurons.pinned["a"] == "it has a single neuron"
    assert neurons.pinned["spare"] == "not used in the forward pass"


def test_a_layer_of_which_code_takes_a_part_is_pinned_and_the_rest_is_cut() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.hidden, self.logits = nn.Linear(4, 8), nn.Linear(6, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.logits(self.hidden(self.wide(x)[:, 2:].relu()).relu())

    neurons = find_neurons(Part(), torch.randn(2, 4))
    assert neurons.pinned["wide"] == "some of its outputs are not used" and list(neurons.layers) == ["hidden"]
    small = extract(neurons, neurons.random(0.5))
    assert [layer.out_features for layer in small.children()] == [8, 5, 3]


def test_writes_in_place_pin() -> None:
    def through_a_view(x: Tensor) -> Tensor:
        part = x[:, :, :2]
        part.add_(1)
        return x

    def assign(x: Tensor) -> Tensor:
        x[:, :, 0] = 1.0
        return x

    assert "write through a view" in find_neurons(Net(through_a_view), IMAGE).pinned["a"]
    assert "setitem" in find_neurons(Net(assign), IMAGE).pinned["a"]


def test_custom_autograd_functions_are_followed() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x * 2

    assert list(find_neurons(Net(Doubled.apply), IMAGE).layers) == ["a", "b"]


def test_modes_frozen_parameters_and_hooks_survive() -> None:
    model = Reused().train()
    model.norm.eval()
    for parameter in model.inner.parameters():
        parameter.requires_grad_(False)
    seen: list[int] = []
    handle = model.inner.register_forward_hook(lambda *_: seen.append(1))
    neurons = find_neurons(model, IMAGE)
    assert seen and len(model.inner._forward_hooks) == 1
    handle.remove()
    assert model.training and not model.norm.training
    small = extract(neurons, neurons.random(0.5))
    assert not any(p.requires_grad for p in small.inner.parameters()) and small.back.weight.requires_grad
    assert small.training and not small.norm.training
