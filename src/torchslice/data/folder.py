"""A task from a folder of image files, read from disk through torchvision's transforms and a DataLoader."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import TorchsliceError
from ..imports import import_object, import_optional, import_torchvision
from .build import task
from .images import Images
from .samples import Samples
from .task import Task

LARGEST = 224  # pixels; the size chosen for photographs
LOOKED_AT = 200  # images whose sizes are looked at
MEASURED = 500  # images whose mean and deviation are measured


@dataclass(frozen=True)
class Preparation:
    """How a file becomes an input: scaled and cropped to `size` (height, width), normalised; or by `transform`."""

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    transform: Callable[[Any], Tensor] | None = None
    crop_padding: int = 0
    flip: bool = False

    @cached_property
    def steps(self) -> Callable[[Any], Tensor]:
        """What is done to an image of the right size."""
        t = import_torchvision().transforms
        crop = t.RandomCrop(self.size, padding=self.crop_padding, padding_mode="reflect")
        augment = [crop] if self.crop_padding else []
        augment += [t.RandomHorizontalFlip()] if self.flip else []
        return t.Compose([*augment, t.ToTensor(), t.Normalize(self.mean, self.std)])

    def __call__(self, image: Any) -> Tensor:
        """Return the input, float32 [3, H, W], made of a PIL image."""
        if self.transform is not None:
            return self.transform(image)
        fit = import_optional("PIL.ImageOps", extra="vision").fit  # scales and centre-crops
        return self.steps(fit(image, self.size[::-1]))


@dataclass(frozen=True, eq=False)
class Files(Dataset[tuple[Tensor, int]]):
    """Image files and their labels; items are (input float32 [3, H, W], label)."""

    root: Path
    files: tuple[tuple[str, int], ...]
    preparation: Preparation

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        return self.preparation(open_image(path)), label

    def like(self, preprocessing: Mapping[str, Any]) -> Files:
        """Return the same files, prepared as a saved network needs them; raise where only a transform could do that."""
        if self.preparation.transform is None and "transform" in preprocessing:
            raise TorchsliceError(
                f"the network takes images as {preprocessing['transform']} makes them; name it with the option "
                "'transform=...' of the data."
            )
        if self.preparation.transform is not None or "input_shape" not in preprocessing:
            return self
        size = tuple(preprocessing["input_shape"][-2:])
        mean, std = (tuple(preprocessing.get(key, getattr(self.preparation, key))) for key in ("mean", "std"))
        return replace(self, preparation=replace(self.preparation, size=size, mean=mean, std=std))

    def update(self, digest: Any) -> None:
        """Add names and sizes of the files to a hash; their content is not read."""
        for path, label in self.files:
            relative = Path(path).relative_to(self.root)
            digest.update(f"{relative} {Path(path).stat().st_size} {label}\n".encode())


def read_folder(
    path: str | Path,
    *,
    seed: int = 0,
    validation_fraction: float = 0.1,
    image_size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    transform: Callable[[Any], Tensor] | str | None = None,
    crop_padding: int = 0,
    flip: bool = False,
    workers: int = 2,
) -> Task:
    """Read a folder with one sub-folder of images per class, or with train, validation and test folders of that form.

    Files are opened when a batch needs them, so a folder of any size fits. A missing validation or test folder is made
    up for from the training images.

    Args:
        image_size: pixels, one number or (height, width); images are scaled and centre-cropped to it. By default that
            of the images if they have one size of at most 224, else their usual shorter side, at most 224, which is
            said on standard error.
        mean, std: per channel, of pixels in [0, 1]; by default measured on 500 training images.
        transform: makes an input of a PIL image, instead of all this, such as `weights.transforms()` of torchvision or
            `timm.data.create_transform(...)`; or its name, "package.module:object".
        crop_padding, flip: augmentation in training.
        workers: processes that read ahead.
    """
    for name, value in {"crop_padding": crop_padding, "workers": workers}.items():
        if not isinstance(value, int) or value < 0:
            raise TorchsliceError(f"{name} must be a whole number, at least 0, got {value!r}.")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise TorchsliceError(f"there is no folder {root}. It should hold one sub-folder of images per class.")
    train = _first_folder(root, "train")
    classes, files = find_images(train or root)
    found = {"train": files}
    for name, folders in {"validation": ("validation", "val", "valid"), "test": ("test",)}.items():
        if train and (folder := _first_folder(root, *folders)):
            others, found[name] = find_images(folder)
            if others != classes:
                raise TorchsliceError(
                    f"{folder} has the classes {', '.join(others)}, the training images {', '.join(classes)}; they "
                    "must be the same."
                )
    own = import_object(transform) if isinstance(transform, str) else transform
    if own is not None and not callable(own):
        raise TorchsliceError(f"transform must be a function of an image, or its name, got {transform!r}.")
    if own is not None and (image_size or mean or std or crop_padding or flip):
        raise TorchsliceError("transform= makes the whole input; leave image_size, mean, std, crop_padding, flip out.")
    size = (0, 0) if own is not None else _size(image_size, files, root)
    plain = Preparation(size, transform=own)
    if own is None:
        measured = _statistics(Files(root, tuple(files), plain), seed) if mean is None or std is None else ((), ())
        plain = replace(plain, mean=_per_channel("mean", mean, measured[0]), std=_per_channel("std", std, measured[1]))
    about = {"mean": list(plain.mean), "std": list(plain.std), "input_shape": [3, *size]}
    if own is not None:
        about = {"transform": transform if isinstance(transform, str) else getattr(own, "__qualname__", repr(own))}
    training = replace(plain, crop_padding=crop_padding, flip=flip)

    def split(files: list[tuple[str, int]]) -> Samples:
        labels = torch.tensor([label for _, label in files])
        augmented = Files(root, tuple(files), training) if crop_padding or flip else None
        plain_files = Files(root, tuple(files), plain)
        return Samples(plain_files, torch.arange(len(files)), labels, augmented, workers=workers, preprocessing=about)

    splits: dict[str, Any] = {name: split(files) for name, files in found.items()}
    drawn: dict[str, Any] = {"validation_fraction": validation_fraction, "seed": seed}
    return task(**splits, classes=classes, name=root.resolve().name, **drawn)


def in_memory(folder: Path, **augmentation: Any) -> tuple[Images, list[str]]:
    """Read all image files of a folder with one sub-folder per class, RGB and of one size; return the classes too."""
    classes, files = find_images(folder)
    arrays = [np.asarray(open_image(path)) for path, _ in files]
    if len(shapes := {array.shape[:2] for array in arrays}) > 1:
        raise TorchsliceError(f"{folder} has images of {len(shapes)} sizes; all they must have one.")
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return Images(images, torch.tensor([label for _, label in files]), **augmentation), classes


def open_image(path: str) -> Any:
    """Open an image file as RGB."""
    return _taken(path, lambda image: image.convert("RGB"))


def _taken(path: str, take: Callable[[Any], Any]) -> Any:
    images = import_optional("PIL.Image", extra="vision")
    try:
        with images.open(path) as image:
            return take(image)
    except (OSError, SyntaxError, ValueError, images.DecompressionBombError) as error:
        raise TorchsliceError(f"{path} cannot be read as an image ({error}). Mend or remove it.") from error


def _first_folder(root: Path, *names: str) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def find_images(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Return the classes and the image files of a folder with one sub-folder per class, with their labels."""
    datasets = import_torchvision().datasets
    try:
        found = datasets.ImageFolder(folder)
    except FileNotFoundError as error:
        raise TorchsliceError(
            f"{error}. {folder} should hold one sub-folder per class, each with at least one image."
        ) from error
    return found.classes, found.samples


