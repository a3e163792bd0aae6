"""Files that are either whole or absent, in folders that have one writer at a time."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor

from .errors import TorchsliceError

LEFTOVER_SECONDS = 3600  # a temporary file of this age belongs to a writer that was killed
LOCK = ".lock"


def atomic_write(path: str | Path, write: bytes | str | Callable[[Path], None]) -> None:
    """Write a file so that a crash, a full disk or Ctrl-C leaves the old file or none, never half of the new one.

    A missing folder is made, a link is followed, and a file that exists keeps its mode. What is no regular file (a
    folder, a device, a pipe) or is write-protected is refused. `write` is the content, or a function that fills the
    temporary file that it is given.

    >>> atomic_write(folder / "new" / "note.txt", "hello")
    >>> (folder / "new" / "note.txt").read_text()
    'hello'
    """
    mode = mode_of(path)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    remedy = "Choose a folder you may write to."
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(0o666 if mode is None else mode | 0o600, exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode) if mode is None else mode
        remedy = "Nothing was changed there."
        if callable(write):
            write(temporary)
        else:
            temporary.write_bytes(write.encode() if isinstance(write, str) else write)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        os.replace(temporary, target)
    except OSError as error:
        raise TorchsliceError(f"cannot write {path}: {error.strerror or error}. {remedy}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _finish(target)


def mode_of(path: str | Path) -> int | None:
    """Return the permissions of the file that will be replaced, None if there is none; raise if it must not be."""
    try:
        mode = os.stat(path).st_mode
        reason = "" if os.access(path, os.W_OK) else "the file is write-protected"
        if not stat.S_ISREG(mode):
            reason = f"it is {'a folder' if stat.S_ISDIR(mode) else 'a device or a pipe'}, not a file"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise TorchsliceError(f"cannot write {path}: {reason}. Choose another name.")
    return mode & 0o777


def _finish(target: Path) -> None:
    """Make the new name survive a power cut, where the system can, and remove what killed writers of it left."""
    for folder in target.parents[:2]:  # the first may be new in the second
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    _remove_leftovers(target.parent, glob.escape(target.name), LEFTOVER_SECONDS)


def _remove_leftovers(folder: Path, name: str, seconds: float) -> None:
    """Remove temporary files of at least this age of writers of files whose names match a pattern."""
    for leftover in folder.glob(f".{name}.{'[0-9a-f]' * 8}.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime >= seconds:
                leftover.unlink()


@contextlib.contextmanager
def locked(folder: str | Path, *, wait_seconds: float = 0.0, leftover_seconds: float = 0.0) -> Iterator[None]:
    """Be the only writer of a folder inside the block; where there is another, wait so long, then raise.

    Temporary files that killed writers left are removed, if they are `leftover_seconds` old: where others write without
    the lock, theirs must stay. A missing folder is made; one that is empty at the end is removed. The lock is a file,
    `.lock`, which the system frees when its process ends in any way: a killed process blocks nobody. Readers need no
    lock, for files are whole or absent.

    >>> with locked(folder / "run"):
    ...     atomic_write(folder / "run" / "note.txt", "hello")
    """
    path = Path(folder) / LOCK
    lock = FileLock(path, timeout=wait_seconds)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise TorchsliceError(
            f"another process is writing into {folder}; wait until it is done, or choose another folder."
        ) from error
    except OSError as error:
        raise TorchsliceError(
            f"cannot write into {folder}: {error.strerror or error}. Choose a folder you may write to."
        ) from error
    try:
        _remove_leftovers(path.parent, "*", leftover_seconds)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held: who waits for it looks whether the file is still there
        lock.release()
        with contextlib.suppress(OSError):
            path.parent.rmdir()


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors takes them: on the CPU, contiguous, no two in one memory; others are copied."""
    seen, found = set[int](), {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return found


def digest_of(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Return the SHA-256 over a text and names and bytes of tensors on the CPU, in the order of their names."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_safetensors(path: str | Path, *, tensors: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a safetensors file, or none of them."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in (file.keys() if tensors else ())}
    except Exception as error:  # safetensors raises many kinds
        raise TorchsliceError(f"{path} is not a whole safetensors file ({error}); copy it once more.") from error
