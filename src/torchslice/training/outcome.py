"""What training gives: the network that was kept, and the log of how it came about."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..registry import unknown
from ..tables import table

Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """The network that was kept, and how it came about; prints as a table.

    Attributes:
        model: plain, in eval mode.
        log: one row of figures for each epoch or step; the first is the state before.
        kept: index of the row that `model` belongs to.
        about: further figures, by name.
    """

    model: nn.Module = field(repr=False)
    log: tuple[Row, ...]
    kept: int
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Row:
        """The row that was kept."""
        return self.log[self.kept]

    def __getitem__(self, step: str) -> Row:
        """Return the row of a step by its name."""
        found = {row["step"]: row for row in self.log if "step" in row}
        if step not in found:
            raise unknown("step", step, found)
        return found[step]

    def to_plain(self) -> dict[str, Any]:
        """Return all but the network as JSON-able data."""
        return {"log": [dict(row) for row in self.log], "kept": self.kept, **self.about}

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for row in self.log for name, value in row.items() if value is not None))
        rows = [[_cell(name, row.get(name)) for name in names] for row in self.log]
        rows[self.kept][0] += " *"
        about = "; ".join(f"{name.replace('_', ' ')}: {_cell(name, value)}" for name, value in self.about.items())
        return f"{table([name.replace('_', ' ') for name in names], rows)}\n* kept{'; ' * bool(about)}{about}"


def _cell(name: str, value: Any) -> str:
    """Write a figure: fractions in percent, times with one digit."""
    if isinstance(value, float):
        percent = any(word in name for word in ("accuracy", "fraction", "retention", "sparsity"))
        return f"{value:.1%}" if percent else f"{value:.1f}" if name in ("seconds", "latency_ms") else f"{value:.4g}"
    return "-" if value is None else str(value)
