"""A sub-model, and what it is worth beside the network that it comes from.

Shapes: k classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from .slices import Slice
from .tables import percent, table
from .training import Accuracy, Cost, Latency

WEAK = 0.03  # of the validation samples: what the whole network gets right more often than a sub-model that is weak
CHANCE = 0.05  # what a network is better than a guess, at least, if there is anything in it to keep


@dataclass(frozen=True)
class Reused:
    """A sub-model, the networks that it was on the way, and what it is worth; prints as a table.

    `save` needs nothing beside it.

    Attributes:
        model: the network that was kept, its logits divided by the temperature.
        classes: in the order of the logits.
        slice: the part that was cut out of the network that was given.
        networks: "extracted", "compensated", "recalibrated" and, if it was tuned, "fine-tuned": the network after that
            step.
        kept: the step whose network is best on the validation samples.
        temperature: None where the logits are no layer's output, and stay as they are.
        best_epoch: of tuning, 0 is before it; None without tuning.
        accuracy: on the validation samples of the classes: of the "whole" network, answering with these classes only,
            and after every step.
        costs, latency: of the "whole" network and of the "sub-model"; latency by batch size.
        seconds: from the trained network to the sub-model.
        warnings: what is weak, and what to try.
    """

    model: nn.Module = field(repr=False)
    classes: tuple[str, ...]
    slice: Slice
    networks: dict[str, nn.Module] = field(repr=False)
    kept: str
    temperature: float | None
    best_epoch: int | None
    preprocessing: dict[str, Any] | None = field(repr=False)
    accuracy: dict[str, Accuracy]
    costs: dict[str, Cost]
    latency: dict[str, dict[int, Latency]]
    seconds: float
    warnings: tuple[str, ...]

    @property
    def metrics(self) -> dict[str, Any]:
        """The figures that belong to the network and not to the machine, as plain data."""
        whole, part = self.costs["whole"], self.costs["sub-model"]
        return {
            "validation_accuracy": {step: score.overall for step, score in self.accuracy.items()},
            "kept": self.kept,
            "best_epoch": self.best_epoch,
            "temperature": self.temperature,
            "neuron_retention": self.slice.neuron_retention,
            "param_retention": part.parameters / whole.parameters,
            "mac_retention": part.macs / whole.macs,
            "whole": asdict(whole),
            "sub_model": asdict(part),
            "warnings": list(self.warnings),
        }

    def to_plain(self) -> dict[str, Any]:
        """Return all but the networks as JSON-able data."""
        times = {name: {str(size): asdict(of) for size, of in found.items()} for name, found in self.latency.items()}
        return {"classes": list(self.classes), **self.metrics, "latency": times, "seconds": self.seconds}

    def __str__(self) -> str:
        sizes = list(self.latency["whole"])
        headings = ("", "validation accuracy", "parameters", "MACs", *(f"ms, batch {size}" for size in sizes))
        last = f"sub-model, {self.kept}"
        rows: list[tuple[str, ...]] = []
        for name, score in self.accuracy.items():
            of = {"whole": "whole", self.kept: "sub-model"}.get(name)
            figures = ["-"] * (2 + len(sizes))
            if of:
                size, times = self.costs[of], self.latency[of].values()
                figures = [f"{size.parameters:,}", f"{size.macs:,}", *(f"{time.median_ms:.2f}" for time in times)]
            label = {"whole": "whole network, these classes", self.kept: last}.get(name, name)
            rows.append((label, percent(score.overall), *figures))
        kept = self.metrics
        shares = ", ".join(f"{percent(kept[f'{of}_retention'])} of the {of}s" for of in ("neuron", "param", "mac"))
        shares = shares.replace("params", "parameters").replace("macs", "MACs")
        tuned = "" if self.best_epoch is None else f", epoch {self.best_epoch} of tuning"
        scaled = "" if self.temperature is None else f", logits divided by {self.temperature:.2f}"
        return "\n".join(
            [
                f"{len(self.classes)} classes: {', '.join(self.classes)}",
                table(headings, rows),
                f"{shares}{tuned}{scaled}; {self.seconds:.0f} s",
                *(f"Warning: {warning}" for warning in self.warnings),
            ]
        )


def warnings_of(
    classes: Sequence[str],
    whole: Accuracy,
    part: Accuracy,
    labels: Tensor,
    remedies: Sequence[str],
    unsure: bool = False,
) -> tuple[str, ...]:
    """Say what is weak about a sub-model, and what to try; `labels` are of the validation samples.

    It is weak if the whole network is right on more than 3 in 100 samples more. There is nothing to keep if the whole
    network is right on less than 5 in 100 more than naming the most frequent class always is. Where that is right so
    often that hardly any are left, half of those that are left count instead of 3 and 5 in 100.
    """
    found, guess = [], float(labels.bincount().max()) / len(labels)
    half = (1 - guess) / 2
    if whole.overall < guess + min(CHANCE, half):
        found.append(
            f"the whole network gets {percent(whole.overall)} of these classes right, and naming the most frequent one "
            f"always {percent(guess)}: there is nothing in it to keep. Train it on them first."
        )
    elif (lost := whole.overall - part.overall) > min(WEAK, half):
        pairs = zip(classes, whole.per_class, part.per_class, strict=True)
        per_class = {name: (one, other) for name, one, other in pairs if one is not None and other is not None}
        worst = max(per_class, key=lambda name: per_class[name][0] - per_class[name][1])
        before, after = map(percent, per_class[worst])
        found.append(
            f"the sub-model is {100 * lost:.1f} points worse than the whole network, most on {worst!r} ({after} "
            f"instead of {before}). Try {' or '.join(remedies)}."
        )
    if unsure:
        found.append(
            f"its logits were divided by the most that is tried: on {len(labels)} validation samples its confidence "
            "says little. Give more of them."
        )
    unknown = [name for name, score in zip(classes, part.per_class, strict=True) if score is None]
    if unknown:
        found.append(f"there is no validation sample of {', '.join(unknown)}, so nothing is known of them.")
    return tuple(found)
