"""What restructuring gives: the smaller network, and a log of how it came about."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ..registry import unknown
from ..tables import percent, table


@dataclass(frozen=True)
class Step:
    """One row of the log: a network, what it needs, and the time it took to make and train it.

    Retentions are shares in [0, 1] of the model at the start: of its parameters, and of the multiply-accumulates of its
    convolutions and linear layers; zeros do not count. `sparsity` is the share of zeros among the weights of these
    layers in the network. `latency_ms` is measured where it is the target.
    """

    name: str
    param_retention: float
    mac_retention: float
    sparsity: float
    latency_ms: float | None
    validation_accuracy: float
    seconds: float

    @property
    def compression_rate(self) -> float:
        """Share of the parameters that are gone, in [0, 1]."""
        return 1 - self.param_retention

    def __str__(self) -> str:
        return f"{self.name}: {self.param_retention:.1%} of the parameters, validation {self.validation_accuracy:.2%}"


@dataclass(frozen=True)
class Restructured:
    """The network that was kept, and how it came about; prints as a table.

    Attributes:
        model: the smallest network that lost no more accuracy than allowed, plain and in eval mode.
        method: of removal.
        steps: the log. "whole" is the model at the start, "cut" what the slice keeps, "cut, retrained" the same after
            its training; then comes a row for each iteration.
        kept: which of them is `model`.
        stopped: "target"; "accuracy" where one more iteration lost too much; "size" where nothing more can be cut.
    """

    model: nn.Module = field(repr=False)
    method: str
    steps: tuple[Step, ...]
    kept: str
    stopped: str

    @property
    def iterations(self) -> int:
        """How often the network was trained: after the cut, after every removal, again where that was too little."""
        return sum(step.name not in ("whole", "cut") for step in self.steps)

    def __getitem__(self, name: str) -> Step:
        """Return a row of the log."""
        found = {step.name: step for step in self.steps}
        if name not in found:
            raise unknown("step", name, found)
        return found[name]

    def to_plain(self) -> dict[str, Any]:
        """Return all but the network as JSON-able data."""
        steps = [asdict(step) for step in self.steps]
        return {"method": self.method, "kept": self.kept, "stopped": self.stopped, "steps": steps}

    def __str__(self) -> str:
        timed = any(step.latency_ms is not None for step in self.steps)
        rows = []
        for step in self.steps:
            shares = (step.param_retention, step.mac_retention, step.sparsity, step.validation_accuracy)
            time = [f"{step.latency_ms:.2f}"] if timed else []
            mark = " *" if step.name == self.kept else ""
            rows.append((step.name + mark, *map(percent, shares), *time, f"{step.seconds:.1f}"))
        headings = ("step", "parameters", "MACs", "zeros", "validation accuracy", *(["ms"] if timed else []), "seconds")
        return f"{table(headings, rows)}\n* kept; stopped by {self.stopped}"
