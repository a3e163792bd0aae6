"""What is found, what is pinned and why, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.core.architectures import Gated, Reused, Unknown, make
from torchslice.core.find import find_neurons
from torchslice.core.hold import masked
from torchslice.errors import TorchsliceError
from torchslice.models import create
from torchslice.slices import Slice
from torchslice.use.extract import extract

IMAGE = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    """Two convolutions and a head, with a piece of forward to try out between the convolutions."""

    def __init__(self, between, width: int = 12) -> None:
        super().__init__()
        self.between = between
        self.a, self.b, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(width, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(self.between(self.a(x)))).mean((2, 3)))


def test_layers_are_in_forward_order_with_their_counts() -> None:
    neurons = find_neurons(Net(torch.relu), IMAGE)
    assert {name: layer.count for name, layer in neurons.layers.items()} == {"a": 12, "b": 6}
    assert neurons.pinned == {"head": "class scores"}
    assert neurons.head == ("head",) and neurons.classes == 4 and len(neurons) == 18
    assert "18 neurons in 2 layers" in str(neurons) and "class scores" in str(neurons)


def test_resnet_couples_what_its_adds_join() -> None:
    neurons = find_neurons(create("torchvision:resnet18"), torch.randn(2, 3, 32, 32))
    assert neurons.layers["layer2.0.conv2"].coupled == ("layer2.0.downsample.0", "layer2.1.conv2")
    assert neurons.layers["layer2.0.conv1"].coupled == ()
    assert neurons.layers["layer2.0.conv2"].hold == "layer2.0.bn2"


def test_depthwise_convolutions_follow_their_producer() -> None:
    neurons = find_neurons(create("torchvision:mobilenet_v2"), torch.randn(2, 3, 32, 32))
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
        (nn.GroupNorm(3, 12), "group_norm in 'between' mixes the channels"),
        (lambda x: F.softmax(x, 1), "softmax mixes the channels"),
        (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), "chunk takes the channels apart at a fixed place"),
        (lambda x: x.view(2, 3, 4, 8, 8).transpose(1, 2).reshape(2, 12, 8, 8), "view takes the channels apart"),
        (lambda x: x.flip(1), "flip takes the channels apart"),
        (lambda x: x[:, torch.arange(11, -1, -1)], "read by getitem: takes several tensors"),
        (lambda x: x[:, :12] + x[:, [0] * 12], "getitem takes the channels apart"),
        (lambda x: torch.where(x > 0, x, -x), "read by gt"),
        (
            lambda x: x * torch.linspace(0, 1, 12)[:, None, None],
            "joined by mul with a value whose channels are not known",
        ),
        (lambda x: F.pad(x, (0, 0, 0, 0, 0, 0)), "works along the channels"),
        (lambda x: 1 / (x.abs() + 1), "div"),
        (lambda x: x / x.norm(dim=1, keepdim=True), "read by norm"),
        (lambda x: x.permute(0, 2, 3, 1).cumsum(-1).permute(0, 3, 1, 2), "read by cumsum"),
    ],
)
def test_what_cannot_be_exact_is_pinned_with_its_reason(between, reason: str) -> None:
    neurons = find_neurons(Net(between), IMAGE)
    assert reason in neurons.pinned["a"]
    assert list(neurons.layers) == ["b"]
    extract(neurons_model := Net(between).eval(), find_neurons(neurons_model, IMAGE).random(0.5), IMAGE)


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
    ],
)
def test_what_is_exact_is_free(between) -> None:
    model = Net(between).eval()
    neurons = find_neurons(model, IMAGE)
    assert list(neurons.layers) == ["a", "b"]
    part = neurons.random(0.5)
    with torch.no_grad(), masked(model, part, IMAGE):
        held = model(IMAGE)
    small = extract(model, part, IMAGE)
    assert small.a.out_channels == 6
    with torch.no_grad():
        assert (small(IMAGE) - held).abs().max() <= 1e-6
        assert (model(IMAGE) - held).abs().max() > 1e-3


def test_a_width_written_into_forward_is_pinned_only_where_it_is_fixed() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.fixed, self.free, self.head = (
                nn.Conv2d(3, 8, 3),
                nn.Linear(8 * 36, 16),
                nn.Linear(16, 10),
                nn.Linear(10, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x)).view(-1, 8 * 36)
            x = torch.relu(self.fixed(x))
            x = x.view(x.size(0), x.size(1))
            return self.head(torch.relu(self.free(x)))

    neurons = find_neurons(Written(), IMAGE)
    assert neurons.pinned["a"] == "view writes the width into the code"
    assert list(neurons.layers) == ["fixed", "free"]


def test_the_unknown_operation_pins_its_layer_only() -> None:
    neurons = find_neurons(Unknown(), IMAGE)
    assert list(neurons.layers) == ["stem", "last"]


def test_attention_is_pinned_and_its_mlp_is_free() -> None:
    neurons = find_neurons(
        nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), Tokens()), torch.randn(2, 5, 16)
    )
    assert list(neurons.layers) == ["0.linear1"]


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean(1))


def test_a_squeeze_layer_is_free_and_its_excitation_follows_the_stream() -> None:
    neurons = find_neurons(Gated(), IMAGE)
    assert list(neurons.layers) == ["a", "b", "grouped", "squeeze"]
    assert "sigmoid turns zero into something else" in neurons.pinned["excite"]
    model, example = make("gated")
    assert extract(model, neurons.random(0.25), example).excite.out_features < 16


def test_shared_and_computed_parameters_are_pinned() -> None:
    model = Net(torch.relu)
    model.c = nn.Conv2d(12, 12, 3, padding=1)
    model.d = nn.Conv2d(12, 12, 3, padding=1)
    model.d.weight = model.c.weight
    model.e = nn.Conv2d(12, 12, 3, padding=1)
    model.between = lambda x: F.relu(model.e(model.d(F.relu(model.c(F.relu(x))))))
    neurons = find_neurons(model, IMAGE)
    assert neurons.pinned["c"] == "shares a parameter with 'd'"
    assert "shares a parameter" in neurons.pinned["a"] and list(neurons.layers) == ["e", "b"]
    nn.utils.parametrizations.weight_norm(model.b)
    with pytest.raises(TorchsliceError, match="b: its weight is computed from other parameters"):
        find_neurons(model, IMAGE)


def test_a_convolution_without_its_own_forward_result_is_pinned() -> None:
    class Shifted(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2 + 1

    model = Net(torch.relu)
    model.a = Shifted(3, 12, 3, padding=1)
    assert find_neurons(model, IMAGE).pinned["a"] == "its class Shifted does more than its layer"


def test_a_layer_of_one_neuron_and_an_unused_layer_are_pinned() -> None:
    model = Net(lambda x: x)
    model.spare = nn.Linear(3, 3)
    model.a, model.b = nn.Conv2d(3, 1, 3), nn.Conv2d(1, 6, 3)
    neurons = find_neurons(model, IMAGE)
    assert neurons.pinned["a"] == "it has a single neuron"
    assert neurons.pinned["spare"] == "not used in the forward pass"


def test_a_write_through_a_view_pins() -> None:
    def between(x: Tensor) -> Tensor:
        part = x[:, :, :2]
        part.add_(1)
        return x

    assert "write through a view" in find_neurons(Net(between), IMAGE).pinned["a"]

    def assign(x: Tensor) -> Tensor:
        x[:, :, 0] = 1.0
        return x

    assert "setitem" in find_neurons(Net(assign), IMAGE).pinned["a"]


def test_modes_frozen_parameters_and_hooks_survive() -> None:
    model = Reused().train()
    model.norm.eval()
    for parameter in model.inner.parameters():
        parameter.requires_grad_(False)
    seen: list[int] = []
    handle = model.inner.register_forward_hook(lambda *_: seen.append(1))
    neurons = find_neurons(model, IMAGE)
    handle.remove()
    assert seen and model.training and not model.norm.training
    small = extract(model, neurons.random(0.5), IMAGE)
    assert not any(p.requires_grad for p in small.inner.parameters()) and small.back.weight.requires_grad
    assert small.training and not small.norm.training


# -- refusals ------------------------------------------------------------------------------------------------------


class Refuses(nn.Module):
    def __init__(self, forward) -> None:
        super().__init__()
        self.conv, self.head, self.does = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self, x)


def scores(self, x: Tensor) -> Tensor:
    return self.head(self.conv(x).mean((2, 3)))


def branch(self, x: Tensor) -> Tensor:
    return scores(self, x) if self.conv(x).sum() > 0 else scores(self, -x)


@pytest.mark.parametrize(
    ("model", "example", "text"),
    [
        (Refuses(branch), IMAGE, "reads a tensor's value into Python"),
        (
            Refuses(lambda self, x: scores(self, x * x.mean().item())),
            IMAGE,
            r"reads a tensor's value into Python \(item\)",
        ),
        (
            Refuses(lambda self, x: self.conv(x)),
            IMAGE,
            r"must return class scores \[B, C\].*returned a tensor \[2, 8, 6, 6\]",
        ),
        (Refuses(lambda self, x: (scores(self, x), x)), IMAGE, "it returned tuple"),
        (Refuses(scores), torch.randn(2, 5, 8, 8), r"cannot run on the example \[2, 5, 8, 8\]: 'conv' says"),
        (Refuses(scores), torch.randn(3), r"must be a batch of inputs, a tensor \[B, \.\.\.\]; got a tensor \[3\]"),
        (Refuses(scores), "cat.png", "got str"),
        (nn.DataParallel(Refuses(scores)), IMAGE, "wrapped .DataParallel.; pass model.module"),
        (torch.compile(Refuses(scores), backend="eager"), IMAGE, "wrapped .OptimizedModule.; pass model._orig_mod"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), IMAGE, "has no shape yet"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), IMAGE, "no neuron of this model can be cut .*1: class scores"),
        (lambda x: x, IMAGE, "expected an nn.Module, got function"),
    ],
)
def test_refused_with_a_reason(model, example, text: str) -> None:
    with pytest.raises(TorchsliceError, match=text):
        find_neurons(model, example)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_parts_are_refused() -> None:
    doubled = torch.jit.trace(lambda x: x * 2, IMAGE)
    with pytest.raises(TorchsliceError, match="no visible torch function made"):
        find_neurons(Refuses(lambda self, x: scores(self, doubled(x))), IMAGE)
    with pytest.raises(TorchsliceError, match="ScriptModule"):
        find_neurons(torch.jit.trace(Net(torch.relu).eval(), IMAGE), IMAGE)


def test_custom_autograd_functions_are_followed() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x * 2

    assert list(find_neurons(Net(Doubled.apply), IMAGE).layers) == ["a", "b"]


def test_nothing_is_left_behind_after_an_exception() -> None:
    model = Net(torch.relu).train()
    part = find_neurons(model, IMAGE).random(0.5)
    with pytest.raises(RuntimeError, match="stop"), masked(model, part, IMAGE):
        raise RuntimeError("stop")
    with pytest.raises(TorchsliceError):
        find_neurons(model, torch.randn(2, 4, 8, 8))
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_bad_slices_and_classes() -> None:
    model = Net(torch.relu)
    neurons = find_neurons(model, IMAGE)
    other = find_neurons(Unknown(), IMAGE)
    for part, text in [
        (other.full(), "slice of another model: layer 'a' has no neurons in the slice and 12 in the model"),
        (neurons.none(), "the slice is empty; every layer needs at least one neuron"),
        (
            Slice({"a": torch.zeros(12, dtype=torch.bool), "b": torch.ones(6, dtype=torch.bool)}),
            "keeps no neuron of layer 'a'",
        ),
    ]:
        with pytest.raises(TorchsliceError, match=text):
            extract(model, part, IMAGE)
        with pytest.raises(TorchsliceError, match=text), masked(model, part, IMAGE):
            pass
    for classes, text in [
        ([1], "at least two classes"),
        ([0, 0], "different indices"),
        ([0, 9], r"0\.\.3"),
    ]:
        with pytest.raises(TorchsliceError, match=text):
            extract(model, neurons.full(), IMAGE, classes=classes)
    with pytest.raises(TorchsliceError, match="do not come straight from a layer"):
        extract(
            nn.Sequential(Net(torch.relu), nn.LogSoftmax(1)),
            find_neurons(nn.Sequential(Net(torch.relu), nn.LogSoftmax(1)), IMAGE).full(),
            IMAGE,
            classes=[0, 1],
        )
    for share in (0, 1.5):
        with pytest.raises(TorchsliceError, match=r"share must be in \(0, 1\]"):
            neurons.random(share)


def test_scores_that_are_not_finite_are_not_called_equal() -> None:
    model = Net(torch.relu)
    part = find_neurons(model, IMAGE).random(0.5)
    nn.init.constant_(model.head.bias, torch.nan)
    with pytest.raises(TorchsliceError, match="differs from the masked one by nan"):
        extract(model, part, IMAGE)
