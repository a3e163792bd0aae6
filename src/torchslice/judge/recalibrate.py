"""Batch-norm statistics belong to the data: compute them again for the samples a sub-model will see.

Shapes: B batch, C channels of a norm.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data import Task, check_task, limit
from ..errors import TorchsliceError
from ..graph.record import check_model, evaluating
from ..inputs import call_model, device_of, to_device
from ..training.placement import fast_format, in_format


def moments(values: Tensor) -> Tensor:
    """Return number, mean and variance of the values [B, C, ...] of every channel, float64 [3, C]."""
    axes = [axis for axis in range(values.dim()) if axis != 1]
    variance, mean = torch.var_mean(values.float(), dim=axes, correction=0)  # [C]
    return torch.stack([torch.full_like(mean, values.numel() // len(mean)), mean, variance]).double()


def pooled(batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance [C] of all values whose `moments` are given (Chan, Golub & LeVeque, 1983)."""
    count, means, variances = torch.stack([*batches], 1)  # [batches, C]
    total = count.sum(0)
    mean = (count * means).sum(0) / total
    return mean, (count * (variances + (means - mean) ** 2)).sum(0) / (total - 1).clamp(min=1)


def recalibrate(
    model: nn.Module, task: Task, *, samples: int = 5000, batch_size: int = 512, seed: int = 0
) -> nn.Module:
    """Return a copy of a model whose batch-norm running statistics are those of training samples, and all else equal.

    One pass, in which every batch norm normalises with the statistics of its own batch and all other modules are in
    eval mode (dropout off). A norm's new mean and variance are pooled over all values that reached it, the spread
    between batches included, and replace the old ones. When the samples fit one batch the result is exact: in eval
    mode the copy computes what that pass computed, up to the n / (n - 1) of the unbiased variance. With several
    batches it depends on them a little, through the norms of earlier layers.

    Args:
        task: what the network is for, such as `task.restrict(["cat", "dog"])`; its training split is used.
        samples: how many are drawn at most, by the `seed`; they are mixed and cut into equal batches.
        batch_size: samples per batch, at most.

    >>> recalibrated = ts.judge.recalibrate(small, task.restrict(["3", "8"]))
    """
    check_model(model)
    check_task(task)
    model = copy.deepcopy(model)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return model
    drawn = limit(task.train, samples, seed=seed)
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed))
    batches = order.tensor_split(-(-len(drawn) // max(batch_size, 1)) or 1)
    if len(batches[-1]) < 2:
        raise TorchsliceError(
            f"recalibration needs batches of at least 2 training samples; {task.name} gave {len(drawn)} and "
            f"batch_size is {batch_size}."
        )
    device = device_of(model)
    memory_format = fast_format(model, to_device(task.example, device))
    seen: dict[_BatchNorm, list[Tensor]] = {norm: [] for norm in norms}
    hooks = [norm.register_forward_pre_hook(lambda norm, args: seen[norm].append(moments(args[0]))) for norm in norms]
    try:
        with evaluating(model):
            for norm in norms:
                norm.train()
            for inputs in drawn.read(batches, device=device):
                call_model(model, in_format(inputs, memory_format))
    finally:
        for hook in hooks:
            hook.remove()
    for norm, batch_moments in seen.items():
        if batch_moments:
            mean, variance = pooled(batch_moments)
            norm.running_mean.copy_(mean)  # type: ignore[union-attr]
            norm.running_var.copy_(variance)  # type: ignore[union-attr]
    return model
