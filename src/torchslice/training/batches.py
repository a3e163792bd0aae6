"""Batches that are made on the device: a global order per epoch, normalisation, random crops and flips.

Shapes: n images of a split, B batch, ch channels, H height, W width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Data, Split
from ..errors import TorchsliceError
from .ranks import Ranks


def epoch_seed(seed: int, epoch: int, rank: int = 0) -> int:
    """Derive the seed of an epoch (of one process) from the seed of the run, so that no random state is ever stored."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{rank}".encode(), digest_size=7).digest())


def epoch_order(count: int, batch_size: int, generator: torch.Generator, ranks: int = 1) -> list[Tensor]:
    """Permute `count` samples and cut them into global batches of indices, int64 [B] each.

    All batches are divisible by the number of processes, and no process gets a batch of one image, which batch norm
    cannot use; at most `2 * ranks - 1` images of the epoch are left out for that.

    >>> [len(batch) for batch in epoch_order(9, 4, torch.Generator())]
    [4, 4]
    """
    batches = torch.randperm(count, generator=generator).split(batch_size)
    whole = [batch[: len(batch) - len(batch) % ranks] for batch in batches]
    return [batch for batch in whole if len(batch) >= 2 * ranks]


def class_batches(
    labels: Tensor, batch_size: int, sizes: Sequence[int], steps: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield `steps` batches of indices, int64 [B], each of a few random classes in equal parts, mixed.

    The images of a class come in a random order and start over, in another one, when all have been seen.

    Args:
        labels: of the images, int64 [n].
        sizes: numbers of classes, each equally likely; at most as many are drawn as there are, or images in a batch.

    >>> batches = class_batches(torch.tensor([0, 1, 2] * 8), 4, [2], 3, torch.Generator())
    >>> [torch.tensor([0, 1, 2] * 8)[batch].unique().numel() for batch in batches]
    [2, 2, 2]
    """
    rows = [(labels == label).nonzero().flatten() for label in range(int(labels.max()) + 1)]
    present = [label for label, own in enumerate(rows) if len(own)]
    waiting = [torch.empty(0, dtype=torch.int64)] * len(rows)
    for _ in range(steps):
        size = sizes[int(torch.randint(len(sizes), (), generator=generator))]
        drawn = torch.randperm(len(present), generator=generator)[: min(size, batch_size)].tolist()
        batch = []
        for place, label in enumerate(present[index] for index in drawn):
            own = batch_size // len(drawn) + (place < batch_size % len(drawn))
            while len(waiting[label]) < own:
                again = rows[label][torch.randperm(len(rows[label]), generator=generator)]
                waiting[label] = torch.cat([waiting[label], again])
            batch.append(waiting[label][:own])
            waiting[label] = waiting[label][own:]
        yield torch.cat(batch)[torch.randperm(batch_size, generator=generator)]


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Crop every image, padded with zeros on all sides, at its own place, and mirror some left to right.

    Args:
        images: uint8 [B, ch, H, W].
        top: first row of each crop in the padded image, int64 [B] in 0..2 * padding.
        left: first column, likewise.
        flip: which crops are mirrored, bool [B].
        padding: in pixels.

    Returns:
        uint8 [B, ch, H, W], in channels_last memory format.
    """
    batch, _, height, width = images.shape
    rows = top[:, None] + torch.arange(height, device=images.device)  # [B, H]
    steps = torch.arange(width, device=images.device)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - steps, steps)  # [B, W]
    sample = torch.arange(batch, device=images.device)[:, None, None]
    padded = F.pad(images, (padding,) * 4)
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # [B, H, W, ch] in memory


class TrainingBatches:
    """The training split on a device, in a new random order and with new crops and flips every epoch.

    The same (seed, epoch) gives the same global batches, whatever the number of processes; each process gets its part
    of every one. With `classes_per_batch`, a batch holds images of a few random classes only, see `class_batches`; an
    epoch is as long as without.

    >>> batches = TrainingBatches(data, batch_size=128, seed=0, device=torch.device("cpu"))
    >>> for images, labels in batches.epoch(1): ...  # float [B, ch, H, W], int64 [B]
    """

    def __init__(
        self,
        data: Data,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        classes_per_batch: Sequence[int] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.data, self.batch_size, self.seed, self.device = data, batch_size, seed, device
        self.classes_per_batch = classes_per_batch
        for size in classes_per_batch or ():
            if not 2 <= size <= len(data.classes):
                raise TorchsliceError(f"a batch has images of 2 to {len(data.classes)} classes; got {size!r}.")
        self.ranks = ranks or Ranks()
        self.images, self.labels = data.train.images.to(device), data.train.labels.to(device)
        if batch_size < 2 * self.ranks.count or batch_size % self.ranks.count:
            raise TorchsliceError(
                f"batch_size {batch_size} cannot be shared by {self.ranks.count} process(es): it must be a multiple of "
                f"their number and at least {2 * self.ranks.count}."
            )
        if len(data.train) < 2 * self.ranks.count:
            raise TorchsliceError(
                f"{len(data.train)} training image(s) of {data.name} are too few to train on; "
                f"give at least {2 * self.ranks.count}."
            )

    def __len__(self) -> int:
        """Number of batches, and so of steps, of an epoch."""
        return len(epoch_order(len(self.labels), self.batch_size, torch.Generator(), self.ranks.count))

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's part of every batch of an epoch: normalised images [B, ch, H, W] and labels [B]."""
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
        for batch in self._order(generator):
            top, left = torch.randint(2 * self.data.crop_padding + 1, (2, len(batch)), generator=generator)
            flip = torch.rand(len(batch), generator=generator) < (0.5 if self.data.flip else 0.0)
            rows, top, left, flip = (self.ranks.part(t).to(self.device) for t in (batch, top, left, flip))
            images = crop_and_flip(self.images[rows], top, left, flip, self.data.crop_padding)
            yield self.data.normalise(images), self.labels[rows]

    def _order(self, generator: torch.Generator) -> Iterator[Tensor]:
        if self.classes_per_batch:
            labels, sizes = self.data.train.labels, self.classes_per_batch
            return class_batches(labels, self.batch_size, sizes, len(self), generator)
        return iter(epoch_order(len(self.labels), self.batch_size, generator, self.ranks.count))


def in_order(
    data: Data, split: Split, *, batch_size: int, device: torch.device, ranks: Ranks | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's part of a split, not augmented: normalised images [B, ch, H, W] and labels [B]."""
    if batch_size < 1:
        raise TorchsliceError(f"batch_size must be at least 1, got {batch_size}.")
    for rows in (ranks or Ranks()).part(torch.arange(len(split))).split(batch_size):
        if len(rows):
            yield data.normalise(split.images[rows].to(device)), split.labels[rows].to(device)
