"""Neurons of several rows: attention heads, groups, halves; by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.battery.zoo import Heads, copied, logits, prepared
from tests.graph.nets import IMAGE, Net
from torchslice.cut.extract import extract, masked
from torchslice.graph.find import find_neurons
from torchslice.graph.plan import plan
from torchslice.maintain.partial import moving_rows
from torchslice.slices import Slice

ROWS = torch.arange(72).view(3, 4, 6)  # queries, keys and values; heads; dimensions


def without(neurons, **gone: int) -> Slice:
    masks = neurons.full().masks
    for layer, neuron in gone.items():
        masks[layer][neuron] = False
    return Slice(masks)


def test_the_rows_of_a_head_by_hand() -> None:
    neurons = prepared("heads")
    assert (neurons.layers["qkv"].kind, neurons.layers["qkv"].count) == ("heads", 4)
    assert neurons.rows["qkv"].tolist() == [-1] * 48 + [head for head in range(4) for _ in range(6)]
    assert torch.equal(neurons.places("qkv"), ROWS[2])
    model, small = neurons.model, extract(neurons, without(neurons, qkv=1))
    kept = ROWS[:, [0, 2, 3]].flatten()
    assert torch.equal(small.qkv.weight, model.qkv.weight[kept]) and torch.equal(small.qkv.bias, model.qkv.bias[kept])
    assert torch.equal(small.proj.weight, model.proj.weight[:, ROWS[0, [0, 2, 3]].flatten()])
    assert torch.equal(small.table, model.table[:, [0, 2, 3]])
    assert (small.num_heads, small.width, model.num_heads, model.width) == (3, 18, 4, 24)
    assert torch.equal(small.norm.weight, model.norm.weight)


def test_a_masked_head_is_a_head_whose_values_are_zero() -> None:
    neurons, changed = prepared("heads"), copied("heads")
    changed.model.qkv.weight.data[ROWS[2, 1]] = 0
    changed.model.qkv.bias.data[ROWS[2, 1]] = 0
    slice_ = without(neurons, qkv=1)
    assert torch.allclose(logits(masked(neurons, slice_), neurons.example), logits(changed.model, neurons.example))
    assert plan(neurons, slice_).held["qkv"].nonzero()[0].tolist() == ROWS[:, 1].flatten().tolist()


def test_the_rows_that_move_with_a_head() -> None:
    neurons = prepared("heads")
    assert moving_rows(neurons, ~without(neurons, qkv=2))["qkv"].tolist() == ROWS[:, 2].flatten().tolist()
    bert = prepared("bert")
    value = next(iter(bert.layers))
    moved = moving_rows(bert, ~without(bert, **{value: 3}))
    found = {name.rpartition(".")[2]: rows.tolist() for name, rows in moved.items()}
    assert found == {layer: list(range(18, 24)) for layer in ("query", "key", "value")}


class Attention(nn.Module):
    """Linear layers for queries, keys and values, and any function that joins them."""

    def __init__(self, attend, heads: int = 4, key_heads: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(5, 24), nn.Linear(5, 6 * key_heads), nn.Linear(5, 6 * key_heads)
        self.out, self.attend = nn.Linear(24, 4), attend

    def forward(self, x: Tensor) -> Tensor:  # [B, n, 5]
        q, k, v = (layer(x).unflatten(-1, (-1, 6)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2).mean(1))


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def by_letters(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("b h i d, b h j d -> b h i j", q, k).softmax(-1)
    return torch.einsum("bhij,bhjd->bihd", weights, v).transpose(1, 2)


def across_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention of XCiT, between dimensions."""
    return (F.normalize(q, dim=-2).mT @ k).softmax(-1) @ v.mT


@pytest.mark.parametrize(
    ("attend", "key_heads"),
    [
        (by_hand, 4),
        (F.scaled_dot_product_attention, 4),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), 4),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.eye(3)), 4),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), 2),
        (lambda q, k, v: by_hand(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)), 2),
        (lambda q, k, v: by_hand(F.layer_norm(q, (6,)), F.rms_norm(k, (6,)), v), 4),
        (lambda q, k, v: by_hand(q, torch.cat([-k[..., 3:], k[..., :3]], -1) * torch.arange(6.0), v), 4),
        (lambda q, k, v: across_tokens(q, k, v).mT, 4),
        (by_letters, 4),
    ],
)
def test_every_way_to_attend(attend, key_heads: int) -> None:
    model, x = Attention(attend, key_heads=key_heads).double().eval(), torch.randn(2, 3, 5).double()
    attend_mask = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        neurons = find_neurons(model, x)
        assert {name: layer.count for name, layer in neurons.layers.items()} == {"v": key_heads}
        assert neurons.followers == {"q": ("v",), "k": ("v",)}
        slice_, other = neurons.random(0.5), torch.randn(4, 3, 5).double()
        small, held = extract(neurons, slice_), masked(neurons, slice_)
        assert [layer.out_features for layer in (small.q, small.k, small.v)] == [12, 3 * key_heads, 3 * key_heads]
        assert (logits(small, other) - logits(held, other)).abs().max() <= 1e-12
        assert (logits(model, other) - logits(held, other)).abs().max() > 1e-3
    finally:
        torch.set_default_dtype(attend_mask)


