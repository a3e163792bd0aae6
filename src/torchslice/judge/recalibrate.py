"""Batch-norm statistics belong to the data: compute them again for the samples a sub-model will see.

Shapes: B batch, C channels of a norm.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data import Task, limit
from ..errors import TorchsliceError
from ..graph.record import evaluating
from ..inputs import Output, call_model, device_of, to_device
from ..training.evaluate import accuracy_of, predict
from ..training.placement import fast_format, in_format


class RunningMoments:
    """Mean and variance per channel of all values added so far, pooled over batches (Chan, Golub & LeVeque, 1983).

    >>> moments = RunningMoments()
    >>> moments.add(torch.tensor([[1.0], [2.0]])); moments.add(torch.tensor([[6.0]]))
    >>> moments.mean, moments.variance
    (tensor([3.], dtype=torch.float64), tensor([7.], dtype=torch.float64))
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())  # sum of squared deviations from the mean, [C]

    def add(self, values: Tensor) -> None:
        """Add values [B, C, ...]; the pooling is done in float64."""
        axes = [axis for axis in range(values.dim()) if axis != 1]
        count = values.numel() // values.shape[1]
        variance, mean = (moment.double() for moment in torch.var_mean(values.float(), dim=axes, correction=0))  # [C]
        total = self.count + count
        shift = mean - self.mean.to(mean.device)
        self.squares = self.squares.to(mean.device) + variance * count + shift**2 * (self.count * count / total)
        self.mean = mean - shift * (self.count / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """Unbiased variance [C], as batch norm keeps it."""
        return self.squares / max(self.count - 1, 1)


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
        model: any network; one without batch norm comes back as an equal copy.
        task: what the network is for, such as `task.restrict(["cat", "dog"])`; its training split is used.
        samples: how many are drawn at most; they are mixed and cut into equal batches.
        batch_size: samples per batch, at most.
        seed: of the draw and the order.

    >>> recalibrated = ts.judge.recalibrate(small, task.restrict(["3", "8"]))
    """
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
    moments = {norm: RunningMoments() for norm in norms}
    momentum = {norm: norm.momentum for norm in norms}
    hooks = [norm.register_forward_pre_hook(lambda norm, args: moments[norm].add(args[0])) for norm in norms]
    try:
        with evaluating(model):
            for norm in norms:
                norm.train()
                norm.momentum = 0.0  # the running statistics stay as they are until the pass is over
            for inputs in drawn.read(batches, device=device):
                call_model(model, in_format(inputs, memory_format))
    finally:
        for hook in hooks:
            hook.remove()
    for norm, pooled in moments.items():
        norm.momentum = momentum[norm]
        if pooled.count:
            norm.running_mean.copy_(pooled.mean)  # type: ignore[union-attr]
            norm.running_var.copy_(pooled.variance)  # type: ignore[union-attr]
    return model


def try_recalibration(
    model: nn.Module, task: Task, *, samples: int = 5000, seed: int = 0, output: Output = None
) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a recalibrated copy, the better of model and copy on validation, and its logits there."""
    new = recalibrate(model, task, samples=samples, seed=seed)
    labels = task.validation.labels
    before, after = (predict(network, task, "validation", output=output) for network in (model, new))
    better = accuracy_of(after, labels).overall >= accuracy_of(before, labels).overall
    return (new, new, after) if better else (new, model, before)
