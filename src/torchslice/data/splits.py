"""A split is labelled samples that can be read in any order; what is in a sample, and where it lies, is its own matter.

Shapes: n samples of a split, B batch, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from ..errors import TorchsliceError
from ..inputs import Inputs, to_device


class Split(ABC):
    """Labelled samples: a frozen dataclass.

    Attributes:
        labels: int64 [n].
        preprocessing: how the inputs are made, as plain data, or None.
    """

    labels: Tensor
    preprocessing: Any

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def take(self, rows: Tensor) -> Self:
        """Return the samples that an index tensor or a bool mask [n] selects."""

    def relabelled(self, labels: Tensor) -> Self:
        """Return the same samples with other labels, int64 [n]."""
        return replace(self, labels=labels)  # type: ignore[type-var]

    @abstractmethod
    def join(self, other: Self) -> Self:
        """Return these samples, then those of another split of the same kind."""

    def like(self, preprocessing: Mapping[str, Any]) -> Self:
        """Return the same samples with the inputs made as `preprocessing` says, as far as this split can."""
        return self

    def inputs_of(self, rows: Tensor) -> Inputs:
        """Return the inputs of a batch of indices, int64 [B], as a model takes them, on the CPU."""
        raise NotImplementedError

    def read(
        self,
        batches: Iterable[Tensor],
        *,
        device: torch.device | str = "cpu",
        part: Callable[[Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
        epoch: int = 1,
    ) -> Iterator[Inputs]:
        """Yield the inputs of every batch of indices, int64 [B], as a model takes them.

        `part` picks the rows of a batch that are this process's; with a generator, inputs are augmented as for
        training, in epoch `epoch`, counted from 1.
        """
        for rows in batches:
            yield to_device(self.inputs_of(rows if part is None else part(rows)), device)

    @abstractmethod
    def update(self, digest: Any) -> None:
        """Add what identifies the samples and their order to a hash."""


S = TypeVar("S", bound=Split)


def check_labels(labels: Any, count: int) -> Tensor:
    """Return labels as int64 [n]; raise unless they are `count` whole numbers of at least 0."""
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TorchsliceError(f"labels must be whole numbers, one for each of {count} samples ({error}).") from error
    if labels.shape != (count,) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TorchsliceError(
            f"{count} samples need labels that are whole numbers [{count}]; got {labels.dtype} {list(labels.shape)}."
        )
    if count and int(labels.min()) < 0:
        raise TorchsliceError(f"labels must be 0, 1, 2, ..., got {int(labels.min())}.")
    return labels.cpu().long()


def rank_in_class(labels: Tensor, seed: int) -> Tensor:
    """Shuffle the samples of every class and return each sample's place among those of its class, int64 [n]."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    grouped = shuffled[labels[shuffled].argsort(stable=True)]  # [n] class by class, in random order within
    counts = labels.bincount()  # [C]
    first = counts.cumsum(0) - counts  # [C] where the class begins in `grouped`
    rank = torch.empty_like(labels)
    rank[grouped] = torch.arange(len(labels)) - first[labels[grouped]]
    return rank


def limit(split: S, count: int, *, seed: int = 0) -> S:
    """Return at most `count` random samples, the same number of every class as far as there are enough.

    >>> len(limit(task.train, 50))
    50
    """
    if count < 1:
        raise TorchsliceError(f"a split must be limited to at least 1 sample, not to {count}.")
    if count >= len(split):
        return split
    return split.take(rank_in_class(split.labels, seed).argsort(stable=True)[:count].sort().values)


def hold_out(split: S, fraction: float, *, seed: int) -> tuple[S, S]:
    """Divide a split into the rest and a random fraction in (0, 1) of every class; each side gets one at least.

    A class with a single sample stays in the rest.
    """
    if not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise TorchsliceError(f"the fraction of the samples to hold out must be between 0 and 1, got {fraction!r}.")
    counts = split.labels.bincount()  # [C]
    quota = (counts * fraction).round().clamp(min=1).minimum(counts - 1)
    held = rank_in_class(split.labels, seed) < quota[split.labels]  # [n]
    return split.take(~held), split.take(held)
