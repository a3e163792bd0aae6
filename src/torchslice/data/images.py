"""Images in memory, normalised and augmented batch by batch on the device: the fast path for small data sets.

Shapes: n images of a split, B batch, ch channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import TorchsliceError
from .splits import Split, check_labels


@dataclass(frozen=True, eq=False)
class Images(Split):
    """Images, uint8 [n, ch, H, W], and their labels, int64 [n].

    Attributes:
        mean, std: per channel, of images / 255; inputs are normalised by them. By default they are measured, by
            `data.task` on the training images of the task, else on these.
        crop_padding: pixels by which images are padded with their reflection and cropped back at random in training; 0
            is none.
        flip: whether images are mirrored left to right in training: half of them, at random, in the first epoch, and
            in every other epoch those that were not in the one before (arXiv 2404.00498, section 3.6).

    >>> images = Images(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    >>> len(images.take(torch.tensor([0, 2])))
    2
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    crop_padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or 0 in self.images.shape[1:]:
            raise TorchsliceError(
                f"images must be uint8 [n, channels, height, width], got {self.images.dtype} {list(self.images.shape)}."
            )
        object.__setattr__(self, "labels", check_labels(self.labels, len(self.images)))
        channels = self.images.shape[1]
        finite = all(map(math.isfinite, (*self.mean, *self.std))) and all(s > 0 for s in self.std)
        if len(self.mean) not in (0, channels) or len(self.std) != len(self.mean) or not finite:
            raise TorchsliceError(
                f"images of {channels} channel(s) need so many means and deviations above 0; "
                f"got {list(self.mean)} and {list(self.std)}."
            )
        if not 0 <= self.crop_padding < min(self.images.shape[2:]):
            raise TorchsliceError(
                f"crop_padding must be at least 0 and smaller than the images, {self.images.shape[2]}x"
                f"{self.images.shape[3]}; got {self.crop_padding}."
            )

    def measured(self) -> Images:
        """Return the same images with their own mean and std, if they have none."""
        if self.mean or not len(self):
            return self
        mean, std = channel_statistics(self.images)
        return replace(self, mean=mean, std=std)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Mean, std and shape of an input."""
        own = self.measured()
        return {"mean": list(own.mean), "std": list(own.std), "input_shape": list(self.images.shape[1:])}

    def take(self, rows: Tensor) -> Images:
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    def join(self, other: Images) -> Images:
        if other.images.shape[1:] != self.images.shape[1:]:
            given, needed = ("x".join(map(str, split.images.shape[1:])) for split in (other, self))
            raise TorchsliceError(f"images of {given} cannot be joined with images of {needed}; give one size.")
        images, labels = torch.cat([self.images, other.images]), torch.cat([self.labels, other.labels])
        return replace(self, images=images, labels=labels)

    def like(self, preprocessing: Mapping[str, Any]) -> Images:
        shape = list(self.images.shape[1:])
        if preprocessing.get("input_shape", shape) != shape:
            given, needed = ("x".join(map(str, sizes)) for sizes in (shape, preprocessing["input_shape"]))
            raise TorchsliceError(f"the network takes images of {needed}, and these are {given}; give its data.")
        if "mean" not in preprocessing:
            return self
        return replace(self, mean=tuple(preprocessing["mean"]), std=tuple(preprocessing["std"]))

    def read(
        self,
        batches: Iterable[Tensor],
        *,
        device: torch.device | str = "cpu",
        part: Callable[[Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
        epoch: int = 1,
    ) -> Iterator[Tensor]:
        part = part or (lambda rows: rows)
        normalise = self.measured().normalise
        if generator is None:
            for rows in batches:
                yield normalise(self.images[part(rows)].to(device))
            return
        images = self.images.to(device)
        first = torch.rand(len(self), generator=torch.Generator().manual_seed(0)) < 0.5  # mirrored in epochs 1, 3, ...
        for rows in batches:
            top, left = torch.randint(2 * self.crop_padding + 1, (2, len(rows)), generator=generator)
            flip = (first[rows] ^ (epoch % 2 == 0)) & self.flip
            rows, top, left, flip = (part(draw).to(device) for draw in (rows, top, left, flip))
            yield normalise(crop_and_flip(images[rows], top, left, flip, self.crop_padding))

    def normalise(self, images: Tensor) -> Tensor:
        """Return uint8 images [B, ch, H, W] as float32, on their device, normalised."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return images.float().div_(255).sub_(mean).div_(std)

    def update(self, digest: Any) -> None:
        for tensor in (self.images, self.labels):
            digest.update(tensor.contiguous().numpy().data)

    def __repr__(self) -> str:
        return f"{len(self)} images of {'x'.join(map(str, self.images.shape[1:]))}"


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of uint8 images / 255, exactly, from the counts of their values.

    The deviation is at least 1/255, so that a channel that never changes can be normalised too.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        counts = channel.flatten().bincount(minlength=256).double()  # [256]
        mean = (counts @ values / counts.sum()).item()
        variance = (counts @ (values - mean) ** 2 / counts.sum()).item()
        means.append(mean)
        deviations.append(max(variance**0.5, 1 / 255))
    return tuple(means), tuple(deviations)


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Crop every image, padded with its reflection on all sides, at its own place, and mirror some left to right.

    Args:
        images: uint8 [B, ch, H, W].
        top: first row of each crop in the padded image, int64 [B] in 0..2 * padding.
        left: first column, likewise.
        flip: which crops are mirrored, bool [B].
        padding: in pixels, smaller than H and W.

    Returns:
        uint8 [B, ch, H, W], in channels_last memory format.
    """
    batch, _, height, width = images.shape
    steps = torch.arange(width, device=images.device)
    rows = top[:, None] + torch.arange(height, device=images.device)  # [B, H]
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - steps, steps)  # [B, W]
    rows, columns = _reflected(rows - padding, height), _reflected(columns - padding, width)
    sample = torch.arange(batch, device=images.device)[:, None, None]
    return images[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # [B, H, W, ch] in memory


def _reflected(places: Tensor, size: int) -> Tensor:
    """Return the places inside of 0..size - 1 that stand for those beyond: -1 is 1, `size` is size - 2."""
    return size - 1 - (size - 1 - places.abs()).abs()
