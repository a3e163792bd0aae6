"""Where data sets come from: built in, downloaded, or written by the user."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import TorchsliceError
from ..imports import call, import_object, import_torchvision
from ..registry import Registry, unknown
from .build import task
from .folder import in_memory, read_folder
from .images import Images
from .task import Task
from .text import Texts, tokenizer_record
from .textfiles import TEXTS, Labelled, read_csv

DIGITS = tuple("0123456789")

SOURCES: Registry[Callable[..., Task]] = Registry("data set")


def names() -> list[str]:
    """Names of the data sets that `load` knows."""
    return [*SOURCES, *TEXTS]


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    seed: int = 0,
    validation_fraction: float = 0.1,
    download: bool = True,
    **options: Any,
) -> Task:
    """Load a data set by name, "folder:PATH", "csv:PATH" or "package.module:function".

    `seed` draws the validation split from the training data; the test split never depends on it. `data_dir` holds the
    files of the named data sets (default: the environment variable TORCHSLICE_DATA, else ~/.cache/torchslice); missing
    ones are downloaded if `download`. A folder has one sub-folder per class, or these inside train, validation and
    test; its options are those of `folder.read_folder`, such as `image_size`. A CSV file, or a folder with train.csv
    and perhaps validation.csv and test.csv, has a header with the columns text and label. Data sets of texts take the
    options `tokenizer` (a folder, or an object of transformers; on the command line an hf:PATH brings its own) and
    `max_length` (tokens after which a text is cut). A function gets the options and returns a Task, for instance by
    `data.task`.

    >>> load("digits")
    Task(digits: 10 classes, train: 1295 images of 1x8x8, validation: 143, test: 359)
    """
    kind, _, rest = str(name).partition(":")
    what, split = f"data set {name!r}", {"seed": seed, "validation_fraction": validation_fraction}
    if kind == "folder":
        return call(partial(read_folder, rest), what, **split, **options)
    if kind == "csv":
        path = Path(rest).expanduser()
        return call(partial(_tokenised, read_csv(path), path.stem, split), what, **options)
    if rest:
        made = call(import_object(name), what, **options)
        if not isinstance(made, Task):
            raise TorchsliceError(
                f"{what} returned a {type(made).__name__}; it must return a Task, such as torchslice.data.task makes."
            )
        return made
    if name not in names():
        raise unknown("data set", name, [*names(), "folder:PATH", "csv:PATH", "package.module:function"])
    where = Path(data_dir or os.environ.get("TORCHSLICE_DATA") or "~/.cache/torchslice").expanduser()
    if name in TEXTS:
        return call(partial(_tokenised, TEXTS[name](where), name, split), what, **options)
    if options:
        raise TorchsliceError(f"{what} takes no options; got {', '.join(options)}.")
    return SOURCES[name](data_dir=where, download=download, split=split)


@SOURCES.register("digits")
def digits(data_dir: Path, download: bool, split: dict[str, Any]) -> Task:
    """Return the 1,797 hand-written digits that come with scikit-learn, 8x8, grey."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().byte().unsqueeze(1)  # [n, 1, 8, 8], were 0..16
    return task(Images(images, torch.from_numpy(bunch.target)), classes=DIGITS, name="digits", **split)


def _from_torchvision(
    name: str,
    class_name: str,
    files: str,
    *,
    data_dir: Path,
    download: bool,
    split: dict[str, Any],
    crop_padding: int,
    flip: bool,
) -> Task:
    """Read a data set through its torchvision class; `files` says in an error what is expected in `data_dir`."""
    dataset_class = getattr(import_torchvision().datasets, class_name)
    parts = {}
    for part in ("train", "test"):
        choice = {"split": part} if class_name == "SVHN" else {"train": part == "train"}
        try:
            dataset = _read_or_download(dataset_class, data_dir, (data_dir / files).parent, download, choice)
            parts[part] = _to_images(dataset, crop_padding, flip)
        except Exception as error:  # damaged files make the readers raise nearly anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TorchsliceError(
                f"data set {name!r} could not be read{' or downloaded' if download else ''} ({reason}). Expected: "
                f"{data_dir / files}. Put the files there, remove damaged ones, or name another folder: data_dir= "
                f"or TORCHSLICE_DATA."
            ) from error
    classes = DIGITS if class_name in ("MNIST", "SVHN") else dataset.classes
    return task(parts["train"], test=parts["test"], classes=classes, name=name, **split)


