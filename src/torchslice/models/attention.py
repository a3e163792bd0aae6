"""Attention of plain layers in the place of nn.MultiheadAttention, whose class cannot lose a head.

Shapes: B batch, L queries, S keys, E channels of a token, h heads.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import TorchsliceError


class Attention(nn.Module):
    """What nn.MultiheadAttention computes, and is called like it; reads its weights too."""

    in_proj_bias = None  # tells nn.TransformerEncoderLayer to call this module instead of computing it in its own way

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        super().__init__()
        self.head_dim, self.dropout, self.batch_first = whole.head_dim, whole.dropout, whole.batch_first
        bias = whole.in_proj_bias is not None
        widths = (whole.embed_dim, whole.kdim, whole.vdim, whole.embed_dim)
        self.q, self.k, self.v, self.out_proj = (nn.Linear(width, whole.embed_dim, bias=bias) for width in widths)
        self.to(whole.out_proj.weight).load_state_dict(whole.state_dict())

    def rename(self, state: dict[str, Any], prefix: str) -> None:
        """Bring the weights of an nn.MultiheadAttention in a state_dict under the names of this module."""
        for name in [name for name in state if name.startswith(prefix)]:
            kind, own = name.rpartition("_")[2], name.removeprefix(prefix)
            if own.startswith("in_proj_"):
                parts = state.pop(name).chunk(3)
                state.update({f"{prefix}{key}.{kind}": part for key, part in zip("qkv", parts, strict=True)})
            elif own.endswith("_proj_weight"):
                state[f"{prefix}{own[0]}.weight"] = state.pop(name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.rename(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the result [B, L, E] and, if asked for, the weights [B, L, S] or [B, h, L, S].

        Args:
            query, key, value: [B, L, E], [B, S, E], [B, S, E]; [L, B, E] and so on without `batch_first`; or without B.
            key_padding_mask, attn_mask: [B, S] and [L, S]; True is left out, fractions are added to the scores.
            is_causal: says what `attn_mask` is, which must be given all the same.
        """
        tokens = -3 if self.batch_first or query.dim() == 2 else 0
        given = ((self.q, query), (self.k, key), (self.v, value))
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).movedim(tokens, -2) for layer, x in given)
        mask = None if attn_mask is None else _added(attn_mask, q)
        if mask is not None and mask.dim() > 2:
            raise TorchsliceError(f"attn_mask must be [L, S], the same for every head; got {list(mask.shape)}.")
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q)[..., None, None, :]
            mask = padding if mask is None else mask + padding
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.mT
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            result = weights @ v
            weights = weights.mean(-3) if average_attn_weights else weights
        else:
            result = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        return self.out_proj(result.movedim(-2, tokens).flatten(-2)), weights


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as what is added to scores."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)


def with_plain_attention(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which every nn.MultiheadAttention is made of plain layers, so that heads can be cut.

    It computes the same, also inside nn.TransformerEncoder, and loads the weights of the model's class.

    >>> encoder = nn.TransformerEncoderLayer(d_model=16, nhead=4, batch_first=True)
    >>> ts.models.with_plain_attention(encoder).self_attn.v
    Linear(in_features=16, out_features=16, bias=True)
    """
    model = copy.deepcopy(model)
    made: dict[nn.Module, Attention] = {}
    for module in list(model.modules()):
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        for name, child in module._modules.items():
            if type(child) is nn.MultiheadAttention and child.bias_k is None and not child.add_zero_attn:
                made.setdefault(child, Attention(child).train(child.training))
                setattr(module, name, made[child])
    return model
