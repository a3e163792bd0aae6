"""Do neurons that leave together keep more accuracy at equal multiply-accumulates than layers that choose alone?

The networks are cut and their norms see training images again; nothing is trained after the cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchslice import Slice, accuracy, extract, judge, retention
from torchslice.data import Task
from torchslice.find.semantic.selection import top_fraction
from torchslice.runs.recipe import make_model

from .experiment import Benchmark, Network, Part, Scale, neurons_of
from .tables import Run, Runs, about_training, figure, page, spread, table

STEPS = 100  # into which the fraction of neurons is divided
ARMS = {f"{metric}, {'tied' if tied else 'untied'}": tied for metric in ("random", "taylor") for tied in (False, True)}


@dataclass(frozen=True)
class Settings(Scale):
    """One scale: which fractions of the multiply-accumulates may remain."""

    mac_retentions: tuple[float, ...] = (0.7, 0.5, 0.3)


@dataclass(frozen=True)
class Choosing(Part):
    """One trained network: accuracy at every budget, on validation images, for a default is chosen by it."""

    def new(self, task: Task) -> nn.Module:
        arguments = {} if ":" in self.network.model else {"width": self.network.width}
        return make_model(self.network.model, task, arguments, seed=self.seed)

    def result(self) -> dict[str, Any]:
        neurons = neurons_of(self.trained(self.task, folder=self.folder), self.task)
        scores = self.contributions(neurons, self.task)
        taylor = {False: scores["taylor"], True: scores.tied(neurons)["taylor"]}

        def first(scores: Mapping[str, Tensor], kept: float) -> Slice:
            return Slice({layer: top_fraction(of.mean(0), kept) for layer, of in scores.items()})

        def cut(arm: str, tied: bool, kept: float) -> Slice:
            if arm.startswith("random"):
                return neurons.random(kept, tied=tied, seed=self.seed)
            return neurons.closed(first(taylor[True], kept)) if tied else first(taylor[False], kept)

        rows = []
        for arm, tied in ARMS.items():
            macs = {step: retention(neurons, cut(arm, tied, step / STEPS)).built_mac for step in range(1, STEPS + 1)}
            for most in self.settings.mac_retentions:
                step = max((step for step in macs if macs[step] <= most), default=1)
                slice_ = cut(arm, tied, step / STEPS)
                small = judge.recalibrate(extract(neurons, slice_), self.task, seed=self.seed)
                figures = {"accuracy": accuracy(small, self.task, "validation").overall, "macs": macs[step]}
                rows.append({"arm": arm, "most": most, "neurons": slice_.neuron_retention, **figures})
                self.note(f"{arm}, {most:.0%} of the MACs: {figures['accuracy']:.1%}")
        return {"accuracy": accuracy(neurons.model, self.task, "validation").overall, "rows": rows}


# -- the page -----------------------------------------------------------------------------------------------------
FIGURES: dict[str, Callable[..., Any]] = {
    name: figure("rows", key) for name, key in (("accuracy", "accuracy"), ("neurons", "neurons"), ("MACs", "macs"))
}
HOW = (
    "A random slice, or the first neurons of every layer by Taylor, as large as so many multiply-accumulates (MACs) of "
    "the built network allow. *Tied*: neurons that leave together are chosen together. Cut, with batch-norm statistics "
    "of training images, not trained. Percent of validation images, of neurons in the slice, and of the MACs of the "
    "network that is built, mean ± standard deviation over the seeds."
)


def write_page(result: dict[str, Any], path: Path) -> str:
    """Write one table per network."""
    return page("Tied neurons", result, text=[HOW], section=section)


def section(runs: Runs, network: Run) -> list[str]:
    """Write the table of one network."""
    whole = spread(run["accuracy"] for run in runs)
    budgets = dict.fromkeys(row["most"] for row in runs[0]["rows"])
    rows = [(f"{most:.0%} of the MACs, {arm}", {"arm": arm, "most": most}) for most in budgets for arm in ARMS]
    return [f"{about_training(network)}. Whole: {whole} %.", table(runs, rows, FIGURES, corner="budget, choice")]


CPU = (
    Network("cifar10", "resnet18", 0.25, epochs=8, train_images=10_000, validation_images=2_000),
    Network("cifar10", "timm:mobilenetv2_050", 1.0, epochs=12, train_images=10_000, validation_images=2_000),
    Network("cifar10", "timm:regnetx_002", 1.0, epochs=12, train_images=10_000, validation_images=2_000),
)
SETTINGS = {
    "smoke": Settings((Network("digits", "resnet20", 0.25, epochs=1, train_images=200),), 1, 8, mac_retentions=(0.5,)),
    "cpu": Settings(CPU, samples_per_class=64),
    "paper": Settings(tuple(Network("cifar10", network.model, 1.0, epochs=100) for network in CPU)),
}
BENCHMARK = Benchmark("tied", SETTINGS, Choosing, write_page)
