"""A written file is whole or absent."""

import errno
import os
from pathlib import Path

import pytest

from torchslice.errors import TorchsliceError
from torchslice.files import atomic_write


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", ["grüße", "grüße".encode(), lambda path: path.write_text("grüße", "utf-8")])
def test_writes_text_bytes_and_through_a_function(tmp_path, content):
    target = tmp_path / "new" / "folder" / "file.txt"
    atomic_write(target, content)
    assert target.read_bytes() == "grüße".encode()
    assert entries(target.parent) == ["file.txt"]


def test_replaces_the_old_file_and_follows_the_umask(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    before = os.umask(0o027)
    try:
        atomic_write(str(target), "new")
    finally:
        os.umask(before)
    assert target.read_text() == "new" and target.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), RuntimeError("writer failed")])
def test_an_interrupted_writer_leaves_the_old_file(tmp_path, interruption):
    target = tmp_path / "file"
    target.write_text("old")

    def write(path):
        path.write_text("half of the n")
        raise interruption

    with pytest.raises(type(interruption)):
        atomic_write(target, write)
    assert target.read_text() == "old" and entries(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "file"
    target.write_text("old")

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        TorchsliceError, match=r"cannot write .*file: No space left on device. Nothing was changed there."
    ):
        atomic_write(target, b"content")
    assert target.read_text() == "old" and entries(tmp_path) == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_writer_that_meets_a_really_full_device(tmp_path):
    def write(path):
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(b"content")

    with pytest.raises(TorchsliceError, match="No space left on device"):
        atomic_write(tmp_path / "file", write)
    assert entries(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "occupied").write_text("a file, not a folder")
    with pytest.raises(TorchsliceError, match=r"cannot write .*occupied/file: .* Choose a folder you may write to."):
        atomic_write(tmp_path / "occupied" / "file", b"content")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(TorchsliceError, match="Permission denied. Choose a folder you may write to."):
        atomic_write(tmp_path / "file", b"content")


def test_a_target_that_is_a_folder_stays(tmp_path):
    (tmp_path / "target").mkdir()
    with pytest.raises(TorchsliceError, match="Nothing was changed there"):
        atomic_write(tmp_path / "target", b"content")
    assert entries(tmp_path) == ["target"] and (tmp_path / "target").is_dir()
