"""Which samples make a batch: a global order per epoch, from all samples or from those of a few classes.

Shapes: n samples of a split, B batch.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..data import Task
from ..errors import TorchsliceError
from ..inputs import Inputs
from .ranks import Ranks


def epoch_seed(seed: int, epoch: int, rank: int = 0) -> int:
    """Derive the seed of an epoch (of one process) from the seed of the run, so that no random state is ever stored."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{rank}".encode(), digest_size=7).digest())


def epoch_order(count: int, batch_size: int, generator: torch.Generator, ranks: int = 1) -> list[Tensor]:
    """Permute `count` samples and cut them into global batches of indices, int64 [B] each.

    All batches are divisible by the number of processes, and no process gets a batch of one sample, which batch norm
    cannot use; at most `2 * ranks - 1` samples of the epoch are left out for that.

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

    The samples of a class come in a random order and start over, in another one, when all have been seen.

    Args:
        labels: of the samples, int64 [n].
        sizes: numbers of classes, each equally likely; at most as many are drawn as there are, or samples in a batch.

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


class Batches:
    """The training split on a device, in a new random order, and augmented anew, every epoch.

    The same (seed, epoch) gives the same global batches, whatever the number of processes; each process gets its part
    of every one. With `classes_per_batch`, a batch holds samples of a few random classes only, see `class_batches`; an
    epoch is as long as without.

    >>> batches = Batches(task, batch_size=128, seed=0)
    >>> len(batches), next(batches.epoch(1))[0].shape
    (11, torch.Size([128, 1, 8, 8]))
    """

    def __init__(
        self,
        task: Task,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        classes_per_batch: Sequence[int] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.split, self.batch_size, self.seed, self.device = task.train, batch_size, seed, device
        self.classes_per_batch, self.ranks = classes_per_batch, ranks or Ranks()
        least = 2 * self.ranks.count
        if batch_size < least or batch_size % self.ranks.count:
            raise TorchsliceError(
                f"batch_size {batch_size} cannot be shared by {self.ranks.count} process(es): it must be a multiple of "
                f"their number and at least {least}."
            )
        if len(self.split) < least:
            raise TorchsliceError(
                f"{len(self.split)} training sample(s) of {task.name} are too few to train on; give at least {least}."
            )

    def __len__(self) -> int:
        """Number of batches, and so of steps, of an epoch."""
        return len(epoch_order(len(self.split), self.batch_size, torch.Generator(), self.ranks.count))

    def epoch(self, epoch: int) -> Iterator[tuple[Inputs, Tensor]]:
        """Yield this process's part of every batch of an epoch: inputs, and labels [B]."""
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
        asked: deque[Tensor] = deque()  # batches that are being read

        def order() -> Iterator[Tensor]:
            for batch in self._order(generator):
                asked.append(batch)
                yield batch

        part = self.ranks.part
        for inputs in self.split.read(order(), device=self.device, part=part, generator=generator, epoch=epoch):
            yield inputs, self.split.labels[part(asked.popleft())].to(self.device)

    def _order(self, generator: torch.Generator) -> Iterator[Tensor]:
        if self.classes_per_batch:
            return class_batches(self.split.labels, self.batch_size, self.classes_per_batch, len(self), generator)
        return iter(epoch_order(len(self.split), self.batch_size, generator, self.ranks.count))
