"""Files that are either whole or absent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import TorchsliceError


def atomic_write(path: str | Path, write: bytes | str | Callable[[Path], None]) -> None:
    """Write a file so that a crash, a full disk or Ctrl-C leaves the old file or none, never half of the new one.

    `write` is the content, or a function that fills the temporary file it is given. A missing folder is made.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
    except OSError as error:
        reason = error.strerror or error
        raise TorchsliceError(f"cannot write {path}: {reason}. Choose a folder you may write to.") from error
    temporary = Path(name)
    try:
        if callable(write):
            write(temporary)
        else:
            temporary.write_bytes(write.encode() if isinstance(write, str) else write)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise TorchsliceError(f"cannot write {path}: {error.strerror or error}. Nothing was changed there.") from error
    finally:
        temporary.unlink(missing_ok=True)