def _size(given: int | Sequence[int] | None, files: Sequence[tuple[str, int]], root: Path) -> tuple[int, int]:
    """Return height and width of the inputs."""
    if given is not None:
        sizes = tuple(given) if isinstance(given, Sequence) else (given, given)
        if len(sizes) != 2 or not all(isinstance(side, int) and side >= 1 for side in sizes):
            raise TorchsliceError(f"image_size must be at least 1 pixel, or (height, width); got {given}.")
        return sizes[0], sizes[1]
    looked_at = files[:: max(1, len(files) // LOOKED_AT)]
    seen = [_taken(path, lambda image: (image.height, image.width)) for path, _ in looked_at]
    if len(set(seen)) == 1 and max(seen[0]) <= LARGEST:
        return seen[0]
    side = min(LARGEST, statistics.median_low(min(shape) for shape in seen))
    print(
        f"{root}: images of several or large sizes are scaled and cropped to {side} x {side} pixels; "
        "choose another size with image_size.",
        file=sys.stderr,
    )
    return side, side


def _per_channel(name: str, given: Sequence[float] | None, measured: tuple[float, ...]) -> tuple[float, ...]:
    values, least = measured if given is None else given, 0.0 if name == "std" else -math.inf
    numbers = isinstance(values, Sequence) and all(isinstance(value, int | float) for value in values)
    if not numbers or len(values) != 3 or not all(least < value < math.inf for value in values):
        raise TorchsliceError(f"{name} must be three numbers{' above 0' if name == 'std' else ''}, got {given}.")
    return tuple(values)


def _statistics(files: Files, seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measure mean and deviation per channel on some of the files."""
    drawn = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:MEASURED].tolist()
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for index in drawn:
        pixels = files[index][0].double()
        sums += torch.stack([pixels.mean((1, 2)), pixels.square().mean((1, 2))])
    mean, square = sums / len(drawn)
    std = (square - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())
