"""Samples of any structure, kept in memory.

Shapes: n samples of a split, B batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..inputs import Inputs, batch_size, check_like, describe, join, take, tensors
from .splits import Split, check_labels


@dataclass(frozen=True, eq=False)
class Stored(Split):
    """Inputs as a model takes them, a tensor or a tree of tensors with n samples each, and their labels, int64 [n].

    >>> split = Stored({"text": torch.zeros(3, 5, dtype=torch.int64), "age": torch.ones(3, 1)}, torch.tensor([0, 1, 1]))
    >>> [inputs["age"].shape for inputs in split.read([torch.tensor([0, 2])])]
    [torch.Size([2, 1])]
    """

    inputs: Inputs
    labels: Tensor
    preprocessing: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", check_labels(self.labels, batch_size(self.inputs)))

    def take(self, rows: Tensor) -> Stored:
        return replace(self, inputs=take(self.inputs, rows), labels=self.labels[rows])

    def join(self, other: Stored) -> Stored:
        check_like(other.inputs, self.inputs)
        labels = torch.cat([self.labels, other.labels])
        return replace(self, inputs=join([self.inputs, other.inputs]), labels=labels)

    def inputs_of(self, rows: Tensor) -> Inputs:
        return take(self.inputs, rows)

    def update(self, digest: Any) -> None:
        for tensor in (*tensors(self.inputs), self.labels):
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __repr__(self) -> str:
        return f"{len(self)} samples like {describe(take(self.inputs, slice(0, 1)))}"
