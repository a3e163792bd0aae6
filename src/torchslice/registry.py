"""Names that users type, kept in one place: models, data sets, metrics."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import TypeVar

from .errors import TorchsliceError

T = TypeVar("T")


def unknown(kind: str, name: object, known: Iterable[str]) -> TorchsliceError:
    """Return the error for a name that is not among `known`, with the closest match."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=5, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    listed = ", ".join(known) if len(known) <= 100 else f"{len(known)} names, the nearest: {', '.join(close) or 'none'}"
    return TorchsliceError(f"unknown {kind} {name!r}.{hint} Known: {listed}.")


class Registry(dict[str, T]):
    """A dictionary of named things that refuses duplicates and helps with misspelled names.

    >>> nets = Registry("model")
    >>> @nets.register("tiny")
    ... def tiny(): ...
    >>> nets.names()
    ['tiny']
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[T], T]:
        """Register the decorated object under `name`; a name can be taken once."""

        def keep(entry: T) -> T:
            if name in self:
                raise TorchsliceError(f"{self.kind} {name!r} is registered already; choose another name.")
            self[name] = entry
            return entry

        return keep

    def __missing__(self, name: str) -> T:
        raise unknown(self.kind, name, self)

    def names(self) -> list[str]:
        """Names in the order of registration."""
        return list(self)
