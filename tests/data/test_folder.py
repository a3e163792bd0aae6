"""A task from folders of image files, read when a batch needs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchslice import data
from torchslice.data import folder
from torchslice.errors import TorchsliceError
from torchslice.imports import import_optional

IMAGE = import_optional("PIL.Image", extra="vision")


def write_images(
    where: Path, *, count: int = 10, size: tuple[int, int] = (12, 10), mode: str = "RGB", kind: str = "png"
) -> None:
    """Write `count` images of one colour per class; class `red` is red, class `blue` blue."""
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        (where / name).mkdir(parents=True)
        for i in range(count):
            IMAGE.new("RGB", size, colour).convert(mode).save(where / name / f"{i}.{kind}")


def load(path: Path, **options) -> data.Task:
    return data.load(f"folder:{path}", workers=0, **options)


def pixels(task: data.Task, split: str = "train") -> torch.Tensor:
    return torch.cat([inputs for inputs, _ in task.batches(split, 64)])


def test_one_folder_per_class_is_split_into_three(tmp_path):
    write_images(tmp_path / "colours")
    (tmp_path / "colours" / "notes.txt").write_text("not a class")
    task = load(tmp_path / "colours", image_size=8, validation_fraction=0.25, mean=(0, 0, 0), std=(1, 1, 1))
    assert task.name == "colours" and task.classes == ("blue", "red")
    assert [len(task.train), len(task.validation), len(task.test)] == [12, 4, 4]
    for image, label in zip(pixels(task, "test"), task.test.labels, strict=True):
        assert image.shape == (3, 8, 8)
        expected = torch.tensor([0, 0, 200] if label == 0 else [200, 0, 0]) / 255
        torch.testing.assert_close(image.mean((1, 2)), expected)
    assert task.preprocessing == {"mean": [0, 0, 0], "std": [1, 1, 1], "input_shape": [3, 8, 8]}


@pytest.mark.parametrize("validation", ["validation", "val", "valid"])
def test_given_splits_are_kept(tmp_path, validation):
    for part, count in (("train", 6), (validation, 3), ("test", 2)):
        write_images(tmp_path / part, count=count)
    task = load(tmp_path)
    assert [len(task.train), len(task.validation), len(task.test)] == [12, 6, 4]


def test_only_missing_splits_are_made_from_the_training_images(tmp_path):
    write_images(tmp_path / "train", count=10)
    write_images(tmp_path / "test", count=3)
    task = load(tmp_path, validation_fraction=0.5)
    assert [len(task.train), len(task.validation), len(task.test)] == [10, 10, 6]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_images_of_every_mode_become_rgb(tmp_path, mode):
    write_images(tmp_path, mode=mode)
    assert load(tmp_path).example.shape == (2, 3, 10, 12)


def test_the_size_is_that_of_the_images_or_is_said_aloud(tmp_path, capsys):
    write_images(tmp_path / "one")
    assert load(tmp_path / "one").preprocessing["input_shape"] == [3, 10, 12] and capsys.readouterr().err == ""
    write_images(tmp_path / "two" / "train")
    write_images(tmp_path / "two" / "train" / "red", count=3, size=(30, 20))
    for file in (tmp_path / "two" / "train" / "red" / "red").iterdir():
        file.rename(tmp_path / "two" / "train" / "red" / f"large {file.name}")
    task = load(tmp_path / "two")
    assert task.preprocessing["input_shape"] == [3, 10, 10] and pixels(task).shape[1:] == (3, 10, 10)
    assert "scaled and cropped to 10 x 10 pixels; choose another size with image_size" in capsys.readouterr().err
    write_images(tmp_path / "large", size=(300, 260), count=4, kind="jpg")
    assert load(tmp_path / "large", validation_fraction=0.4).example.shape == (2, 3, 224, 224)
    assert "224 x 224" in capsys.readouterr().err
    assert load(tmp_path / "two", image_size=(6, 9)).example.shape == (2, 3, 6, 9) and not capsys.readouterr().err


def test_images_are_scaled_and_cropped_in_the_centre(tmp_path):
    wide = IMAGE.new("RGB", (12, 4), (0, 0, 0))
    wide.paste((255, 255, 255), (4, 0, 8, 4))  # a white square in the middle
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            wide.save(tmp_path / name / f"{i}.png")
    images = pixels(load(tmp_path, image_size=4, mean=(0, 0, 0), std=(1, 1, 1)))
    assert torch.equal(images, torch.ones_like(images))


def test_mean_and_deviation_are_measured_on_training_images_or_given(tmp_path):
    write_images(tmp_path)
    measured = load(tmp_path)
    # a channel is 200 / 255 in half of the images and 0 in the others; green is 0 everywhere
    assert measured.preprocessing["mean"] == pytest.approx([100 / 255, 0, 100 / 255], abs=0.03)
    assert measured.preprocessing["std"] == pytest.approx([100 / 255, 1 / 255, 100 / 255], abs=0.03)
    given = load(tmp_path, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))
    assert pixels(given)[:, 1].unique().tolist() == [-2]
    again = given.like(measured.preprocessing)
    assert torch.equal(pixels(again), pixels(measured)) and again.preprocessing == measured.preprocessing


def test_a_transform_of_ones_own_replaces_all_this(tmp_path):
    write_images(tmp_path)
    task = load(tmp_path, transform=lambda image: torch.full((2,), float(image.width)))
    assert task.example.tolist() == [[12, 12], [12, 12]] and "transform" in task.preprocessing
    named = load(tmp_path, transform="tests.data.test_folder:height")
    assert named.example.tolist() == [[10], [10]]
    assert named.preprocessing == {"transform": "tests.data.test_folder:height"}
    assert load(tmp_path, transform=height).preprocessing == {"transform": "height"}, "the same in every process"
    assert named.like(task.preprocessing).example.tolist() == [[10], [10]]
    with pytest.raises(TorchsliceError, match="as tests.data.test_folder:height makes them; name it"):
        load(tmp_path).like(named.preprocessing)


def height(image) -> torch.Tensor:
    return torch.tensor([float(image.height)])


def test_only_training_images_are_augmented(tmp_path):
    for name, colour in (("a", 250), ("b", 100)):
        (tmp_path / name).mkdir()
        for i in range(8):
            image = IMAGE.new("RGB", (6, 6), (0, 0, 0))
            image.paste((colour,) * 3, (0, 0, 2, 6))  # stripes on the left
            image.save(tmp_path / name / f"{i}.png")
    task = load(tmp_path, flip=True, crop_padding=1)
    rows = torch.arange(len(task.train))
    plain = next(task.train.read([rows]))
    augmented = next(task.train.read([rows], generator=torch.Generator().manual_seed(0)))
    assert torch.equal(plain, pixels(task)) and not torch.equal(plain, augmented)
    flipped = [(image[0, 3, -1] > image[0, 3, 0]).item() for image in augmented]
    assert 0 < sum(flipped) < len(flipped)


def test_files_are_opened_when_a_batch_needs_them(tmp_path, monkeypatch):
    write_images(tmp_path, count=60)
    opened = []
    monkeypatch.setattr(folder, "open_image", lambda path, real=folder.open_image: opened.append(path) or real(path))
    monkeypatch.setattr(folder, "MEASURED", 5)
    task = load(tmp_path)
    fingerprint = task.fingerprint
    assert len(opened) <= 5 + 2 * 3
    opened.clear()
    next(task.batches("test", 4))
    assert len(opened) == 4
    file = next((tmp_path / "red").iterdir())
    file.write_bytes(file.read_bytes() + b"\0")
    assert load(tmp_path).fingerprint != fingerprint


def test_workers_read_the_same(tmp_path):
    write_images(tmp_path, count=30)
    one, two = load(tmp_path), data.load(f"folder:{tmp_path}", workers=2)
    assert torch.equal(pixels(one), torch.cat([x for x, _ in two.batches("train", 8)]))


def test_a_folder_that_is_not_as_expected_is_explained(tmp_path):
    def error(**options) -> str:
        with pytest.raises(TorchsliceError) as caught:
            task = load(tmp_path / "colours", **options)
            pixels(task)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no folder" in error() and "one sub-folder of images per class" in error()
    (tmp_path / "colours").mkdir()
    assert "one sub-folder per class, each with at least one image" in error()
    write_images(tmp_path / "colours")
    assert "image_size must be at least 1 pixel, or (height, width); got 0" in error(image_size=0)
    assert "image_size must be" in error(image_size=(1, 2, 3))
    for name, bad in {"image_size": 1.5, "crop_padding": "x", "transform": 3}.items():
        assert f"{name} must be" in error(**{name: bad})
    with pytest.raises(TorchsliceError, match="workers must be a whole number, at least 0, got -1"):
        data.load(f"folder:{tmp_path / 'colours'}", workers=-1)
    for bad in (
        *({"mean": mean} for mean in ((0.5,), 0.5, "abc", (0.5, 0.5, float("nan")), (0.5, 0.5, "x"))),
        *({"std": std} for std in ((0.0, 1.0, 1.0), (1.0, 1.0, float("inf")), True)),
        {"mean": (0.5, 0.5, 0.5), "std": (1.0,)},
    ):
        assert "mean" in error(**bad) or "std" in error(**bad)
    assert "unexpected keyword argument 'image_siz'" in error(image_siz=8)
    broken = tmp_path / "colours" / "red" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    assert str(broken) in error() and "cannot be read as an image" in error()
    assert str(broken) in error(image_size=8)
    for file in (tmp_path / "colours" / "red").iterdir():
        file.unlink()
    assert "red" in error()


def test_a_single_class_is_refused(tmp_path):
    write_images(tmp_path)
    for file in [*(tmp_path / "red").iterdir()]:
        file.unlink()
    (tmp_path / "red").rmdir()
    with pytest.raises(TorchsliceError, match=r"has 1 class\(es\); a classifier needs at least two"):
        load(tmp_path)


def test_an_image_that_would_take_all_memory_is_refused(tmp_path):
    write_images(tmp_path)
    zlib, struct = pytest.importorskip("zlib"), pytest.importorskip("struct")
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "red" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    with pytest.raises(TorchsliceError, match="0.png cannot be read as an image"):
        pixels(load(tmp_path))


def test_splits_must_have_the_same_classes(tmp_path):
    write_images(tmp_path / "train")
    write_images(tmp_path / "test")
    (tmp_path / "test" / "red").rename(tmp_path / "test" / "green")
    with pytest.raises(TorchsliceError, match="test has the classes blue, green, the training images blue, red"):
        load(tmp_path)
