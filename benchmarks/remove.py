"""Removing a class: what a network still knows of it, beside networks that were trained without it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torchslice as ts
from torchslice import judge
from torchslice.graph.neurons import Neurons

from .experiment import Benchmark, Network, Part, Scale, neurons_of
from .tables import Run, Runs, about_training, figure, page, table

ARMS = {
    "control": "trained without the class, from the first",
    "control: another seed": "likewise; how far two networks are apart that have never seen the class",
    "row removed": "the network that knows the class, without its logit",
    "row removed, tuned": "then trained on the other classes",
    "row and neurons": "`remove`: without the logit and the neurons that only the class needs",
    "row and neurons, tuned": "then trained on the other classes",
}


@dataclass(frozen=True)
class Settings(Scale):
    """One scale of the benchmark: how many classes are removed, in turn, and how long tuning is."""

    classes: int = 3
    neuron_fraction: float = 0.1
    tuning_epochs: int = 2
    samples: int = 1000


SETTINGS = {
    "smoke": Settings((Network("digits", "convnet", 0.25, epochs=2),), 1, 16, classes=1, tuning_epochs=1, samples=100),
    "cpu": Settings((Network("fashion-mnist", "convnet", 0.25, 4, train_images=6_000, validation_images=1_000),)),
    "paper": Settings((Network("cifar10", "resnet18", 1.0, epochs=60),), classes=10, tuning_epochs=5),
}


@dataclass(frozen=True)
class Removing(Part):
    """One trained network, without some of its classes in turn."""

    def result(self) -> dict[str, Any]:
        neurons = neurons_of(self.trained(self.task, folder=self.folder / "whole"), self.task)
        scores = self.contributions(neurons, self.task, metric="taylor")
        strategy = ts.semantic.PerClass(self.settings.neuron_fraction)
        slices = ts.semantic.class_slices(neurons, self.task, scores, strategy=strategy)
        rows = []
        for name in self.task.classes[: self.settings.classes]:
            networks = self.networks(neurons, slices, name)
            self.note(f"what is left of {name}")
            traces = judge.forgetting(networks, self.task, classes=[name], samples=self.settings.samples)
            for arm, row in traces.rows.items():
                probes, size = list(row.pop("probe").values()), networks[arm].full().total
                about = {"probe": fmean(probes), "last_probe": probes[-1], "neurons": size / neurons.full().total}
                rows.append({"class": name, "arm": arm, **row, **about, "never": float(row["steps"] is None)})
        return {"rows": rows}

    def networks(self, neurons: Neurons, slices: Any, name: str) -> dict[str, Neurons]:
        """Return the networks without a class, by arm."""
        rest = self.task.restrict([other for other in self.task.classes if other != name])
        other = replace(self, seed=self.seed + 1000)
        row = ts.extract(neurons, neurons.full(), classes=list(rest.classes))
        both = ts.remove(neurons, slices, classes=[name])
        tuning = replace(self.training, epochs=self.settings.tuning_epochs, learning_rate=0.02)
        made = {
            "control": self.trained(rest, folder=self.folder / name),
            "control: another seed": other.trained(rest, folder=self.folder / f"{name}-again"),
            "row removed": row,
            "row removed, tuned": ts.finetune(row, rest, tuning).model,
            "row and neurons": both,
            "row and neurons, tuned": ts.finetune(both, rest, tuning).model,
        }
        return {arm: neurons_of(model.eval(), rest) for arm, model in made.items()}


# -- the page -----------------------------------------------------------------------------------------------------
FIGURES = {
    "kept accuracy": figure("rows", "kept_accuracy"),
    "distance": figure("rows", "distance"),
    "probe, mean": figure("rows", "probe"),
    "probe, last layer": figure("rows", "last_probe"),
    "steps to relearn": figure("rows", "steps", percent=False),
    "never": figure("rows", "never"),
    "neurons": figure("rows", "neurons"),
}


def write_page(result: dict[str, Any], path: Path) -> str:
    """Write one table per network."""
    settings = result["manifest"]["settings"]
    text = (
        f"{settings['classes']} classes are removed, one in turn. A network has forgotten if it is like the control: "
        "*distance* is the mean total variation between its probabilities and the control's on test images of the "
        "class, *probe* the accuracy of a linear classifier on a layer that tells the class from the others (50 is "
        "chance), *steps* those of training with a new row until half of the class is right again, where it is. "
        "Percent, first the mean over the classes, then mean ± standard deviation over the seeds."
    )
    return page("Removing a class", result, text=[text], section=section, arms=ARMS)


def section(runs: Runs, network: Run) -> list[str]:
    """Write the table of one network."""
    names = ", ".join(dict.fromkeys(row["class"] for row in runs[0]["rows"]))
    about = f"{about_training(network)}. Removed in turn: {names}."
    return [about, table(runs, [(arm, {"arm": arm}) for arm in ARMS], FIGURES, corner="arm")]


BENCHMARK = Benchmark("remove", SETTINGS, Removing, write_page)
