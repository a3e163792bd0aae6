"""A written file is whole or absent."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from torchslice.errors import TorchsliceError
from torchslice.files import atomic_write, locked


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture
def umask():
    """Set the umask for one test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("content", ["grüße", "grüße".encode(), lambda path: path.write_text("grüße", "utf-8")])
def test_writes_text_bytes_and_through_a_function(tmp_path, content):
    target = tmp_path / "new" / "folder" / "file.txt"
    atomic_write(target, content)
    assert target.read_bytes() == "grüße".encode()
    assert entries(target.parent) == ["file.txt"]


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
    message = r"cannot write .*file: No space left on device. Nothing was changed there."
    with pytest.raises(TorchsliceError, match=message):
        atomic_write(target, b"new content")
    assert target.read_text() == "old" and entries(tmp_path) == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_writer_that_meets_a_really_full_device(tmp_path):
    def write(path):
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(b"content")

    with pytest.raises(TorchsliceError, match="No space left on device"):
        atomic_write(tmp_path / "file", write)
    assert entries(tmp_path) == []


def test_content_is_on_the_disk_before_it_gets_its_name_and_the_name_before_the_call_returns(tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, os.replace

    def synced(handle):
        done.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    def renamed(source, target):
        done.append("renamed")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    atomic_write(tmp_path / "new" / "file", "content")
    assert done[0].startswith(str(tmp_path / "new" / ".file.")) and done[0].endswith(".tmp")
    assert done[1:] == ["renamed", str(tmp_path / "new"), str(tmp_path)]


# -- modes ------------------------------------------------------------------------------------------------------------
def test_a_new_file_has_the_usual_mode(tmp_path, umask):
    umask(0o027)
    for name, content in (("a", "x"), ("b", lambda path: path.write_text("x")), ("c", lambda path: path.chmod(0o600))):
        atomic_write(tmp_path / name, content)
        assert mode(tmp_path / name) == 0o640


@pytest.mark.parametrize("permissions", [0o600, 0o644, 0o777, 0o666])
def test_an_existing_file_keeps_its_mode_and_is_never_more_open(tmp_path, umask, permissions):
    target = tmp_path / "file"
    target.write_text("old")
    target.chmod(permissions)
    seen = []
    atomic_write(str(target), lambda path: (path.write_text("new"), seen.append(mode(path))))
    assert target.read_text() == "new" and mode(target) == permissions
    assert seen[0] & ~permissions == 0


def test_the_umask_of_other_threads_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask belongs to the whole process"))
    writers = [threading.Thread(target=atomic_write, args=(tmp_path / "file", str(i) * 1000)) for i in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    content = (tmp_path / "file").read_text()
    assert len(content) == 1000 and len(set(content)) == 1 and entries(tmp_path) == ["file"]


# -- what is replaced -------------------------------------------------------------------------------------------------
def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("old")
    (tmp_path / "link").symlink_to("real/file")
    (tmp_path / "new").symlink_to("real/other")
    for name in ("link", "new"):
        atomic_write(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink() and (tmp_path / name).read_text() == "new"
    assert entries(tmp_path) == ["link", "new", "real"] and entries(tmp_path / "real") == ["file", "other"]


def test_only_files_are_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to(os.devnull)
    (tmp_path / "loop").symlink_to("loop")
    before = entries(tmp_path)
    for name, message in (
        ("folder", "it is a folder, not a file"),
        ("pipe", "it is a device or a pipe, not a file"),
        ("device", "it is a device or a pipe, not a file"),
        ("loop", "symbolic links"),
    ):
        with pytest.raises(TorchsliceError, match=f"cannot write .*{name}: .*{message}.* Choose another name"):
            atomic_write(tmp_path / name, b"content")
    assert entries(tmp_path) == before and (tmp_path / "pipe").is_fifo()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_protected_file_or_folder_is_named(tmp_path):
    (tmp_path / "file").touch(0o400)
    with pytest.raises(TorchsliceError, match="the file is write-protected"):
        atomic_write(tmp_path / "file", b"content")
    tmp_path.chmod(0o500)
    with pytest.raises(TorchsliceError, match="Permission denied. Choose a folder you may write to."):
        atomic_write(tmp_path / "other", b"content")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "occupied").write_text("a file, not a folder")
    with pytest.raises(TorchsliceError, match=r"cannot write .*occupied/file: .* Choose a folder you may write to."):
        atomic_write(tmp_path / "occupied" / "file", b"content")


def test_what_killed_writers_left_is_removed_by_the_next(tmp_path):
    old, young, other = (tmp_path / f".{name}.tmp" for name in ("[a].0123abcd", "[a].4567abcd", "b.0123abcd"))
    mine = tmp_path / ".[a].settings"
    for path in (old, young, other, mine):
        path.touch()
    for path in (old, other, mine):
        os.utime(path, (time.time() - 7200,) * 2)
    atomic_write(tmp_path / "[a]", "content")
    assert entries(tmp_path) == sorted([young.name, other.name, mine.name, "[a]"])


# -- one writer at a time ---------------------------------------------------------------------------------------------
HOLD = """
import sys, time
from torchslice.files import locked
with locked(sys.argv[1]):
    open(f"{sys.argv[1]}/.note.0123abcd.tmp", "w").write("half")
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder and is about to write into it."""
    folder = tmp_path / "folder"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield folder, process
    process.kill()
    process.wait()
    process.stdout.close()


def test_another_process_is_kept_out_until_the_holder_dies(holder):
    folder, process = holder
    started = time.monotonic()
    for wait in (0.0, 0.3):
        refused = pytest.raises(TorchsliceError, match=f"another process is writing into {folder}; wait")
        with refused, locked(folder, wait_seconds=wait):
            pytest.fail("two writers")
    assert time.monotonic() - started >= 0.3
    assert entries(folder) == [".lock", ".note.0123abcd.tmp"]
    process.kill()
    with locked(folder, wait_seconds=10):
        assert entries(folder) == [".lock"], "what the killed writer left is gone"
    assert not folder.exists(), "an empty folder is removed"


def test_threads_write_in_turns(tmp_path):
    def add(number):
        with locked(tmp_path, wait_seconds=30):
            path = tmp_path / "count"
            count = int(path.read_text()) if path.exists() else 0
            time.sleep(0.001)
            atomic_write(path, str(count + 1))

    writers = [threading.Thread(target=add, args=(number,)) for number in range(16)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert (tmp_path / "count").read_text() == "16" and entries(tmp_path) == ["count"]


def test_one_thread_cannot_hold_a_folder_twice(tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(TorchsliceError, match="another process"), locked(tmp_path / "run"):
            pytest.fail("two writers")
        (tmp_path / "run" / "kept").touch()
    assert entries(tmp_path / "run") == ["kept"]


def test_a_folder_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TorchsliceError, match="cannot write into .*file"), locked(folder):
            pytest.fail("locked")
