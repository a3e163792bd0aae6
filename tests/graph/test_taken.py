"""Weights that another module takes out of a layer, free vectors, and constants at the end of a module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchslice as ts
from tests.battery.zoo import logits, unseen
from tests.graph.nets import IMAGE, Net
from tests.graph.test_heads import ROWS, by_hand, without
from torchslice.cut.extract import extract, masked
from torchslice.errors import TorchsliceError
from torchslice.graph.find import find_neurons
from torchslice.maintain.partial import Partial

TOKENS = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))


class Taking(nn.Module):
    """Attention as in BEiT: the weight of a layer that is never called, and a bias of three parts."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(5, 72, bias=False), nn.Linear(24, 4)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(24)), nn.Parameter(torch.randn(24))
        self.register_buffer("k_bias", torch.zeros(24), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, n, 5]
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, -1, 6)).permute(2, 0, 3, 1, 4)
        return self.out(by_hand(q, k, v).transpose(1, 2).flatten(2).mean(1))


def test_a_weight_that_another_module_takes() -> None:
    model, by_rows = Taking().eval(), Taking().eval()
    neurons = find_neurons(model, TOKENS)
    assert (neurons.layers["qkv"].kind, neurons.layers["qkv"].count) == ("heads", 4)
    slice_, other = without(neurons, qkv=1), torch.randn(4, 3, 5)
    small, held = extract(neurons, slice_), masked(neurons, slice_)
    kept = ROWS[:, [0, 2, 3]].flatten()
    assert torch.equal(small.qkv.weight, model.qkv.weight[kept]) and small.out.in_features == 18
    assert torch.equal(small.v_bias, model.v_bias[kept[:18]]) and small.k_bias.shape == small.q_bias.shape == (18,)
    by_rows.load_state_dict(model.state_dict())
    by_rows.qkv.weight.data[ROWS[2, 1]] = 0
    by_rows.v_bias.data[ROWS[0, 1]] = 0
    assert torch.allclose(logits(held, other), logits(by_rows, other), atol=1e-6)
    assert torch.allclose(logits(small, other), logits(by_rows, other), atol=1e-6)
    assert (logits(model, other) - logits(held, other)).abs().max() > 1e-3
    held(other).sum().backward()  # gradients reach the model's own weights, but not those that are held
    assert model.qkv.weight.grad[ROWS[2, 2]].any() and not model.qkv.weight.grad[ROWS[2, 1]].any()
    with pytest.raises(TorchsliceError, match="another module takes its weight"):
        ts.gates.attach(neurons, layers=["qkv"])


def test_free_vectors_move_with_their_neurons(tmp_path) -> None:
    neurons = find_neurons(Taking().eval(), TOKENS)
    partial = Partial(neurons, ~without(neurons, qkv=1))
    assert {rows.name: len(rows.moving) for rows in partial.rows} == {"qkv.weight": 18, "q_bias": 6, "v_bias": 6}
    assert torch.equal(logits(partial, TOKENS), logits(neurons.model, TOKENS))


class Affine(nn.Module):
    """A scale and a bias of every channel, which no layer of PyTorch has."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(12)), nn.Parameter(torch.rand(12))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale.view(-1, 1, 1) + self.shift.view(-1, 1, 1)).relu()


def test_a_vector_that_is_added_is_held_with_its_channels() -> None:
    model = Net(Affine()).eval()
    neurons = find_neurons(model, IMAGE)
    slice_ = without(neurons, a=[0, 5])
    small = extract(neurons, slice_)
    assert torch.equal(small.between.shift, model.between.shift[[1, 2, 3, 4, *range(6, 12)]])
    columns = Net(model.between).eval()
    columns.load_state_dict(model.state_dict())
    columns.b.weight.data[:, [0, 5]] = 0  # so it makes no difference what these channels are
    for network in (small, masked(neurons, slice_)):
        assert torch.allclose(logits(network, IMAGE), logits(columns, IMAGE), atol=1e-6)


class Star(nn.Module):
    """The activation function of MetaFormer: s * relu(x) ** 2 + b."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.rand(1)), nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.relu() ** 2 + self.bias


class Plus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() + 0.5


