"""Tensors of which only some rows move, and layers that compute no gradient for the other rows.

Shapes: B batch, N rows of a tensor (one per neuron or channel), m of them move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Rows:
    """A tensor [N, ...] of a network, of which the rows `where` move."""

    name: str
    frozen: Tensor  # [N, ...]
    where: Tensor  # int64 [m]
    moving: Tensor  # [m, ...]

    def whole(self) -> Tensor:
        """Return the tensor with the moving rows in their places, [N, ...]."""
        return self.frozen.index_copy(0, self.where, self.moving)


class RowGradients(TorchFunctionMode):
    """Inside the block, layers that use these tensors compute gradients for the moving rows only.

    That holds for convolutions, linear layers and batch norms; for what else reads the tensors (grouped convolutions),
    autograd takes the moving rows from whole gradients. A batch norm of whose running statistics rows move normalises
    these channels with the statistics of the batch. `whole` maps names to the tensors to run the network with.
    """

    def __init__(self, tensors: Iterable[Rows]) -> None:
        super().__init__()
        made = [(rows, rows.whole()) for rows in tensors]
        self.whole = {rows.name: whole for rows, whole in made}
        self._rows = {id(whole): rows for rows, whole in made}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and not kwargs["training"]:
            if id(kwargs["weight"]) in self._rows and id(kwargs["bias"]) in self._rows:
                return self._norm(*args, **kwargs)
            return func(*args, **kwargs)
        rows = self._rows.get(id(args[1])) if len(args) > 1 and not kwargs else None
        if rows is not None and len(rows.where) < len(rows.frozen):
            if func is F.linear and len(args) == 3:
                return self._layer(rows, *args)
            if func in (F.conv1d, F.conv2d, F.conv3d) and len(args) == 7 and _plain(*args[3:]):
                return self._layer(rows, *args)
        return func(*args, **kwargs)

    def _layer(self, rows: Rows, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        dtype, device = x.dtype, x.device.type
        if torch.is_autocast_enabled(device) and dtype != torch.float64:  # autocast does not look into what follows
            dtype = torch.get_autocast_dtype(device)
        moving_bias = None if bias is None else self._rows[id(bias)].moving
        whole = [None if tensor is None else tensor.detach().to(dtype) for tensor in (weight, bias)]
        return _Layer.apply(x.to(dtype), *whole, rows.moving, moving_bias, rows.where, settings)

    def _norm(
        self,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor,
        bias: Tensor,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        rows, biases = self._rows[id(weight)], self._rows[id(bias)]
        statistics = [self._rows[id(tensor)].moving for tensor in (mean, var) if id(tensor) in self._rows]
        if len(rows.where) == len(rows.frozen):
            mean, var = statistics or (mean, var)
            return F.batch_norm(x, mean, var, weight, bias, bool(statistics), momentum, eps)
        whole = (mean, var, weight.detach(), bias.detach())
        return _Norm.apply(x, *whole, rows.moving, biases.moving, rows.where, statistics, momentum, eps)


def _plain(stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    return groups == 1 and not isinstance(padding, str)


class _Layer(torch.autograd.Function):
    """A convolution, or a linear layer where there are no settings, with gradients for its input and moving rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        moving_weight: Tensor,
        moving_bias: Tensor | None,
        where: Tensor,
        settings: tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(x, weight, moving_weight, where)
        ctx.settings = ()
        if not settings:
            return F.linear(x, weight, bias)
        stride, padding, dilation, groups = settings
        ctx.settings = (stride, padding, dilation, False, [0] * len(stride), groups)
        return torch.convolution(x, weight, bias, *ctx.settings)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, moving, where = ctx.saved_tensors
        to_x, _, _, _, to_bias, _, _ = ctx.needs_input_grad
        before = None
        if not ctx.settings:
            mine = gradient[..., where].flatten(0, -2)  # [n, m]
            before = gradient @ weight if to_x else None
            rows, bias = mine.T @ x.flatten(0, -2), mine.sum(0)
        else:
            convolve = torch.ops.aten.convolution_backward
            if to_x:
                before = convolve(gradient, x, weight, None, *ctx.settings, [True, False, False])[0]
            mine = gradient[:, where]  # [B, m, ...]; for channels_last faster than index_select
            _, rows, bias = convolve(mine, x, moving.to(x), [len(where)], *ctx.settings, [False, True, to_bias])
        return before, None, None, rows, bias if to_bias else None, None, None


class _Norm(torch.autograd.Function):
    """A batch norm with its stored statistics, or those of the batch for the rows that move.

    Gradients for its input and moving rows; the statistics that move are updated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor,
        bias: Tensor,
        moving_weight: Tensor,
        moving_bias: Tensor,
        where: Tensor,
        statistics: list[Tensor],
        momentum: float,
        eps: float,
    ) -> Tensor:
        mine = x[:, where].to(torch.promote_types(x.dtype, torch.float32))  # [B, m, ...]
        axes, shape = _others(x), [-1] + [1] * (x.dim() - 2)
        ctx.samples = mine.numel() // len(where) if statistics else 0
        if statistics:
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
        mine, axes = gradient[:, where].to(normal.dtype), _others(gradient)
        weight, bias = (mine * normal).sum(axes), mine.sum(axes)  # [m]
        before = gradient * scale.to(gradient.dtype)
        if ctx.samples:  # mean and variance of the batch depend on x as well
            shift, slope = (total.view(-1, *scale.shape[1:]) / ctx.samples for total in (bias, weight))
            before[:, where] = ((mine - shift - normal * slope) * scale[where]).to(gradient.dtype)
        return before, None, None, None, None, weight, bias, None, None, None, None


def _others(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]