def _read_or_download(dataset_class: Any, data_dir: Path, folder: Path, download: bool, choice: dict[str, Any]) -> Any:
    """Read what is in `data_dir`, else download it; a download that fails leaves no empty folder behind."""
    try:
        return dataset_class(data_dir, download=False, **choice)
    except Exception:
        if not download:
            raise
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        return dataset_class(data_dir, download=True, **choice)
    except BaseException:  # Ctrl-C too
        for place in new:
            with contextlib.suppress(OSError):  # it was not made, or holds what did arrive
                place.rmdir()
        raise


def _to_images(dataset: Any, crop_padding: int, flip: bool) -> Images:
    images = torch.as_tensor(dataset.data)  # [n, H, W], [n, H, W, 3] or [n, 3, H, W]
    if images.dim() == 3:
        images = images.unsqueeze(1)
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2).contiguous()
    labels = torch.as_tensor(dataset.labels if hasattr(dataset, "labels") else dataset.targets)
    return Images(images, labels, crop_padding=crop_padding, flip=flip)


_MNIST_FILES = "raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"
_TORCHVISION = {
    # name: (class in torchvision.datasets, files, crop padding in pixels, flip)
    "mnist": ("MNIST", f"MNIST/{_MNIST_FILES}", 2, False),
    "fashion-mnist": ("FashionMNIST", f"FashionMNIST/{_MNIST_FILES}", 2, True),
    "cifar10": ("CIFAR10", "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}", 2, True),
    "svhn": ("SVHN", "{train,test}_32x32.mat", 4, False),
}
for _name, (_class, _files, _padding, _flip) in _TORCHVISION.items():
    SOURCES.register(_name)(partial(_from_torchvision, _name, _class, _files, crop_padding=_padding, flip=_flip))


@SOURCES.register("cifar100")
def cifar100(data_dir: Path, download: bool, split: dict[str, Any]) -> Task:
    """Return CIFAR-100 from cifar100/{train,test}/CLASS/*.png if they are there, else from the published files."""
    folder = data_dir / "cifar100"
    augmentation: dict[str, Any] = {"crop_padding": 2, "flip": True}
    if not folder.is_dir():
        where: dict[str, Any] = {"data_dir": data_dir, "download": download, "split": split}
        return _from_torchvision("cifar100", "CIFAR100", "cifar-100-python/{train,test,meta}", **where, **augmentation)
    (train, classes), (test, same) = (in_memory(folder / part, **augmentation) for part in ("train", "test"))
    if same != classes:
        raise TorchsliceError(f"the classes in {folder / 'test'} are not those in {folder / 'train'}.")
    return task(train, test=test, classes=classes, name="cifar100", **split)


# -- texts --------------------------------------------------------------------------------------------------------
def _tokenised(
    parts: dict[str, Labelled], name: str, split: dict[str, Any], tokenizer: Any = None, max_length: int | None = None
) -> Task:
    """Return the task of texts and the names of their labels, per split; classes are in alphabetical order."""
    classes = sorted({label for _, labels in parts.values() for label in labels})
    splits: dict[str, Any] = {
        part: Texts(tuple(texts), torch.tensor([classes.index(label) for label in labels]), max_length=max_length)
        for part, (texts, labels) in parts.items()
    }
    made = task(**splits, classes=classes, name=name, **split)
    return made if tokenizer is None else made.like(tokenizer_record(tokenizer))
