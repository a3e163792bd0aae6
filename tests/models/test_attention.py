"""Attention of plain layers computes what nn.MultiheadAttention computes, and its heads can be cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchslice as ts
from torchslice import TorchsliceError
from torchslice.graph.record import evaluating
from torchslice.imports import import_torchvision
from torchslice.models import load_weights, with_plain_attention

CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
MASKS: list[dict[str, Any]] = [
    {},
    {"need_weights": False},
    {"average_attn_weights": False},
    {"attn_mask": CAUSAL, "need_weights": False, "is_causal": True},
    {
        "attn_mask": torch.randn(5, 5).double(),
        "key_padding_mask": torch.zeros(2, 5).double().masked_fill(PADDING, -torch.inf),
    },
    {"key_padding_mask": PADDING, "need_weights": False},
]


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("made", [{"batch_first": True}, {}, {"kdim": 6, "vdim": 10}, {"bias": False}])
def test_it_computes_what_the_class_computes(made: dict[str, Any], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(12, 3, **made).double()
    nn.init.normal_(whole.out_proj.bias) if whole.out_proj.bias is not None else None
    keys = torch.randn(2, 5, whole.kdim).double()
    values = torch.randn(2, 5, whole.vdim).double()
    inputs = [torch.randn(2, 5, 12).double(), keys, keys if whole.kdim == whole.vdim else values]
    inputs = inputs if whole.batch_first else [x.transpose(0, 1) for x in inputs]
    plain = with_plain_attention(nn.Sequential(whole))[0]
    with torch.no_grad():
        expected, weights = whole(*inputs, **options)
        actual, own = plain(*inputs, **options)
    assert torch.allclose(actual, expected, rtol=0, atol=1e-12)
    assert (own is None) == (weights is None) and (own is None or torch.allclose(own, weights, rtol=0, atol=1e-12))
    other = with_plain_attention(nn.Sequential(nn.MultiheadAttention(12, 3, **made).double()))[0]
    other.load_state_dict(whole.state_dict())
    assert torch.equal(other(*inputs)[0], plain(*inputs)[0])


def test_without_a_batch_and_what_it_refuses() -> None:
    whole, tokens = nn.MultiheadAttention(12, 3), torch.randn(5, 12)
    plain = with_plain_attention(nn.Sequential(whole))[0]
    assert torch.allclose(plain(tokens, tokens, tokens)[0], whole(tokens, tokens, tokens)[0], atol=1e-6)
    with pytest.raises(TorchsliceError, match=r"attn_mask must be \[L, S\]"):
        plain(tokens, tokens, tokens, attn_mask=torch.zeros(3, 5, 5))
    odd = nn.Sequential(nn.MultiheadAttention(12, 3, add_zero_attn=True))
    assert type(with_plain_attention(odd)[0]) is nn.MultiheadAttention


class Words(nn.Module):
    """A classifier of texts as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12)
        layer = nn.TransformerEncoderLayer(12, 4, dim_feedforward=16, batch_first=True, dropout=0.1)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(12, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.words(tokens), src_key_padding_mask=tokens == 0)[:, 0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_of_torch_loses_heads() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(1, 20, (4, 7))
    tokens[1:, 5:] = 0
    model = Words().eval()
    before = copy.deepcopy(model.state_dict())
    assert "with_plain_attention" in ts.find_neurons(model, tokens).pinned["encoder.layers.0.self_attn.out_proj"]
    hidden = ts.find_neurons(model, tokens)
    slice_ = hidden.random(0.5)
    with torch.no_grad():  # in its class, which packs padded texts, it loses hidden units
        assert torch.allclose(ts.extract(hidden, slice_)(tokens), ts.masked(hidden, slice_)(tokens), atol=1e-6)
    plain = with_plain_attention(model)
    with torch.no_grad():
        assert torch.allclose(plain(tokens), model(tokens), atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    neurons = ts.find_neurons(plain, tokens)
    counts = {name.rpartition("layers.")[2]: layer.count for name, layer in neurons.layers.items()}
    assert counts == {"0.self_attn.v": 4, "0.linear1": 16, "1.self_attn.v": 4, "1.linear1": 16}
    slice_, other = neurons.random(0.5), tokens.flip(0)
    small = ts.extract(neurons, slice_)
    attention = small.encoder.layers[0].self_attn
    assert (attention.q.out_features, attention.out_proj.in_features) == (6, 6)
    with evaluating(small):
        assert torch.allclose(small(other), ts.masked(neurons, slice_).eval()(other), atol=1e-5)


def test_a_vision_transformer_of_torchvision(tmp_path) -> None:
    sizes = {"image_size": 32, "patch_size": 16, "num_layers": 1, "num_heads": 3, "hidden_dim": 12, "mlp_dim": 24}
    VisionTransformer = import_torchvision().models.VisionTransformer

    torch.manual_seed(0)
    whole = VisionTransformer(**sizes, num_classes=10).eval()
    nn.init.normal_(whole.heads.head.weight)
    torch.save(whole.state_dict(), tmp_path / "weights.pt")
    plain = with_plain_attention(VisionTransformer(**sizes, num_classes=10)).eval()
    load_weights(plain, tmp_path / "weights.pt")
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(plain(images), whole(images), atol=1e-5)
    assert ts.find_neurons(plain, images).layers["encoder.layers.encoder_layer_0.self_attention.v"].count == 3
    made = ts.models.create("torchvision:vit_b_32", num_classes=5)
    assert made.encoder.layers[0].self_attention.v.out_features == 768
    small = ts.extract(ts.find_neurons(plain, images), ts.find_neurons(plain, images).random(0.5))
    ts.save(small, tmp_path / "small.safetensors", classes=[str(n) for n in range(10)])
    loaded = ts.load(tmp_path / "small.safetensors", allow_import=True).model
    assert torch.equal(loaded.eval()(images), small.eval()(images))
