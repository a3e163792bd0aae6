"""The progress bar of training and the running means behind it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from torch import Tensor

from .ranks import Ranks, is_first

Advance = Callable[..., None]


class RunningMeans:
    """Means over the samples of an epoch, summed on the device so that no step waits for them.

    >>> means = RunningMeans()
    >>> means.add(4, loss=torch.tensor(1.0))
    >>> means.read()
    {'loss': 1.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._samples = 0

    def add(self, samples: int, **values: Tensor) -> None:
        """Add the means of a batch, weighted by its number of samples."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().double() * samples
        self._samples += samples

    def read(self, ranks: Ranks | None = None) -> dict[str, float]:
        """Return the means so far; with `ranks`, over all processes."""
        sums = torch.stack([*self._sums.values()])
        totals = torch.cat([sums, sums.new_tensor([self._samples])])
        *values, samples = (ranks or Ranks()).sum(totals).tolist()
        return {name: value / samples for name, value in zip(self._sums, values, strict=True)}


@contextlib.contextmanager
def progress_bar(show: bool, *, total: int, done: int = 0) -> Iterator[Advance]:
    """Show a bar over `total` steps on standard error inside the block; under torchrun, in its first process only.

    What it gives moves the bar one step on, with a title and a text; an empty text keeps the last one.
    """
    text = TextColumn("{task.fields[text]}", table_column=Column(no_wrap=False))  # the one to give way if it is narrow
    columns = (TextColumn("{task.description}"), BarColumn(16), TimeRemainingColumn(), text)
    with Progress(*columns, console=Console(stderr=True), disable=not (show and is_first())) as progress:
        task = progress.add_task("", total=total, completed=done, text="")

        def advance(title: str, text: str = "") -> None:
            shown: dict[str, Any] = {"text": text} if text else {}
            progress.update(task, advance=1, description=title, **shown)

        yield advance