@pytest.mark.parametrize("ending", [Star, Plus])
def test_a_constant_at_the_end_of_a_module_leaves_with_the_channel(ending: type[nn.Module]) -> None:
    model = Net(ending()).eval()
    neurons = find_neurons(model, IMAGE)
    slice_ = without(neurons, a=[0, 5])
    small = extract(neurons, slice_)
    assert small.a.out_channels == 10
    model.b.weight.data[:, [0, 5]] = 0
    for network in (small, masked(neurons, slice_)):
        assert torch.allclose(logits(network, IMAGE), logits(model, IMAGE), atol=1e-6)


def test_a_constant_stays_where_its_channel_has_to() -> None:
    class Residual(Net):
        def __init__(self) -> None:
            super().__init__(Star())
            self.c, self.star = nn.Conv2d(12, 12, 3, padding=1), Star()

        def forward(self, x: Tensor) -> Tensor:
            x = self.between(self.a(x))
            return self.head(self.b(x + self.star(self.c(x))).relu().mean((2, 3)))

    model = Residual().double().eval()
    neurons = find_neurons(model, IMAGE.double())
    masks = neurons.full().masks
    masks["a"][:4], masks["c"][2:6] = False, False  # 2 and 3 in both
    slice_, other = ts.Slice(masks), torch.randn_like(IMAGE.double())
    small, held = extract(neurons, slice_), masked(neurons, slice_)
    assert small.a.out_channels == small.c.out_channels == 10
    assert (logits(small, other) - logits(held, other)).abs().max() <= 1e-12
    model.a.weight.data[:4], model.a.bias.data[:4], model.c.weight.data[2:6], model.c.bias.data[2:6] = 0, 0, 0, 0
    model.b.weight.data[:, 2:4] = model.c.weight.data[:, 2:4] = 0
    assert torch.allclose(logits(held, other), logits(model, other), atol=1e-12)


def test_a_constant_in_the_middle_of_a_module_pins() -> None:
    class Middle(Plus):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sqrt()

    neurons = find_neurons(Net(Middle()).eval(), IMAGE)
    assert list(neurons.layers) == ["b"] and "turns zero into something else" in neurons.pinned["a"]


TIMM = {"img_size": 32, "depth": 2}
SWIN = {"patch_size": [4, 4], "embed_dim": 24, "depths": [2], "num_heads": [3], "window_size": [4, 4]}
NETWORKS = [
    ("timm:beit_base_patch16_224", TIMM | {"embed_dim": 48, "num_heads": 3}, "blocks.0.attn.qkv", 3),
    ("timm:vit_tiny_patch16_dinov3_qkvb", TIMM, "blocks.0.attn.qkv", 3),
    ("timm:hgnetv2_b0", {}, "stem.stem1.conv", 16),
    ("timm:poolformerv2_s12", {}, "stages.3.blocks.0.mlp.fc1", 2048),
    ("torchvision.models:SwinTransformer", SWIN, "features.1.0.attn.qkv", 3),
]


@pytest.mark.parametrize(("name", "options", "layer", "count"), NETWORKS)
def test_networks_of_libraries(name: str, options: dict, layer: str, count: int) -> None:
    model, x = ts.models.create(name, num_classes=10, **options).double().eval(), torch.randn(2, 3, 32, 32).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    neurons = find_neurons(model, x)
    assert neurons.layers[layer].count == count
    for tied in (True, False):
        slice_, other = neurons.random(0.5, tied=tied), unseen(x)
        small, held = logits(extract(neurons, slice_), other), logits(masked(neurons, slice_), other)
        assert (small - held).abs().max() <= 1e-12 * held.abs().max() < 1e-3 * (logits(model, other) - held).abs().max()


def test_what_a_module_keeps_between_runs_is_dropped() -> None:
    """As LeViT does: its `train` drops what was computed of parameters."""

    class Keeping(Affine):
        kept: Tensor | None = None

        def train(self, mode: bool = True) -> Keeping:
            self.kept = None
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            if self.kept is None or self.kept.device != x.device:
                self.kept = self.scale.detach().view(-1, 1, 1)
            return (x * self.kept).relu()

    model = Net(Keeping()).eval()
    logits(model, IMAGE)
    neurons = find_neurons(model, IMAGE)
    slice_ = without(neurons, a=[0, 5])
    small = extract(neurons, slice_)
    assert small.a.out_channels == 10
    assert torch.allclose(logits(small, IMAGE), logits(masked(neurons, slice_), IMAGE), atol=1e-6)
