"""Tensors of which only some rows move, and layers that compute no gradient for the other rows.

Shapes: B batch, N rows of a tensor (one per neuron or channel), m of them move.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


class Rows(nn.Module):
    """The rows of the tensor `name` of a network that move; `axis` is the one that counts them."""

    where: Tensor  # int64 [m], which rows these are
    moving: Tensor  # their values, m of them; a parameter if the tensor is one, else a buffer

    def __init__(self, name: str, tensor: Tensor, where: Tensor, axis: int = 0) -> None:
        super().__init__()
        self.name, self.axis = name, axis
        self.where = nn.Buffer(where.to(tensor.device))
        moving = self.of(tensor.detach())
        self.moving = nn.Parameter(moving) if isinstance(tensor, nn.Parameter) else nn.Buffer(moving)

    def of(self, tensor: Tensor) -> Tensor:
        """Return the rows of a tensor that are where those that move are."""
        return tensor.index_select(self.axis, self.where)

    def forward(self, frozen: Tensor) -> Tensor:
        """Return the tensor with the moving rows in their places."""
        return frozen.index_copy(self.axis, self.where, self.moving)


class RowGradients(TorchFunctionMode):
    """Inside the block, layers that use certain tensors compute gradients for their moving rows only.

    That holds for convolutions, linear layers and batch norms; for what else reads the tensors (grouped convolutions),
    autograd takes the moving rows from whole gradients. A batch norm whose running statistics have moving rows
    normalises these channels with the statistics of the batch.

    `rows` maps the id of a tensor that the layers are given to its rows; the tensors must live as long as the block.
    """

    def __init__(self, rows: Mapping[int, Rows]) -> None:
        super().__init__()
        self.rows = rows

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and id(args[1]) in self.rows:
            return self._norm(*args, **kwargs)
        if len(args) > 2 and not kwargs and id(args[1]) in self.rows and self._in_part(args[1]):
            x, weight, bias, *settings = args  # of a convolution: stride, padding, dilation, groups
            convolves = func in CONVOLUTIONS and len(args) == 7 and args[6] == 1 and not isinstance(args[4], str)
            if (func is F.linear or convolves) and (bias is None or id(bias) in self.rows):
                rows, moving_bias = self.rows[id(weight)], None if bias is None else self.rows[id(bias)].moving
                y = func(x, weight.detach(), None if bias is None else bias.detach(), *settings)
                return _Layer.apply(y, rows.moving, moving_bias, x.detach(), rows.where, settings)
        return func(*args, **kwargs)

    def _in_part(self, tensor: Tensor) -> bool:
        return len(self.rows[id(tensor)].where) < len(tensor)

    def _norm(self, x: Tensor, *statistics: Tensor, **settings: Any) -> Tensor:
        weight, bias, momentum, eps = (settings[key] for key in ("weight", "bias", "momentum", "eps"))
        mean, var = moving = [self.rows[id(tensor)].moving for tensor in statistics]
        if not self._in_part(weight):
            return F.batch_norm(x, mean, var, weight, bias, True, momentum, eps)
        rows, biases = self.rows[id(weight)], self.rows[id(bias)]
        whole = (*statistics, weight.detach(), bias.detach())
        return _Norm.apply(x, rows.moving, biases.moving, moving, whole, rows.where, momentum, eps)


class _Layer(torch.autograd.Function):
    """Passes on the output y of a convolution, or of a linear layer (no settings), and has gradients for moving rows.

    The gradient for the input of the layer is that of the layer with all of its rows frozen, behind y.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, moving: Tensor, bias: Tensor | None, *constant: Any) -> Tensor:
        x, where, ctx.settings = constant  # input of the layer; int64 [m]; stride, padding, dilation, groups
        ctx.save_for_backward(x, moving, where)
        return y.detach()  # what is no view of y may be changed in place

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, moving, where = ctx.saved_tensors
        x, to_bias = x.to(gradient.dtype), ctx.needs_input_grad[2]
        if ctx.settings:
            stride, padding, dilation, groups = ctx.settings
            mine = gradient[:, where]  # [B, m, ...]; for channels_last faster than index_select
            settings = ([len(where)], stride, padding, dilation, False, [0] * len(stride), groups)
            _, rows, bias = torch.ops.aten.convolution_backward(
                mine, x, moving.to(x), *settings, [False, True, to_bias]
            )
        else:
            mine = gradient[..., where].flatten(0, -2)  # [n, m]
            rows, bias = mine.T @ x.flatten(0, -2), mine.sum(0)
        return gradient, rows, bias if to_bias else None, None, None, None


class _Norm(torch.autograd.Function):
    """A batch norm that uses and updates the statistics of the batch for rows that move, with gradients for these."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, moving_weight: Tensor, moving_bias: Tensor, *frozen: Any) -> Tensor:
        statistics, (mean, var, weight, bias), where, momentum, eps = frozen
        mine = x[:, where].to(torch.promote_types(x.dtype, torch.float32))  # [B, m, ...]
        axes, shape = [0, *range(2, x.dim())], [-1] + [1] * (x.dim() - 2)
        ctx.samples = mine.numel() // len(where)
        middle = mine.mean(axes)  # [m]
        spread = (mine - middle.view(shape)).square().mean(axes)
        unbiased = spread * ctx.samples / max(ctx.samples - 1, 1)
        for running, new in zip(statistics, (middle, unbiased), strict=True):
            running.lerp_(new.to(running.dtype), momentum)
        mean, var = mean.index_copy(0, where, middle.to(mean)), var.index_copy(0, where, spread.to(var))
        scale = (var + eps).rsqrt()
        normal = (mine - mean[where].view(shape)) * scale[where].view(shape)
        ctx.save_for_backward(normal, (weight * scale).view(shape), where)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        normal, scale, where = ctx.saved_tensors
        mine, axes = gradient[:, where].to(normal.dtype), [0, *range(2, gradient.dim())]
        weight, bias = (mine * normal).sum(axes), mine.sum(axes)  # [m]
        before = gradient * scale.to(gradient.dtype)
        # mean and variance of the batch depend on x as well
        shift, slope = (total.view(-1, *scale.shape[1:]) / ctx.samples for total in (bias, weight))
        before[:, where] = ((mine - shift - normal * slope) * scale[where]).to(gradient.dtype)
        return before, weight, bias, None, None, None, None, None
