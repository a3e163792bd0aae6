"""A data set from a folder of image files."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..errors import TorchsliceError
from ..imports import import_optional
from .splits import Data, Split

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def read_folder(
    path: str | Path,
    *,
    seed: int = 0,
    validation_share: float = 0.1,
    image_size: int = 32,
    crop_padding: int = 0,
    flip: bool = False,
) -> Data:
    """Read a folder with one sub-folder of images per class, or with train, validation and test folders of that form.

    Images become RGB, scaled and centre-cropped to `image_size` x `image_size` pixels. A missing validation or test
    folder is made up for from the training images.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise TorchsliceError(f"there is no folder {root}. It should hold one sub-folder of images per class.")
    if image_size < 1:
        raise TorchsliceError(f"image_size must be at least 1 pixel, got {image_size}.")
    train = _first_folder(root, "train")
    validation = _first_folder(root, "validation", "val", "valid") if train else None
    test = _first_folder(root, "test") if train else None
    classes = _class_folders(train or root)
    if not classes:
        raise TorchsliceError(f"{train or root} has no sub-folder; it should hold one sub-folder of images per class.")
    read = partial(_read_split, classes=classes, image_size=image_size)
    return Data.build(
        root.resolve().name,
        read(train or root),
        read(test) if test else None,
        classes=classes,
        validation=read(validation) if validation else None,
        validation_share=validation_share,
        seed=seed,
        crop_padding=crop_padding,
        flip=flip,
    )


def _first_folder(root: Path, *names: str) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _read_split(folder: Path, classes: list[str], image_size: int) -> Split:
    """Read the images of every class folder, in the order of their names."""
    image_module = import_optional("PIL.Image", extra="vision")
    image_operations = import_optional("PIL.ImageOps", extra="vision")
    found = _class_folders(folder)
    if found != classes:
        raise TorchsliceError(
            f"{folder} has the classes {', '.join(found) or 'none'}, the training images {', '.join(classes)}; "
            f"they must be the same."
        )
    images, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(file for file in (folder / name).rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise TorchsliceError(f"{folder / name} holds no image. Known kinds: {' '.join(SUFFIXES)}.")
        for file in files:
            try:
                with image_module.open(file) as image:
                    fitted = image_operations.fit(image.convert("RGB"), (image_size, image_size))
            except (OSError, SyntaxError, ValueError) as error:
                raise TorchsliceError(f"{file} cannot be read as an image ({error}). Mend or remove it.") from error
            images.append(np.array(fitted))
            labels.append(label)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()  # [n, 3, H, W]
    return Split(stacked, torch.tensor(labels))
