"""Labelled images in memory, as three splits.

Shapes: n images, ch channels, H height, W width, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import TorchsliceError
from ..registry import unknown

TEST_SHARE = 0.2  # of the samples, where a data set has no test split of its own
TEST_SEED = 0  # fixed, so that no later run trains on what an earlier one reported


@dataclass(frozen=True, eq=False)
class Split:
    """Images, uint8 [n, ch, H, W], and their labels, int64 [n].

    >>> split = Split(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    >>> len(split.take(torch.tensor([0, 2])))
    2
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise TorchsliceError(
                f"images must be uint8 [n, channels, height, width], got {self.images.dtype} {list(self.images.shape)}."
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise TorchsliceError(
                f"{len(self.images)} images need int64 labels [{len(self.images)}], "
                f"got {self.labels.dtype} {list(self.labels.shape)}."
            )
        if len(self) and self.labels.min() < 0:
            raise TorchsliceError(f"labels must be 0, 1, 2, ..., got {int(self.labels.min())}.")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Split:
        """Return the samples that an index tensor or a bool mask [n] selects."""
        return Split(self.images[indices], self.labels[indices])

    def limit(self, count: int, *, seed: int = 0) -> Split:
        """Return at most `count` random samples, the same number of every class as far as there are enough."""
        if count < 1:
            raise TorchsliceError(f"a split must be limited to at least 1 sample, not to {count}.")
        if count >= len(self):
            return self
        drawn = rank_in_class(self.labels, seed).argsort(stable=True)[:count]
        return self.take(drawn.sort().values)

    def __repr__(self) -> str:
        return f"Split({len(self)} images of {'x'.join(map(str, self.images.shape[1:]))})"


@dataclass(frozen=True, eq=False)
class Data:
    """A data set: train, validation and test splits, class names, and what preprocessing needs.

    `mean` and `std` are per channel, of images / 255, measured on the training images. `crop_padding` (pixels, 0 is
    none) and `flip` say how training may augment; nothing is augmented here. Use `Data.build` to make one.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        shape = self.train.images.shape[1:]
        for part in ("train", "validation", "test"):
            split: Split = getattr(self, part)
            where = f"data set {self.name!r}, {part} split"
            if len(split) == 0:
                raise TorchsliceError(f"{where}: there are no images. Every split needs some of every class.")
            if split.images.shape[1:] != shape:
                raise TorchsliceError(
                    f"{where}: images are {list(split.images.shape[1:])}, the training images {list(shape)}; "
                    f"all must have one shape [channels, height, width]."
                )
            if split.labels.max() >= len(self.classes):
                raise TorchsliceError(
                    f"{where}: there is a label {int(split.labels.max())}, but {len(self.classes)} classes are named; "
                    f"labels must be in 0..{len(self.classes) - 1}."
                )

    @classmethod
    def build(
        cls,
        name: str,
        train: Split,
        test: Split | None = None,
        *,
        classes: Sequence[str],
        validation: Split | None = None,
        validation_share: float = 0.1,
        seed: int = 0,
        crop_padding: int = 0,
        flip: bool = False,
    ) -> Data:
        """Make a data set from its splits and measure its mean and std.

        Without a test split, a fifth of the training samples becomes one, always the same, whatever the seed. Without
        a validation split, `validation_share` in (0, 1) of the training samples becomes one. Both keep the proportions
        of the classes.

        >>> digits = Data.build("mine", Split(images, labels), classes=["cat", "dog"])
        """
        if test is None:
            train, test = hold_out(train, TEST_SHARE, seed=TEST_SEED)
        if validation is None:
            train, validation = hold_out(train, validation_share, seed=seed)
        mean, std = channel_statistics(train.images)
        return cls(name, tuple(classes), train, validation, test, mean, std, crop_padding, flip)

    @property
    def example(self) -> Tensor:
        """Two training images as a model takes them, float32 [2, ch, H, W]."""
        return self.normalise(self.train.images[:2])

    def normalise(self, images: Tensor) -> Tensor:
        """Return uint8 images [n, ch, H, W] as float32, on their device, with mean 0 and std 1 per channel."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return images.float().div_(255).sub_(mean).div_(std)

    def class_indices(self, names: Sequence[str]) -> list[int]:
        """Return the labels of the named classes, in the order given."""
        for name in names:
            if name not in self.classes:
                raise unknown(f"class of data set {self.name!r}:", name, self.classes)
        if not names or len(set(names)) < len(names):
            raise TorchsliceError(f"name at least one class, each once; got {', '.join(names) or 'none'}.")
        return [self.classes.index(name) for name in names]

    def restrict(self, names: Sequence[str]) -> Data:
        """Return the data set of some classes, labels 0, 1, ... in the order given; mean and std stay as they are."""
        indices = self.class_indices(names)
        new_label = torch.full((len(self.classes),), -1)
        new_label[indices] = torch.arange(len(indices))

        def pick(split: Split) -> Split:
            labels = new_label[split.labels]
            return Split(split.images[labels >= 0], labels[labels >= 0])

        splits: dict[str, Any] = {part: pick(getattr(self, part)) for part in ("train", "validation", "test")}
        return replace(self, classes=tuple(names), **splits)

    def limit(
        self, *, train: int | None = None, validation: int | None = None, test: int | None = None, seed: int = 0
    ) -> Data:
        """Return the data set with at most so many random samples per split, for smaller experiments."""
        counts = {"train": train, "validation": validation, "test": test}
        splits = {part: getattr(self, part).limit(n, seed=seed) for part, n in counts.items() if n is not None}
        return replace(self, **splits)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What a deployed model must know of its input, as plain data."""
        return {"mean": list(self.mean), "std": list(self.std), "input_shape": list(self.train.images.shape[1:])}

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that identify the samples of the three splits and their order (SHA-256)."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            for tensor in (split.images, split.labels):
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        counts = " / ".join(str(len(split)) for split in (self.train, self.validation, self.test))
        shape = "x".join(map(str, self.train.images.shape[1:]))
        return f"Data({self.name}: {len(self.classes)} classes, {counts} train / validation / test images of {shape})"


def rank_in_class(labels: Tensor, seed: int) -> Tensor:
    """Shuffle the samples of every class and return each sample's place among those of its class, int64 [n]."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    grouped = shuffled[labels[shuffled].argsort(stable=True)]  # [n] class by class, in random order within
    counts = labels.bincount()  # [C]
    first = counts.cumsum(0) - counts  # [C] where the class begins in `grouped`
    rank = torch.empty_like(labels)
    rank[grouped] = torch.arange(len(labels)) - first[labels[grouped]]
    return rank


def hold_out(split: Split, share: float, *, seed: int) -> tuple[Split, Split]:
    """Divide a split into the rest and a random `share` in (0, 1) of every class; each side gets one of it at least.

    A class with a single sample stays in the rest.
    """
    if not 0 < share < 1:
        raise TorchsliceError(f"the share of the samples to hold out must be between 0 and 1, got {share}.")
    counts = split.labels.bincount()  # [C]
    quota = (counts * share).round().clamp(min=1).minimum(counts - 1)
    held = rank_in_class(split.labels, seed) < quota[split.labels]  # [n]
    return split.take(~held), split.take(held)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of images / 255, exactly, from the counts of the 256 values.

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
