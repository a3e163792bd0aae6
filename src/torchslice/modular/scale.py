"""The two operations of gating that touch whole activations, written so that they allocate nothing of that size.

A large activation costs several times more to allocate than to read or write, and modular training is to cost little
more than training. So a product is written over its factor, and the gradient over the activation it belongs to.

Shapes: B batch, N channels or features, S positions (pixels or tokens).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# In-place functions f (by their autograd nodes) that let a value pass or stop its gradient: g * f(x) equals g * x.
PASSES_OR_STOPS = ("ReluBackward0", "HardtanhBackward0")


def position_mean(x: Tensor, axis: int) -> Tensor:
    """Return the mean of x over everything but samples and channels, float32 [B, N]; `axis` counts the channels."""
    return _PositionMean.apply(x, axis)


def scale(y: Tensor, m: Tensor, axis: int, *, rewrites: int | None = None) -> Tensor:
    """Multiply the channels of y by the gate values m.

    The backward pass spends the memory it kept, so it can be run once only. Its gradient for m takes m = relu(...) for
    granted: where m is 0 it may be 0.

    Args:
        y: [B, ..., N, ...] with N on `axis`, not needed by anybody else.
        m: float [B, N], at least 0.
        rewrites: None keeps y and returns a new tensor. A number returns y itself, multiplied in place, and promises
            that until the backward pass it is changed so many times, by functions of PASSES_OR_STOPS only. A view is
            never changed, for the sake of what it is a view of.
    """
    in_place = rewrites is not None and not y._is_view()
    product = _Scale.apply(y, m, axis, in_place)
    if product.grad_fn is not None:
        product.grad_fn.version = product.grad_fn.kept._version + (rewrites or 0) * in_place
    return product


def _positions(x: Tensor, axis: int) -> Tensor:
    """View x as [B, N, S]."""
    x = x.movedim(axis, 1)
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)


def _wide(m: Tensor, like: Tensor, axis: int) -> Tensor:
    """View m [B, N] so that it multiplies a tensor [B, ..., N, ...]."""
    shape = [m.shape[0], *[1] * (like.dim() - 1)]
    shape[axis] = m.shape[1]
    return m.to(like.dtype).view(shape)


class _PositionMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int) -> Tensor:
        positions = _positions(x, axis)
        ctx.like, ctx.axis, ctx.count = x.detach()[:0].expand(0, *x.shape[1:]), axis, positions.shape[2]
        ctx.shape = x.shape
        return positions.sum(2).float() / ctx.count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _wide(gradient / ctx.count, ctx.like, ctx.axis).expand(ctx.shape), None  # no memory of its own


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, m: Tensor, axis: int, in_place: bool) -> Tensor:
        wide = _wide(m, y, axis)
        if in_place:
            product = y.mul_(wide)
            ctx.mark_dirty(product)
        else:
            product = y * wide
        ctx.kept = y.detach()  # shares memory and version with y, but not its place in the graph
        ctx.save_for_backward(m)
        ctx.axis, ctx.in_place = axis, in_place
        return product

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        (m,) = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        if kept is None or kept._version != ctx.version:
            raise RuntimeError(
                "the activation of a gated layer was changed in place, or its gradient is asked for a second time; "
                "attach the gates to the model as it is trained, and run backward once per forward."
            )
        m_gradient = _positions(kept.mul_(gradient), ctx.axis).sum(2).to(m.dtype)  # [B, N], sum of g * y (* m)
        wide = _wide(m, gradient, ctx.axis)
        if ctx.in_place:
            used = wide.view(m.shape).to(m.dtype)
            m_gradient = torch.where(used > 0, m_gradient / used, 0)
        y_gradient = torch.mul(gradient, wide, out=kept) if ctx.needs_input_grad[0] else None
        return y_gradient, m_gradient, None, None
