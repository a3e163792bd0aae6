"""Samples that a map-style dataset reads one by one, through PyTorch's DataLoader: nothing but a batch is in memory.

Shapes: n samples of a split, B batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, default_collate

from ..errors import TorchsliceError
from ..inputs import Inputs, batch_size, to_device
from .splits import Split, check_labels


@dataclass(frozen=True, eq=False)
class Samples(Split):
    """Samples of datasets whose items are (inputs, label).

    Attributes:
        dataset: a map-style dataset.
        rows: which of its items these samples are, int64 [n].
        labels: int64 [n]. Whatever a dataset says when it is read must agree with them, before relabelling.
        training: the same items, augmented, for training; by default `dataset`, with whatever it does.
        collate: makes a batch (inputs, labels) of a list of items.
        workers: processes that read ahead.
        original: labels that the dataset gives, int64 [n]; by default `labels`.
    """

    dataset: Dataset[Any]
    rows: Tensor
    labels: Tensor
    training: Dataset[Any] | None = None
    collate: Callable[[list[Any]], Any] = default_collate
    workers: int = 0
    original: Tensor | None = None
    preprocessing: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", check_labels(self.labels, len(self.rows)))
        if self.original is None:
            object.__setattr__(self, "original", self.labels)

    def take(self, rows: Tensor) -> Samples:
        assert self.original is not None
        return replace(self, rows=self.rows[rows], labels=self.labels[rows], original=self.original[rows])

    def join(self, other: Samples) -> Samples:
        assert self.original is not None and other.original is not None
        both: ConcatDataset[Any] = ConcatDataset([self.dataset, other.dataset])
        training: ConcatDataset[Any] = ConcatDataset([self.training or self.dataset, other.training or other.dataset])
        offset = len(self.dataset)  # type: ignore[arg-type]
        return replace(
            self,
            dataset=both,
            training=training,
            rows=torch.cat([self.rows, other.rows + offset]),
            labels=torch.cat([self.labels, other.labels]),
            original=torch.cat([self.original, other.original]),
        )

    def like(self, preprocessing: Mapping[str, Any]) -> Samples:
        if not hasattr(self.dataset, "like"):
            return self
        training = None if self.training is None else self.training.like(preprocessing)  # type: ignore[attr-defined]
        return replace(
            self, dataset=self.dataset.like(preprocessing), training=training, preprocessing=dict(preprocessing)
        )

    def read(
        self,
        batches: Iterable[Tensor],
        *,
        device: torch.device | str = "cpu",
        part: Callable[[Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
        epoch: int = 1,
    ) -> Iterator[Inputs]:
        assert self.original is not None
        dataset = self.dataset
        if generator is not None:
            seed = int(torch.randint(2**62, (), generator=generator))
            dataset = _Seeded(self.training or self.dataset, seed)
        few = isinstance(batches, list | tuple) and len(batches) <= 2  # not worth starting processes for
        asked: list[Tensor] = []  # batches that are under way

        def indices() -> Iterator[list[int]]:
            for rows in batches:
                asked.append(rows if part is None else part(rows))
                yield self.rows[asked[-1]].tolist()

        workers = 0 if few else self.workers
        own = torch.Generator()  # else the loader would draw from the user's random numbers
        kind: dict[str, Any] = {"num_workers": workers, "collate_fn": self.collate, "generator": own}
        reader = iter(DataLoader(dataset, batch_sampler=indices(), **kind))
        try:
            for batch in reader:
                rows = asked.pop(0)
                inputs, labels = inputs_and_labels(batch)
                if not torch.equal(labels, self.original[rows]):
                    raise TorchsliceError(
                        f"the dataset gives labels {labels.tolist()[:8]} for samples that were labelled "
                        f"{self.original[rows].tolist()[:8]} before; its items must be the same each time."
                    )
                yield to_device(inputs, device)
        except (TorchsliceError, RuntimeError) as error:
            raise _plain(error) from error
        finally:
            if workers:  # else they live until garbage is collected
                reader._shutdown_workers()  # type: ignore[attr-defined]

    def update(self, digest: Any) -> None:
        digest.update(self.labels.numpy().data)
        digest.update(self.rows.numpy().data)
        if hasattr(self.dataset, "update"):
            self.dataset.update(digest)

    def __repr__(self) -> str:
        return f"{len(self)} samples of {type(self.dataset).__name__}"


@dataclass(frozen=True)
class _Seeded(Dataset[Any]):
    """A dataset whose items are drawn from seeds of their own, whatever process reads them."""

    dataset: Dataset[Any]
    seed: int

    def __getitem__(self, index: int) -> Any:
        seed = (self.seed + index) % 2**32
        before, numbers = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed + index)
                random.seed(seed)
                np.random.seed(seed)
                return self.dataset[index]
        finally:
            random.setstate(before)
            np.random.set_state(numbers)


def inputs_and_labels(batch: Any) -> tuple[Inputs, Tensor]:
    """Return the inputs and the labels, int64 [B], of what a loader yields; raise where it is something else."""
    if isinstance(batch, Mapping) and "labels" in batch:  # as the collators of transformers make it
        batch = {name: entry for name, entry in batch.items() if name != "labels"}, batch["labels"]
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        what = f"{len(batch)} things" if isinstance(batch, tuple | list) else type(batch).__name__
        raise TorchsliceError(
            f"a loader must yield pairs (inputs, labels), where inputs may be a tensor, a tuple or a dictionary, or "
            f'one dictionary with "labels"; it yields {what}. Put several inputs into one tuple or dictionary.'
        )
    inputs, labels = batch
    return inputs, check_labels(labels, batch_size(inputs))


def _plain(error: Exception) -> Exception:
    """Return an error of a dataset or of a worker process as one of ours, in one line, where it is the user's."""
    text = str(error)
    if "Original Traceback" in text:  # of a worker: the last line says what it was
        text = text.strip().splitlines()[-1].partition(": ")[2]
    if "stack expects each tensor to be equal size" in text or "resize storage" in text:
        return TorchsliceError(
            "the samples of a batch have different shapes; bring them to one shape in the dataset's transform "
            f"(such as Resize and CenterCrop). PyTorch says: {text.splitlines()[0]}"
        )
    return TorchsliceError(text) if isinstance(error, TorchsliceError) else error
