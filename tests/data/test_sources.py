"""Data sets by name: built in, through torchvision, from a function of the user's."""

from __future__ import annotations

import gzip
import itertools
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from torchslice import data
from torchslice.data import sources
from torchslice.data.textfiles import TEXTS
from torchslice.errors import TorchsliceError
from torchslice.imports import import_torchvision


def write_mnist(folder: Path, name: str = "MNIST", *, train: int = 40, test: int = 20) -> Path:
    """Write a small data set in MNIST's format; every pixel of sample i is i, its label i % 10."""
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        numbers = (np.arange(count) % 256).astype(np.uint8)
        images = np.broadcast_to(numbers[:, None, None], (count, 28, 28)).tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, count, 28, 28) + images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2I", 0x801, count) + (np.arange(count) % 10).astype(np.uint8).tobytes()
        )
    return raw


def test_digits_are_built_in_and_balanced():
    digits = data.load("digits")
    assert [len(digits.train), len(digits.validation), len(digits.test)] == [1295, 143, 359]
    assert digits.train.images.shape[1:] == (1, 8, 8) and digits.classes == tuple("0123456789")
    assert int(digits.train.images.max()) == 255
    for split in (digits.train, digits.validation, digits.test):
        counts = split.labels.bincount()
        assert counts.max() - counts.min() <= 7
    assert not digits.train.flip and digits.train.crop_padding == 0
    assert digits.preprocessing["input_shape"] == [1, 8, 8]


def test_the_seed_and_the_fraction_choose_the_validation_split():
    first, again, other = (data.load("digits", seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(first.test.images, other.test.images)
    assert len(data.load("digits", validation_fraction=0.5).validation) == 719


def test_names_lists_every_data_set():
    assert data.names() == ["digits", "mnist", "fashion-mnist", "cifar10", "svhn", "cifar100", *TEXTS]


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_files_are_read_as_they_are(tmp_path, name, folder):
    write_mnist(tmp_path, folder)
    loaded = data.load(name, tmp_path, download=False, validation_fraction=0.25)
    assert [len(loaded.train), len(loaded.validation), len(loaded.test)] == [30, 10, 20]
    assert loaded.test.images[:, 0, 5, 5].tolist() == list(range(20))
    assert loaded.test.labels.tolist() == [i % 10 for i in range(20)]
    assert loaded.classes[9] == ("9" if name == "mnist" else "Ankle boot")


@pytest.mark.parametrize("layout", ["[n, H, W, 3]", "[n, 3, H, W]"])
def test_colour_images_become_channels_first(layout):
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)

    class Dataset:
        data = images if layout == "[n, 3, H, W]" else images.transpose(0, 2, 3, 1)
        targets = [0, 1, 2, 3, 4]

    split = sources._to_images(Dataset(), 2, True)
    assert split.images.is_contiguous() and np.array_equal(split.images.numpy(), images)
    assert split.labels.tolist() == [0, 1, 2, 3, 4] and split.flip and split.crop_padding == 2


def test_the_folder_comes_from_the_environment_or_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHSLICE_DATA", str(tmp_path / "named"))
    with pytest.raises(TorchsliceError, match=r"named/MNIST/raw/\{train,t10k\}-\{images-idx3,labels-idx1\}-ubyte"):
        data.load("mnist", download=False)
    write_mnist(tmp_path / "named")
    assert len(data.load("mnist", download=False).test) == 20
    monkeypatch.delenv("TORCHSLICE_DATA")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(TorchsliceError, match=r"home/\.cache/torchslice/MNIST"):
        data.load("mnist", download=False)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100", "svhn"])
def test_missing_files_are_an_error_that_says_where_they_belong(tmp_path, name):
    with pytest.raises(TorchsliceError) as caught:
        data.load(name, tmp_path, download=False)
    text = str(caught.value)
    assert text.startswith(f"data set {name!r} could not be read (") and f"Expected: {tmp_path}/" in text
    assert "Put the files there" in text and "data_dir=" in text and "\n" not in text
    assert list(tmp_path.iterdir()) == []


def write_cifar100(folder, parts=("train", "test"), classes=("apple", "beaver"), size=32):
    for part, name in itertools.product(parts, classes):
        (folder / "cifar100" / part / name).mkdir(parents=True)
        for number in range(4):
            shade = 10 * number + (name == "beaver")
            Image.new("RGB", (size, size), (shade, 0, 255)).save(folder / "cifar100" / part / name / f"{number}.png")


def test_cifar100_may_lie_there_as_folders(tmp_path):
    write_cifar100(tmp_path)
    loaded = data.load("cifar100", tmp_path, download=False, validation_fraction=0.25)
    assert loaded.classes == ("apple", "beaver") and [len(loaded.train), len(loaded.validation)] == [6, 2]
    assert loaded.test.images.shape == (8, 3, 32, 32) and loaded.test.labels.tolist() == [0] * 4 + [1] * 4
    assert loaded.test.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 1, 11, 21, 31]
    assert loaded.test.images[:, 2].unique().tolist() == [255] and loaded.train.flip


def test_cifar100_folders_that_do_not_fit_are_an_error(tmp_path):
    write_cifar100(tmp_path / "classes", ("train",))
    write_cifar100(tmp_path / "classes", ("test",), ("apple", "whale"))
    with pytest.raises(TorchsliceError, match="the classes in .*test are not those in .*train"):
        data.load("cifar100", tmp_path / "classes", download=False)
    write_cifar100(tmp_path / "sizes")
    Image.new("RGB", (16, 16)).save(tmp_path / "sizes" / "cifar100" / "test" / "apple" / "small.png")
    with pytest.raises(TorchsliceError, match="images of 2 sizes"):
        data.load("cifar100", tmp_path / "sizes", download=False)


