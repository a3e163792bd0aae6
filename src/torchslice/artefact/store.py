"""A folder of artefacts, NAME.safetensors each, that can be listed and searched by what the files say of themselves.

Nothing else is kept, so files may be copied in or deleted by any program.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TorchsliceError
from ..files import LEFTOVER_SECONDS, atomic_write, locked
from ..registry import unknown
from ..tables import percent
from .file import Artefact, load, read_header, read_record

SUFFIX = ".safetensors"
WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Entry:
    """What a store knows of one file; `problem` says why it cannot be used, and then nothing else is known.

    `accuracy` in [0, 1] is what the artefact says of itself: "accuracy" in its metrics, or the "validation_accuracy" of
    the network that was kept; None if it does not.
    """

    name: str
    size_bytes: int
    classes: tuple[str, ...] = ()
    parameters: int = 0
    accuracy: float | None = None
    sha256: str = ""
    problem: str | None = None

    @property
    def row(self) -> tuple[str, ...]:
        """Its row in a table."""
        if self.problem:
            return (self.name, f"{self.size_bytes:,}", "-", "-", self.problem)
        return (self.name, f"{self.size_bytes:,}", f"{self.parameters:,}", percent(self.accuracy), self.class_names)

    @property
    def class_names(self) -> str:
        """Its classes, separated by commas; the first ten if there are more."""
        more = f" and {len(self.classes) - 10} more" if len(self.classes) > 10 else ""
        return ", ".join(self.classes[:10]) + more or "-"


class Store:
    """A folder of artefacts.

    Several processes may use a store at a time: writers wait for each other, and readers only see whole files. Every
    file holds a whole network, also where two are parts of one parent, so each can be copied and loaded by itself.

    >>> ts.save(small, folder / "pair.safetensors", classes=["3", "8"], metrics={"accuracy": 0.9})
    >>> store = Store(folder / "parts")
    >>> store.add(folder / "pair.safetensors").name
    'pair'
    >>> [entry.name for entry in store.search(classes=["8"], min_accuracy=0.8)]
    ['pair']
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise TorchsliceError(f"{folder} is a file; a store is a folder.")

    # -- reading ------------------------------------------------------------------------------------------------------
    def entries(self) -> list[Entry]:
        """Return what every file says of itself, in the order of names; numbers are not read."""
        return [_entry(path, read_header) for path in self._files()]

    def search(
        self,
        *,
        classes: Sequence[str] = (),
        min_accuracy: float | None = None,
        max_parameters: int | None = None,
    ) -> list[Entry]:
        """Return the usable artefacts that know all these classes and keep these bounds, smallest first.

        An artefact that says nothing of its accuracy has none of at least `min_accuracy`.
        """
        return sorted(
            (
                entry
                for entry in self.entries()
                if not entry.problem
                and {*classes} <= {*entry.classes}
                and (min_accuracy is None or (entry.accuracy is not None and entry.accuracy >= min_accuracy))
                and (max_parameters is None or entry.parameters <= max_parameters)
            ),
            key=lambda entry: (entry.parameters, entry.name),
        )

    def path(self, name: str) -> Path:
        """Return the file of a name; the error lists the names that there are."""
        if not self._file(name).is_file():
            raise unknown(
                f"artefact in {self.folder}:", name, [path.name.removesuffix(SUFFIX) for path in self._files()]
            )
        return self._file(name)

    def load(self, name: str, *, allow_import: bool = False) -> Artefact:
        """Load an artefact by its name, see `torchslice.load`."""
        return load(self.path(name), allow_import=allow_import)

    def verify(self) -> list[Entry]:
        """Read every file whole and compare it with its hash; return the entries, with their problems."""
        return [_entry(path, read_record) for path in self._files()]

    # -- writing ------------------------------------------------------------------------------------------------------
    def add(self, file: str | Path, *, name: str | None = None, overwrite: bool = False) -> Entry:
        """Copy an artefact into the store, after its hash was checked; by default under the name of the file."""
        name = Path(file).name.removesuffix(SUFFIX) if name is None else name
        target = self._file(name)
        read_record(file)
        with locked(self.folder, wait_seconds=WAIT_SECONDS, leftover_seconds=LEFTOVER_SECONDS):
            if target.exists() and not overwrite:
                raise TorchsliceError(
                    f"{self.folder} has an artefact {name!r}; give another name, or overwrite it (--force)."
                )
            atomic_write(target, lambda temporary: shutil.copyfile(file, temporary))  # type: ignore[arg-type]
            return _entry(target, read_header)

    def remove(self, name: str) -> None:
        """Delete the file of an artefact."""
        path = self.path(name)
        with locked(self.folder, wait_seconds=WAIT_SECONDS, leftover_seconds=LEFTOVER_SECONDS):
            path.unlink(missing_ok=True)

    # -- the files ----------------------------------------------------------------------------------------------------
    def _file(self, name: str) -> Path:
        if not name or Path(name).name != name or name.startswith(".") or "\0" in name:
            raise TorchsliceError(f"{name!r} cannot be a name in a store; use letters, digits, '.', '_' and '-'.")
        return self.folder / f"{name}{SUFFIX}"

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"[!.]*{SUFFIX}"))


def _entry(path: Path, read: Callable[[Path], dict[str, Any]]) -> Entry:
    """Return what a file says of itself."""
    name = path.name.removesuffix(SUFFIX)
    try:
        size = path.stat().st_size
    except OSError as error:
        return Entry(name, 0, problem=error.strerror or str(error))
    try:
        return Entry(name, size, **about(read(path)))
    except TorchsliceError as error:
        return Entry(name, size, problem=str(error))


@contextlib.contextmanager
def reading_record() -> Iterator[None]:
    """Say what is wrong with a record that `save` did not write, whatever its reader raises."""
    try:
        yield
    except TorchsliceError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        text = f"its record is not one that torchslice writes ({type(error).__name__}: {error}); copy it once more."
        raise TorchsliceError(text) from error


@reading_record()
def about(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an entry says of the record of an artefact, which may hold anything."""
    shapes = [entry["shape"] for entry in record["tensors"].values() if entry["parameter"]]
    metrics = record["metrics"] or {}
    accuracy = metrics.get("accuracy", metrics.get("validation_accuracy"))
    if isinstance(accuracy, dict):  # of the steps of `reuse`
        accuracy = accuracy.get(metrics.get("kept"))
    classes, accuracy = record["classes"] or [], accuracy if isinstance(accuracy, float | int) else None
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise TypeError(f"classes are {classes!r:.100}")
    parameters = sum(map(math.prod, shapes))
    return {"classes": tuple(classes), "parameters": parameters, "accuracy": accuracy, "sha256": str(record["sha256"])}
