"""Batch-norm statistics belong to the data: compute them again for the images a sub-model will see.

Shapes: n images, B batch, C channels of a norm.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.record import evaluating
from ..data import Data
from ..errors import TorchsliceError
from ..training.placement import fast_format
from .evaluate import accuracy_of, device_of, predict_logits


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
    model: nn.Module, images: Tensor | Iterable[Tensor], *, batch_size: int = 512, seed: int = 0
) -> nn.Module:
    """Return a copy of a model whose batch-norm running statistics are those of the given images, and all else equal.

    One pass, in which every batch norm normalises with the statistics of its own batch and all other modules are in
    eval mode (dropout off). A norm's new mean and variance are pooled over all values that reached it, the spread
    between batches included, and replace the old ones. When the images fit one batch the result is exact: in eval
    mode the copy computes what that pass computed, up to the n / (n - 1) of the unbiased variance. With several
    batches it depends on them a little, through the norms of earlier layers.

    Args:
        model: any network; one without batch norm comes back as an equal copy.
        images: normalised training images [n, ...], mixed by `seed` and cut into equal batches of at most
            `batch_size`; or the batches themselves, each with all classes in it.
        batch_size: images per batch.
        seed: order of the images.

    >>> small = recalibrate(small, data.normalise(data.restrict(["cat", "dog"]).train.images))
    """
    model = copy.deepcopy(model)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return model
    device = device_of(model)
    if isinstance(images, Tensor) and len(images):
        images = images.clone(memory_format=fast_format(model, images[:2].to(device)))
    moments = {norm: RunningMoments() for norm in norms}
    momentum = {norm: norm.momentum for norm in norms}
    hooks = [norm.register_forward_pre_hook(lambda norm, args: moments[norm].add(args[0])) for norm in norms]
    try:
        with evaluating(model):
            for norm in norms:
                norm.train()
                norm.momentum = 0.0  # the running statistics stay as they are until the pass is over
            for batch in _mixed(images, batch_size, seed) if isinstance(images, Tensor) else images:
                if len(batch) < 2:
                    raise TorchsliceError("recalibration needs at least 2 images in a batch, got 1.")
                model(batch.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    if not any(pooled.count for pooled in moments.values()):
        raise TorchsliceError("recalibration got no images; give training images [n, ...] or batches of them.")
    for norm, pooled in moments.items():
        norm.momentum = momentum[norm]
        if pooled.count:
            norm.running_mean.copy_(pooled.mean)  # type: ignore[union-attr]
            norm.running_var.copy_(pooled.variance)  # type: ignore[union-attr]
    return model


def try_recalibration(model: nn.Module, data: Data, count: int, *, seed: int) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a copy recalibrated on `count` training images, the better of both on validation, and its logits there."""
    new = recalibrate(model, data.normalise(data.train.limit(count, seed=seed).images), seed=seed)
    labels = data.validation.labels.cpu()
    before, after = (predict_logits(network, data, split="validation") for network in (model, new))
    better = accuracy_of(after, labels).overall >= accuracy_of(before, labels).overall
    return (new, new, after) if better else (new, model, before)


def _mixed(images: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield images [n, ...] in a random order, in equal batches of at most `batch_size`."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    for chunk in order.tensor_split(max(1, -(-len(images) // batch_size))):
        if len(chunk):
            yield images[chunk.to(images.device)]