@pytest.mark.parametrize("damage", ["truncated", "emptied", "foreign", "labels out of range"])
def test_damaged_files_are_an_error(tmp_path, damage):
    raw = write_mnist(tmp_path)
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    if damage == "truncated":
        images.write_bytes(images.read_bytes()[:1000])
    elif damage == "emptied":
        images.write_bytes(b"")
    elif damage == "foreign":
        images.write_bytes(gzip.compress(b"something else entirely"))
    else:
        labels.write_bytes(labels.read_bytes()[:-1] + b"\x63")
    with pytest.raises(TorchsliceError, match="mnist"):
        data.load("mnist", tmp_path, download=False)


def test_only_missing_files_are_downloaded(tmp_path, monkeypatch):
    calls = []

    def download(self):
        calls.append(self.train)
        if not self._check_exists():
            write_mnist(tmp_path)

    monkeypatch.setattr(import_torchvision().datasets.MNIST, "download", download)
    assert len(data.load("mnist", tmp_path).test) == 20
    assert calls == [True]
    data.load("mnist", tmp_path)
    assert calls == [True]


def test_a_failed_download_says_where_the_files_belong(tmp_path, monkeypatch):
    def download(self):
        raise OSError("Name or service not known")

    monkeypatch.setattr(import_torchvision().datasets.MNIST, "download", download)
    with pytest.raises(TorchsliceError) as caught:
        data.load("mnist", tmp_path)
    assert str(caught.value).startswith(
        f"data set 'mnist' could not be read or downloaded (Name or service not known). Expected: {tmp_path}/MNIST/raw/"
    )


@pytest.mark.parametrize("error", [OSError("no network"), KeyboardInterrupt()])
def test_a_failed_download_leaves_no_empty_folder(tmp_path, monkeypatch, error):
    def download(self):
        Path(self.raw_folder).mkdir(parents=True)
        raise error

    monkeypatch.setattr(import_torchvision().datasets.MNIST, "download", download)
    with pytest.raises((TorchsliceError, KeyboardInterrupt)):
        data.load("mnist", tmp_path / "new" / "data")
    assert not (tmp_path / "new").exists() and tmp_path.exists()


def test_a_failed_download_keeps_what_was_there_and_what_arrived(tmp_path, monkeypatch):
    (tmp_path / "data" / "empty").mkdir(parents=True)

    def download(self):
        Path(self.raw_folder).mkdir(parents=True)
        Path(self.raw_folder, "train-images-idx3-ubyte.gz").write_bytes(b"whole")
        raise OSError("no network")

    monkeypatch.setattr(import_torchvision().datasets.MNIST, "download", download)
    with pytest.raises(TorchsliceError, match="no network"):
        data.load("mnist", tmp_path / "data")
    kept = [path.relative_to(tmp_path / "data").as_posix() for path in sorted((tmp_path / "data").rglob("*"))]
    assert kept == ["MNIST", "MNIST/raw", "MNIST/raw/train-images-idx3-ubyte.gz", "empty"]


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
def test_without_a_network_nothing_is_made(tmp_path, monkeypatch, name):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(TorchsliceError, match="could not be read or downloaded"):
        data.load(name, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_bad_names_and_options_are_explained():
    with pytest.raises(TorchsliceError, match=r"unknown data set 'cifar11'. Did you mean 'cifar10'\? Known: digits,"):
        data.load("cifar11")
    with pytest.raises(TorchsliceError, match="data set 'digits' takes no options; got image_size"):
        data.load("digits", image_size=8)
    with pytest.raises(TorchsliceError, match="data set 'folder:x': got an unexpected keyword argument 'image_siz'"):
        data.load("folder:x", image_siz=8)


def test_a_function_of_the_user_gives_a_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "own_data.py").write_text(
        "from torchslice import data\n"
        "def small(count=50): return data.load('digits').limit(train=count)\n"
        "def wrong(): return 7\n"
    )
    try:
        assert len(data.load("own_data:small").train) == 50
        assert len(data.load("own_data:small", count=20).train) == 20
        with pytest.raises(TorchsliceError, match="'own_data:wrong' returned a int; it must return a Task, such as"):
            data.load("own_data:wrong")
        with pytest.raises(TorchsliceError, match="Did you mean 'small'"):
            data.load("own_data:smal")
    finally:
        sys.modules.pop("own_data", None)


@pytest.mark.parametrize(
    ("name", "shape", "counts", "mean"),
    [
        ("cifar10", (3, 32, 32), (45000, 5000, 10000), (0.4914, 0.4822, 0.4465)),
        ("mnist", (1, 28, 28), (54001, 5999, 10000), (0.1307,)),
        ("fashion-mnist", (1, 28, 28), (54000, 6000, 10000), (0.2860,)),
    ],
)
def test_the_real_data_sets(real_data_dir, name, shape, counts, mean):
    loaded = data.load(name, real_data_dir, download=False)
    assert loaded.train.images.shape[1:] == shape
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == counts
    assert tuple(loaded.preprocessing["mean"]) == pytest.approx(mean, abs=5e-4)
    assert len(loaded.classes) == 10 and loaded.test.labels.bincount().min() >= 890
