"""Make a task of whatever a user has: DataLoaders, datasets, lists of batches, functions that yield them, tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    default_collate,
)

from ..errors import TorchsliceError
from ..inputs import check_like, join, tensors
from .images import Images
from .samples import Samples, inputs_and_labels
from .splits import Split, hold_out
from .stored import Stored
from .task import Task
from .text import Texts

TEST_FRACTION = 0.2  # of the samples, where there is no test split
TEST_SEED = 0  # fixed, so that no later run trains on what an earlier one reported
MEMORY_GB = 4.0  # most that is kept in memory of batches that can only be read in order
MOST_CLASSES = 100_000  # that are counted where nobody names them


def task(
    train: Any,
    validation: Any = None,
    test: Any = None,
    *,
    classes: Sequence[str] | None = None,
    name: str = "task",
    validation_fraction: float = 0.1,
    seed: int = 0,
    preprocessing: dict[str, Any] | None = None,
) -> Task:
    """Make a task of any labelled samples; what is not given is split off the training samples.

    Each of train, validation and test may be
    - a DataLoader, or a dataset with `__getitem__` and `__len__` whose items are (inputs, label): it is read batch by
      batch, in torchslice's own order and batch size, with the loader's workers and collate function;
    - a list of batches (inputs, labels), a function that returns an iterator over them, a DataLoader over an
      IterableDataset, or a pair of tensors (inputs, labels): they are read once and kept in memory;
    - a split, such as `Images`.
    Inputs may be a tensor, a tuple or a dictionary of tensors; a batch may also be one dictionary with "labels", as
    the collators of transformers make it. Without a test split a fifth of the training samples
    becomes one, always the same; without a validation split `validation_fraction` of the rest, drawn by `seed`. Both
    keep the proportions of the classes.

    Args:
        classes: names of the classes, by label; by default the dataset's own, else "0", "1", ...
        preprocessing: what a deployed model must know of its inputs, as plain data; it is saved with sub-models.

    Raises TorchsliceError for loaders that yield something else, labels out of range, a class without training
    samples, a single class, and iterators that can be read once only.

    >>> inputs, labels = torch.randn(60, 4), torch.arange(60) % 3
    >>> ts.data.task((inputs, labels), classes=["a", "b", "c"])
    Task(task: 3 classes, train: 42 samples like a tensor float32 [1, 4], validation: 6, test: 12)
    """
    given = {"train": train, "validation": validation, "test": test}
    if classes is None:
        classes = class_names(train)
    splits = {key: as_split(value, key, classes) for key, value in given.items() if value is not None or key == "train"}
    first = splits["train"]
    if "test" not in splits:
        splits["train"], splits["test"] = hold_out(splits["train"], TEST_FRACTION, seed=TEST_SEED)
    if "validation" not in splits:
        splits["train"], splits["validation"] = hold_out(splits["train"], validation_fraction, seed=seed)
    if isinstance(splits["train"], Images):
        if preprocessing is not None:
            raise TorchsliceError("preprocessing= plays no part with Images, which have mean= and std=; leave it out.")
        splits["train"] = splits["train"].measured()
        about = splits["train"].preprocessing
        splits = {key: split if getattr(split, "mean", True) else split.like(about) for key, split in splits.items()}
    elif preprocessing is not None:
        splits = {key: replace(split, preprocessing=preprocessing) for key, split in splits.items()}  # type: ignore
    count = int(first.labels.max()) + 1 if len(first) else 0
    names = tuple(str(label) for label in range(count)) if classes is None else tuple(map(str, classes))
    made = Task(name, names, splits["train"], splits["validation"], splits["test"])
    if len(names) < 2:
        raise TorchsliceError(f"{name} has {len(names)} class(es); a classifier needs at least two.")
    counts = made.train.labels.bincount(minlength=len(names))
    if not counts.all():
        missing = names[int(counts.argmin())]
        raise TorchsliceError(f"class {missing!r} of {name} has no training sample; leave it out, or give some.")
    if isinstance(made.train, Texts):  # which may have no tokens yet, and are alike as they are
        return made
    example = made.example
    for part in ("validation", "test"):
        if given[part] is not None:
            try:
                check_like(next(iter(made.split(part).read([torch.arange(1)]))), example, padded=True)
            except TorchsliceError as error:
                raise TorchsliceError(f"{name}, {part} split, unlike the training samples: {error}") from error
    return made


def as_split(given: Any, what: str, classes: Sequence[str] | None) -> Split:
    """Return what a user gave as a split; `what` names it in errors."""
    if isinstance(given, Split):
        return given
    if isinstance(given, DataLoader) and not isinstance(given.dataset, IterableDataset):
        return _of_dataset(given.dataset, what, classes, given)
    pair = isinstance(given, tuple | list) and len(given) == 2
    if pair and isinstance(given[1], Tensor) and given[1].dim() == 1:
        return _checked(Stored(*given), what, classes)
    if isinstance(given, type):
        raise TorchsliceError(f"{what} must be an object, such as a DataLoader; got the class {given.__name__}.")
    if hasattr(given, "__getitem__") and hasattr(given, "__len__") and not isinstance(given, list | tuple | dict):
        return _of_dataset(given, what, classes, None)
    return _stored(_batches(given, what), what, classes)


def class_names(given: Any) -> Sequence[str] | None:
    """Return the names of the classes of the dataset behind a loader or a subset, if it has any."""
    while given is not None:
        names = getattr(given, "classes", None)
        if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
            return names
        given = getattr(given, "dataset", None)
    return None


# -- batches that can only be read in order -----------------------------------------------------------------------
def _batches(given: Any, what: str) -> Iterator[Any]:
    """Return an iterator over batches that starts anew at each call of this function."""
    again = given() if callable(given) and not isinstance(given, DataLoader) else given
    if not isinstance(again, Iterable):
        raise TorchsliceError(
            f"{what} must be a DataLoader, a dataset, or batches (inputs, labels); got {type(given).__name__}."
        )
    if again is given and isinstance(given, Iterator):
        raise TorchsliceError(
            f"{what} is an iterator ({type(given).__name__}), which can be read only once. Give a function that "
            "returns a new one, a list of batches, or a DataLoader."
        )
    return iter(again)


def _stored(batches: Iterator[Any], what: str, classes: Sequence[str] | None) -> Stored:
    """Read all batches into memory; each is checked before it is kept."""
    parts: list[Any] = []
    labels: list[Tensor] = []
    used = 0
    for batch in batches:
        own = _checked(_labelled(batch, what), what, classes)
        if parts:
            check_like(own.inputs, parts[0])
        used += sum(tensor.numel() * tensor.element_size() for tensor in tensors(own.inputs))
        if used > MEMORY_GB * 2**30:
            raise TorchsliceError(
                f"the batches of {what} take more than {MEMORY_GB:g} GiB of memory. Give a DataLoader over a dataset "
                "with __getitem__ and __len__, which is read batch by batch."
            )
        parts.append(own.inputs)
        labels.append(own.labels)
    if not parts:
        raise TorchsliceError(f"{what} yields no batch; give at least one batch (inputs, labels).")
    return Stored(join(parts), torch.cat(labels))


def _labelled(batch: Any, what: str) -> Stored:
    try:
        return Stored(*inputs_and_labels(batch))
    except TorchsliceError as error:
        raise TorchsliceError(f"{what}: {error}") from error


# -- datasets -----------------------------------------------------------------------------------------------------
def _of_dataset(dataset: Any, what: str, classes: Sequence[str] | None, loader: DataLoader[Any] | None) -> Samples:
    """Return the samples of a map-style dataset, read as its loader does."""
    rows = torch.arange(len(dataset))
    collate: Callable[[list[Any]], Any] = default_collate
    workers = 0
    if loader is not None:
        sampler = loader.sampler
        if isinstance(sampler, SubsetRandomSampler):
            rows = torch.as_tensor(list(sampler.indices))
        elif not _is_plain(loader):
            raise TorchsliceError(
                f"{what}: its sampler ({type(sampler).__name__}) would be replaced, as torchslice draws batches "
                "itself. Give the dataset, or a function that yields the batches as they shall be."
            )
        collate, workers = loader.collate_fn or default_collate, loader.num_workers
    if not len(dataset):
        raise TorchsliceError(f"{what}: the dataset is empty; give at least one sample.")
    labels = _known_labels(dataset)
    if labels is None:
        everything = DataLoader(dataset, batch_size=64, num_workers=workers, collate_fn=collate)
        labels = torch.cat([_labelled(batch, what).labels for batch in everything])
    _checked(Stored(labels, labels), what, classes)
    return Samples(dataset, rows, labels[rows], collate=collate, workers=workers)


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Tell whether a loader reads every sample once, in order or at random, in batches."""
    sampler, whole = loader.sampler, len(loader.dataset)  # type: ignore[arg-type]
    once = isinstance(sampler, SequentialSampler | RandomSampler) and len(sampler) == whole
    replaces = isinstance(sampler, RandomSampler) and sampler.replacement
    return once and not replaces and type(loader.batch_sampler) in (BatchSampler, type(None))


def _known_labels(dataset: Any) -> Tensor | None:
    """Return the labels of a dataset where it tells them without reading its items, int64 [n]."""
    if isinstance(dataset, Subset):
        inner = _known_labels(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(list(dataset.indices))]
    if isinstance(dataset, ConcatDataset):
        parts = [_known_labels(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else torch.cat([part for part in parts if part is not None])
    if getattr(dataset, "target_transform", None) is not None:
        return None
    for key in ("targets", "labels"):
        try:
            found = torch.as_tensor(getattr(dataset, key, None))
        except (TypeError, ValueError, RuntimeError):
            continue
        if found.shape == (len(dataset),) and not found.is_floating_point():
            return found.long()
    return None


def _checked(split: Stored, what: str, classes: Sequence[str] | None) -> Stored:
    """Return the samples; raise for labels that are no class."""
    most, labels = MOST_CLASSES if classes is None else len(classes), split.labels
    if len(labels) and int(labels.max()) >= most:
        raise TorchsliceError(f"{what} has a label {int(labels.max())}; labels must be whole numbers in 0..{most - 1}.")
    return split
