"""Which samples make a batch: a global order per epoch, from all samples or from those of a few classes.

Shapes: n samples of a split, B batch.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..data import Task
from ..errors import TorchsliceError
from ..inputs import Inputs
from .objectives import Step
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
    labels: Tensor, batch_size: int, steps: Iterable[Step], generator: torch.Generator
) -> Iterator[tuple[Tensor, Step]]:
    """Yield for each step a batch of indices, int64 [B], of the classes that it is about, and the step.

    A batch of all classes is an ordinary one, from all samples; one of a few classes has them in equal parts, mixed.
    Samples come in a random order and start over, in another one, when all that could be taken have been.

    Args:
        labels: of the samples, int64 [n].
        steps: may be drawn by the same `generator`.
    """
    count = int(labels.max()) + 1
    rows = [*((labels == label).nonzero().flatten() for label in range(count)), torch.arange(len(labels))]
    waiting = [torch.empty(0, dtype=torch.int64)] * len(rows)

    def take(pool: int, size: int) -> Tensor:
        while len(waiting[pool]) < size:
            again = rows[pool][torch.randperm(len(rows[pool]), generator=generator)]
            waiting[pool] = torch.cat([waiting[pool], again])
        taken, waiting[pool] = waiting[pool].split([size, len(waiting[pool]) - size])
        return taken

    for step in steps:
        if len(step.classes) == count:
            yield take(count, batch_size), step
        else:
            each, more = divmod(batch_size, len(step.classes))
            places = torch.randperm(len(step.classes), generator=generator).tolist()
            parts = zip(step.classes, places, strict=True)
            batch = torch.cat([take(label, each + (place < more)) for label, place in parts])
            yield batch[torch.randperm(batch_size, generator=generator)], step


class Batches:
    """The training split on a device, in a new random order, and augmented anew, every epoch.

    The same (seed, epoch) gives the same global batches, whatever the number of processes; each process gets its part
    of every one. With `draw`, see `Drawn`, what a step minimises is drawn before its batch, by the same seed, and the
    batch has samples of the classes that it needs; an epoch is as long as without.

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
        draw: Callable[[torch.Generator], Step] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.split, self.seed, self.device = task.train, seed, device
        self.draw, self.ranks = draw, ranks or Ranks()
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
        self.batch_size = min(
            batch_size, len(self.split) - len(self.split) % self.ranks.count
        )  # all there are, at most
        counts = task.train.labels.bincount(minlength=len(task.classes))  # [C]
        if draw and not counts.all():
            raise TorchsliceError(
                f"class {task.classes[int(counts.argmin())]!r} of {task.name} has no training sample, so no batch of "
                "it can be drawn; leave it out with a model and a task of the other classes."
            )

    def __len__(self) -> int:
        """Number of batches, and so of steps, of an epoch."""
        return len(epoch_order(len(self.split), self.batch_size, torch.Generator(), self.ranks.count))

    def epoch(self, epoch: int) -> Iterator[tuple[Inputs, Tensor, Step | None]]:
        """Yield this process's part of every batch of an epoch: inputs, labels [B], and what was drawn for the step."""
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
        asked: deque[tuple[Tensor, Step | None]] = deque()  # batches that are being read

        def order() -> Iterator[Tensor]:
            for batch, step in self._order(generator):
                asked.append((batch, step))
                yield batch

        part = self.ranks.part
        for inputs in self.split.read(order(), device=self.device, part=part, generator=generator, epoch=epoch):
            batch, step = asked.popleft()
            yield inputs, self.split.labels[part(batch)].to(self.device), step

    def _order(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Step | None]]:
        if self.draw is None:
            whole = epoch_order(len(self.split), self.batch_size, generator, self.ranks.count)
            return ((batch, None) for batch in whole)
        steps = (self.draw(generator) for _ in range(len(self)))
        return class_batches(self.split.labels, self.batch_size, steps, generator)