def test_one_head_loses_its_dimensions_one_by_one() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(5, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out((self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)).mean(1)

    neurons = find_neurons(Single(), torch.randn(2, 3, 5))
    assert {name: layer.count for name, layer in neurons.layers.items()} == {"q": 8, "k": 8, "v": 6}
    assert neurons.layers["q"].coupled == ("k",)
    extract(neurons, neurons.random(0.5))


def test_heads_whose_width_is_in_the_code_become_rows_of_zeros() -> None:
    class Fixed(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (-1, 6)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return self.out(by_hand(q, k, v).transpose(1, 2).reshape(*x.shape[:2], 24).mean(1))

    model, x = Fixed(by_hand).eval(), torch.randn(2, 3, 5)
    neurons = find_neurons(model, x)
    assert neurons.layers["v"].stays == "reshape writes the width into the code" in str(neurons)
    small = extract(neurons, without(neurons, v=1))
    assert small.v.out_features == 24 and not small.v.weight[6:12].any() and small.v.weight[12:].all()


def test_groups_and_halves() -> None:
    groups = find_neurons(Net(nn.Sequential(nn.GroupNorm(3, 12), nn.ReLU())).eval(), IMAGE)
    assert groups.layers["a"].count == 3 and groups.layers["a"].mask_after == "between.0"
    small = extract(groups, without(groups, a=1))
    assert (small.between[0].num_groups, small.between[0].num_channels, small.a.out_channels) == (2, 8, 8)
    halves = find_neurons(Net(lambda x: torch.cat([x[:, :6].relu(), x[:, 6:].tanh()], 1)).eval(), IMAGE)
    assert "getitem writes the width" in halves.pinned["a"]

    class Gated(Net):
        def forward(self, x: Tensor) -> Tensor:
            one, other = self.a(x).split(self.part, 1)
            return self.head(self.b(torch.cat([one, other.relu()], 1)).mean((2, 3)))

    model = Gated()
    model.part = [5, 7]
    assert "split writes the width" in find_neurons(model, IMAGE).pinned["a"]
    model.part = (5, 7)  # known by its origin
    neurons = find_neurons(model.eval(), IMAGE)
    small = extract(neurons, without(neurons, a=[0, 8, 9]))
    assert small.part == (4, 5) and model.part == (5, 7)


def test_a_part_of_an_attribute_is_known() -> None:
    class Halves(Net):
        def forward(self, x: Tensor) -> Tensor:
            one, other = self.a(x).split(self.width // 2, 1)
            return self.head(self.b(torch.cat([one, other.relu()], 1)).mean((2, 3)))

    model = Halves().eval()
    model.width = 12
    neurons = find_neurons(model, IMAGE)
    small = extract(neurons, without(neurons, a=[0, 1, 8]))
    assert (small.a.out_channels, small.width, model.width) == (10, 10, 12)
    model.width = 13  # its half, 6, is no part of it
    assert "split writes the width" in find_neurons(model, IMAGE).pinned["a"]


def test_an_attribute_that_says_two_things_is_left_alone() -> None:
    class Twice(Heads):
        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            return super().forward(tokens, mask.reshape(-1, 1, 1).expand(-1, 1, self.num_heads)[:, 0, 0].view(-1, 5))

    model = Twice()
    neurons = find_neurons(model, prepared("heads").example)
    assert neurons.layers["qkv"].count == 4
    extract(neurons, neurons.random(0.5))


def test_a_copy_of_the_neurons_serves_a_trained_copy() -> None:
    neurons = prepared("llama")
    moved = neurons.on(copy.deepcopy(neurons.model))
    assert extract(moved, moved.random(0.5)).config is not None


def test_a_single_head_that_divides_by_the_root_of_its_width_keeps_it() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(5, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))).mean(1)

    neurons, other = find_neurons(Single(), torch.randn(2, 3, 5)), torch.randn(2, 3, 5)
    assert "divides by the root of their number" in neurons.layers["q"].stays and not neurons.layers["v"].stays
    slice_ = neurons.random(0.5)
    small = extract(neurons, slice_)
    assert (small.q.out_features, small.v.out_features) == (8, 3)
    assert torch.allclose(logits(small, other), logits(masked(neurons, slice_), other), atol=1e-6)


def test_a_factor_that_follows_from_a_width_pins_it() -> None:
    neurons = find_neurons(Net(lambda x: x.relu() * x.shape[1] ** -0.5).eval(), IMAGE)
    assert "mul writes the width into the code" in neurons.pinned["a"] and neurons.layers["b"].count == 6
