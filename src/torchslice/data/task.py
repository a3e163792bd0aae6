"""A task: what a classifier is trained and judged on, as three splits and the names of the classes.

Shapes: n samples of a split, B batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..errors import TorchsliceError
from ..inputs import Inputs
from ..registry import unknown
from .splits import Split, limit
from .text import Texts

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Task:
    """Train, validation and test splits of one kind of samples, and the names of their classes.

    Made by `data.load` or `data.task`. The validation split is for choices, the test split for figures that are
    reported; no verb of torchslice looks at the latter but those that judge.

    >>> task
    Task(digits: 10 classes, train: 1295 images of 1x8x8, validation: 143, test: 359)
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split

    def __post_init__(self) -> None:
        if len(set(self.classes)) < len(self.classes):
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            raise TorchsliceError(f"{self.name}: class {twice!r} is named twice; name every class once.")
        for name in SPLITS:
            labels = self.split(name).labels
            if len(labels) == 0:
                raise TorchsliceError(f"{self.name}, {name} split: it has no samples. Every split needs some.")
            if int(labels.max()) >= len(self.classes):
                raise TorchsliceError(
                    f"{self.name}, {name} split: there is a label {int(labels.max())}, but {len(self.classes)} classes "
                    f"are named; labels must be in 0..{len(self.classes) - 1}."
                )

    def split(self, name: str) -> Split:
        """Return the split of a name, one of train, validation and test."""
        if name not in SPLITS:
            raise unknown("split", name, SPLITS)
        return getattr(self, name)

    @property
    def example(self) -> Inputs:
        """Two training samples as a model takes them, on the CPU; of texts those that ask most of a model."""
        rows = self.train.hardest if isinstance(self.train, Texts) else torch.arange(min(2, len(self.train)))
        return next(iter(self.train.read([rows])))

    @property
    def preprocessing(self) -> dict[str, Any] | None:
        """What a deployed model must know of its inputs, as plain data."""
        return self.train.preprocessing

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        part: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[tuple[Inputs, Tensor]]:
        """Yield inputs and labels [B] of a split in its order, not augmented; of `part` of the samples if it is given.

        >>> sum(len(labels) for inputs, labels in task.batches("validation", 64))
        143
        """
        if batch_size < 1:
            raise TorchsliceError(f"batch_size must be at least 1, got {batch_size}.")
        chosen, rows = self.split(split), torch.arange(len(self.split(split)))
        batches = [b for b in (rows if part is None else part(rows)).split(batch_size) if len(b)]
        for inputs, own in zip(chosen.read(batches, device=device), batches, strict=True):
            yield inputs, chosen.labels[own].to(device)

    def class_indices(self, names: Sequence[str]) -> list[int]:
        """Return the labels of the named classes, in the order given."""
        for name in names:
            if name not in self.classes:
                raise unknown(f"class of {self.name}:", name, self.classes)
        if not names or len(set(names)) < len(names):
            raise TorchsliceError(f"name at least one class, each once; got {', '.join(names) or 'none'}.")
        return [self.classes.index(name) for name in names]

    def sub_task_labels(self, names: Sequence[str]) -> list[int]:
        """Return the labels of the classes of a sub-model, rising; raise unless there are two to tell apart.

        >>> task.sub_task_labels(["8", "3"])
        [3, 8]
        """
        labels = sorted(self.class_indices(names))
        if len(labels) < 2:
            raise TorchsliceError(f"a sub-model needs at least two classes, got {names[0]!r} alone; add one to it.")
        return labels

    def restrict(self, names: Sequence[str]) -> Task:
        """Return the task of some classes, labels 0, 1, ... in the order given.

        >>> task.restrict(["3", "8"]).classes
        ('3', '8')
        """
        indices = self.class_indices(names)
        new_label = torch.full((len(self.classes),), -1)
        new_label[indices] = torch.arange(len(indices))

        def pick(split: Split) -> Split:
            labels = new_label[split.labels]
            return split.take(labels >= 0).relabelled(labels[labels >= 0])

        return self._with({name: pick(self.split(name)) for name in SPLITS}, classes=tuple(names))

    def limit(
        self, *, train: int | None = None, validation: int | None = None, test: int | None = None, seed: int = 0
    ) -> Task:
        """Return the task with at most so many random samples per split, for smaller experiments."""
        counts = {"train": train, "validation": validation, "test": test}
        splits = {name: limit(self.split(name), n, seed=seed) for name, n in counts.items() if n is not None}
        return self._with(splits)

    def like(self, preprocessing: Mapping[str, Any] | None) -> Task:
        """Return the same samples with inputs made as another task's were; None leaves them as they are."""
        if preprocessing is None:
            return self
        try:
            return self._with({name: self.split(name).like(preprocessing) for name in SPLITS})
        except (KeyError, TypeError) as error:
            raise TorchsliceError(
                f"inputs of {self.name} cannot be made as {str(preprocessing)[:80]} says ({error!r}); it must be "
                "what the preprocessing of a task says."
            ) from error

    def _with(self, splits: Mapping[str, Split], **others: Any) -> Task:
        changed: dict[str, Any] = {**splits, **others}
        return replace(self, **changed)

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that identify the samples of the three splits and their order (SHA-256)."""
        digest = hashlib.sha256()
        for name in SPLITS:
            self.split(name).update(digest)
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        others = f"validation: {len(self.validation)}, test: {len(self.test)}"
        return f"Task({self.name}: {len(self.classes)} classes, train: {self.train!r}, {others})"


def check_task(task: Task, neurons: Any = None) -> None:
    """Raise unless this is a task, and of the classes of these neurons, in their order where they have names."""
    if not isinstance(task, Task):
        raise TorchsliceError(f"expected a Task, got {type(task).__name__}; make one: torchslice.data.task(train=...).")
    count, classes = (getattr(neurons, name, None) for name in ("num_classes", "classes"))
    if classes is not None and tuple(classes) != task.classes:
        first = next(i for i, pair in enumerate(zip_longest(classes, task.classes)) if pair[0] != pair[1])
        own, given = (f"{names[first]!r}" if first < len(names) else "nothing" for names in (classes, task.classes))
        raise TorchsliceError(
            f"logit {first} of the network is {own}, and class {first} of {task.name} is {given}; give "
            "task.restrict(neurons.classes), which has the classes of the network in its order."
        )
    if count not in (None, len(task.classes)):
        raise TorchsliceError(
            f"the model answers with {count} classes and {task.name} has {len(task.classes)}; "
            "give the task it was trained on."
        )


def joined(known: Task, new: Task) -> Task:
    """Return the task of all classes of two, the known ones first.

    >>> joined(task.restrict(["3", "8"]), task.restrict(["0"])).classes
    ('3', '8', '0')
    """
    for name in SPLITS:
        if type(known.split(name)) is not type(new.split(name)):
            raise TorchsliceError(
                f"{known.name} and {new.name} keep their samples in different ways ({known.split(name)!r}; "
                f"{new.split(name)!r}); make both alike, with data.task or data.load."
            )

    def both(name: str) -> Split:
        one, other = known.split(name), new.split(name)
        return one.join(other.relabelled(other.labels + len(known.classes)))

    classes = (*known.classes, *new.classes)
    return known._with({name: both(name) for name in SPLITS}, name=f"{known.name} and {new.name}", classes=classes)
