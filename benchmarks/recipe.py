"""How accurate the default training makes networks: beside plain settings at equal cost, and as far as minutes go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torchslice as ts
from torchslice import accuracy, fit
from torchslice.runs.recipe import make_model

from .experiment import Benchmark, Network, Part, Scale, spent
from .tables import Run, Runs, about_training, figure, page, table

PLAIN: dict[str, Any] = {"learning_rate": 0.05, "weight_decay": 0.0, "warmup_fraction": 0.0, "label_smoothing": 0.0}


@dataclass(frozen=True)
class Trained(Network):
    """A network, and how it is trained.

    Attributes:
        seeds: number of seeds, where it is not that of the scale.
        rate: learning rate, where it is not the default.
        plain: whether it is trained with plain settings too.
        wider: widths of a further network, which the first seed alone trains, for `wider_epochs`.
    """

    seeds: int | None = None
    rate: float = ts.Training.learning_rate
    plain: bool = True
    wider: tuple[int, ...] = ()
    wider_epochs: int = 0


SMALL = Trained("digits", "fast", 0.25, epochs=2, wider=(64, 128, 256), wider_epochs=2)
SETTINGS = {
    "smoke": Scale((SMALL,), 1),
    "cpu": Scale(
        (
            Trained("cifar10", "fast", 1.0, 12, rate=0.15, plain=False, wider=(64, 256, 256), wider_epochs=10),
            *(Trained("cifar10", name, 1.0, 5, train_images=10_000, seeds=2) for name in ("convnet", "resnet20")),
            Trained("cifar100", "fast", 1.0, 12, seeds=1, rate=0.15, plain=False),
        )
    ),
    "paper": Scale((Trained("cifar10", "resnet18", 1.0, epochs=60), Trained("cifar10", "vgg16", 1.0, epochs=60))),
}


@dataclass(frozen=True)
class Training(Part):
    """One network and one seed, trained in every way."""

    def result(self) -> dict[str, Any]:
        network, rows = self.network, [self.row("defaults")]
        if network.plain:
            rows.append(self.row("plain settings", **PLAIN))
        if network.wider and self.seed == self.settings.seed:
            wider = {"widths": network.wider}
            rows.append(self.row("defaults, wider", wider, epochs=network.wider_epochs))
        return {"rows": rows}

    def row(self, arm: str, arguments: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        """Train the network, and score it on the validation and on the test images."""
        self.note(arm)
        given = {"width": self.network.width, **(arguments or {})}
        model = make_model(self.network.model, self.task, given, seed=self.seed)
        training = replace(self.training, **{"learning_rate": self.network.rate, **changes})
        seconds = spent(fit(model, self.task, training, folder=self.folder / arm.replace(", ", "-")))
        macs = ts.judge.cost(model, self.task.example).macs
        flops = 6 * macs * len(self.task.train) * training.epochs
        about = {"arm": arm, "epochs": training.epochs, "macs": macs, "flops": flops, "minutes": seconds / 60}
        return about | {split: accuracy(model, self.task, split).overall for split in ("validation", "test")}


# -- the page -----------------------------------------------------------------------------------------------------
FIGURES = {
    "test, %": figure("rows", "test", digits=2),
    "validation, %": figure("rows", "validation", digits=2),
    "epochs": figure("rows", "epochs", percent=False, digits=0),
    "MACs, millions": figure("rows", "macs", percent=False, unit=1e6),
    "FLOPs, 1e14": figure("rows", "flops", percent=False, unit=1e14, digits=2),
    "minutes": figure("rows", "minutes", percent=False, digits=0),
}
ARMS = {
    "defaults": "the default settings, but for the learning rate where another is stated",
    "plain settings": "a rate of 0.05 that falls from the start, no weight decay, no warm-up, no label smoothing",
    "defaults, wider": "a wider network, one seed",
}


def write_page(result: dict[str, Any], path: Path) -> str:
    """Write the table of every network."""
    text = (
        "Accuracy in percent without test-time augmentation, mean ± standard deviation over the seeds, after the last "
        "epoch. A tenth of the published training images is held out for validation, by which everything was chosen. "
        "FLOPs are 6 times the multiply-accumulates (MACs) of an image times the images seen. Minutes are those "
        "of the machine above, on which other work ran beside it."
    )
    return page("What the default training reaches", result, text=[text], section=section, arms=ARMS)


def section(runs: Runs, network: Run) -> list[str]:
    """Write the rows of one network."""
    arms = [(arm, {"arm": arm}) for arm in dict.fromkeys(row["arm"] for run in runs for row in run["rows"])]
    return [
        f"{about_training(network)}, {len(runs)} seed(s), a learning rate of {network['rate']:g}.",
        table(runs, arms, FIGURES),
    ]


BENCHMARK = Benchmark("recipe", SETTINGS, Training, write_page)
