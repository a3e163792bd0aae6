"""Data sets from folders of image files."""

from pathlib import Path

import pytest
import torch

from torchslice import data
from torchslice.errors import TorchsliceError
from torchslice.imports import import_optional


def write_images(folder: Path, *, count: int = 10, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> None:
    """Write `count` images of one colour per class; class `red` is red, class `blue` blue."""
    image = import_optional("PIL.Image", extra="vision")
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image.new("RGB", size, colour).convert(mode).save(folder / name / f"{i}.png")


def test_one_folder_per_class_is_split_into_three(tmp_path):
    write_images(tmp_path / "colours")
    (tmp_path / "colours" / "notes.txt").write_text("not a class")
    (tmp_path / "colours" / ".hidden").mkdir()
    loaded = data.load(f"folder:{tmp_path / 'colours'}", image_size=8, validation_share=0.25, crop_padding=1, flip=True)
    assert loaded.name == "colours" and loaded.classes == ("blue", "red")
    assert [len(loaded.train), len(loaded.validation), len(loaded.test)] == [12, 4, 4]
    assert loaded.train.images.shape[1:] == (3, 8, 8)
    for image, label in zip(loaded.test.images, loaded.test.labels, strict=True):
        assert image.float().mean((1, 2)).tolist() == ([0, 0, 200] if label == 0 else [200, 0, 0])
    assert loaded.crop_padding == 1 and loaded.flip


@pytest.mark.parametrize("validation", ["validation", "val", "valid"])
def test_given_splits_are_kept(tmp_path, validation):
    for part, count in (("train", 6), (validation, 3), ("test", 2)):
        write_images(tmp_path / part, count=count)
    loaded = data.load(f"folder:{tmp_path}")
    assert [len(loaded.train), len(loaded.validation), len(loaded.test)] == [12, 6, 4]
    assert loaded.train.images.shape[1:] == (3, 32, 32)


def test_only_missing_splits_are_made_from_the_training_images(tmp_path):
    write_images(tmp_path / "train", count=10)
    write_images(tmp_path / "test", count=3)
    loaded = data.load(f"folder:{tmp_path}", validation_share=0.5)
    assert [len(loaded.train), len(loaded.validation), len(loaded.test)] == [10, 10, 6]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_images_of_every_mode_become_rgb(tmp_path, mode):
    write_images(tmp_path, mode=mode)
    assert data.load(f"folder:{tmp_path}").train.images.shape[1:] == (3, 32, 32)


def test_images_are_scaled_and_cropped_in_the_centre(tmp_path):
    image = import_optional("PIL.Image", extra="vision")
    wide = image.new("RGB", (12, 4), (0, 0, 0))
    wide.paste((250, 250, 250), (4, 0, 8, 4))  # a white square in the middle
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            wide.save(tmp_path / name / f"{i}.png")
    images = data.load(f"folder:{tmp_path}", image_size=4).train.images
    assert torch.equal(images, torch.full_like(images, 250))


def test_a_folder_that_is_not_as_expected_is_explained(tmp_path):
    def error(**options) -> str:
        with pytest.raises(TorchsliceError) as caught:
            data.load(f"folder:{tmp_path / 'colours'}", **options)
        return str(caught.value)

    assert "there is no folder" in error() and "one sub-folder of images per class" in error()
    (tmp_path / "colours").mkdir()
    assert "colours has no sub-folder" in error()
    write_images(tmp_path / "colours")
    assert "image_size must be at least 1 pixel, got 0" in error(image_size=0)
    broken = tmp_path / "colours" / "red" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    assert str(broken) in error() and "cannot be read as an image" in error()
    for file in (tmp_path / "colours" / "red").iterdir():
        file.unlink()
    assert "red holds no image. Known kinds: .png" in error()


def test_splits_must_have_the_same_classes(tmp_path):
    write_images(tmp_path / "train")
    write_images(tmp_path / "test")
    (tmp_path / "test" / "red").rename(tmp_path / "test" / "green")
    with pytest.raises(TorchsliceError, match="test has the classes blue, green, the training images blue, red"):
        data.load(f"folder:{tmp_path}")
