"""Sub-models that work at once: what any set of classes is worth, cut from one trained network and never fine-tuned.

Sub-task training (torchslice's own) over the fraction of neurons that a class keeps, beside MwT (arXiv 2306.09376) and
the controls.
"""

from __future__ import annotations

import copy
import itertools
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import torchslice as ts
from torchslice import Slice, accuracy, extract, fit, gates, judge
from torchslice.data import Task
from torchslice.graph.neurons import Neurons
from torchslice.rankings import Ranking, by_score
from torchslice.runs.run import prefixes
from torchslice.slices import union
from torchslice.training.placement import choose_placement

from .experiment import Benchmark, Network, Part, Scale, neurons_of, spent
from .tables import (
    Cell,
    Curve,
    Run,
    Runs,
    about_training,
    by_network,
    curve,
    deviation,
    draw,
    figure,
    found,
    page,
    table,
)

Labels = tuple[int, ...]  # of the classes of a sub-task, rising


@dataclass(frozen=True)
class Divided(Network):
    """A network, the sizes of its disjoint sub-tasks and of batches, and the fractions that class slices keep."""

    sizes: tuple[int, ...] = (2, 5, 10)
    batch_size: int = 128
    mwt_batch_size: int = 128  # as published
    neuron_fractions: tuple[float, ...] = (0.05, 0.1, 0.15, 0.25)


@dataclass(frozen=True)
class Settings(Scale):
    """One scale of the benchmark. `neuron_fraction` is where everything is measured."""

    neuron_fraction: float = 0.15
    first_fraction: float = 1 / 2  # of the epochs, trained as standard does
    sub_tasks: int = 10  # disjoint ones, at most so many of each size
    subsets: int = 45  # at most so many sets of each size
    subset_sizes: tuple[int, ...] = (2, 3, 5)
    recalibration_samples: int = 500


DIGITS = Divided("digits", "convnet", 0.25, epochs=3, sizes=(2, 10), neuron_fractions=(0.3, 0.5))
CIFAR = Divided("cifar10", "convnet", 1.0, 12, train_images=20_000, validation_images=2_000, batch_size=64)
PAPER = tuple(Divided("cifar10", name, 1.0, epochs=200) for name in ("resnet18", "vgg16", "mobilenet"))
HUNDRED = Divided("cifar100", "resnet18", 1.0, epochs=200, sizes=(2, 10, 100))
SETTINGS = {
    "smoke": Settings((DIGITS,), 1, samples_per_class=16, neuron_fraction=0.3, subsets=2),
    "cpu": Settings((CIFAR,)),
    "paper": Settings((*PAPER, HUNDRED), samples_per_class=256),
}

ARMS = {
    "standard, restricted": "standard training, whole, logits restricted to the sub-task: what sub-models are held to",
    "ours": "standard training for the first part, then sub-task training on class slices chosen from it",
    "MwT, as published": "trained with gates; gates dropped, nothing fine-tuned",
    "MwT, folded and recalibrated": "the same, mean gates in the weights, batch-norm statistics of the sub-task",
    "control: standard, sliced": "slices chosen as ours are, of the standard network, without sub-task training",
    "control: random slices, trained": "sub-task training on random class slices with as many neurons in every layer",
    "control: from scratch": "a network of our sub-model's size, trained on the sub-task as long as the parent",
}


@dataclass(frozen=True)
class Sliced:
    """A network and its class slices."""

    neurons: Neurons
    slices: Mapping[str, Slice]

    @property
    def retention(self) -> float:
        """The mean fraction of the neurons that a class keeps."""
        return fmean(slice_.neuron_retention for slice_ in self.slices.values())

    def cut(self, labels: Labels) -> nn.Module:
        """Cut the sub-model of some classes."""
        names = self.neurons.classes or ()
        return extract(self.neurons, union(self.slices[names[label]] for label in labels), classes=labels)


@dataclass(frozen=True)
class Reusing(Part):
    """One network, trained in every way, and its sub-models."""

    def result(self) -> dict[str, Any]:
        settings, task, fractions = self.settings, self.task, self.network.neuron_fractions
        groups = disjoint(len(task.classes), self.network.sizes, settings.sub_tasks, settings.seed)
        arms: list[dict[str, Any]] = []

        def add(arm: str, retention: float, score: Callable[[Labels], float], fraction: float | None = None) -> None:
            scores = {labels: score(labels) for labels in groups}
            about = {"arm": arm, "neuron_fraction": fraction, "retention": retention}
            for size in self.network.sizes:
                value = fmean(score for labels, score in scores.items() if len(labels) == size)
                arms.append({**about, "size": size, "accuracy": value})

        standard = neurons_of(self.new(task), task)
        seconds = {"standard": self.train(standard.model, "standard")}
        whole = judge.predict(standard.model, task)
        add("standard, restricted", 1.0, partial(restricted, whole, task))
        scores = self.contributions(standard, task)
        for fraction in fractions:
            sliced = Sliced(standard, prefixes(ts.subtasks.rank(standard, task, scores), fraction))
            add("control: standard, sliced", sliced.retention, partial(self.score, sliced), fraction)
        seconds["MwT"] = self.published(add)

        start, first = neurons_of(self.new(task), task), self.first_epochs
        begun = self.train(start.model, "first", epochs=first)
        started = time.perf_counter()
        scores = self.contributions(start, task)
        begun += time.perf_counter() - started
        rankings = ts.subtasks.rank(start, task, scores)
        neurons, rest = self.subtasks(start, rankings, "ours")
        seconds["ours"] = begun + rest
        for fraction in fractions:
            sliced = Sliced(neurons, prefixes(rankings, fraction))
            add("ours", sliced.retention, partial(self.score, sliced), fraction)
        ours = Sliced(neurons, prefixes(rankings, settings.neuron_fraction))
        generator = torch.Generator().manual_seed(self.seed)
        layers = {name: layer.count for name, layer in start.layers.items()}
        chance = {
            name: by_score({layer: torch.rand(count, generator=generator) for layer, count in layers.items()})
            for name in rankings
        }
        neurons, _ = self.subtasks(start, chance, "random")
        lucky = Sliced(neurons, prefixes(chance, settings.neuron_fraction))
        add("control: random slices, trained", lucky.retention, partial(self.score, lucky))
        add("control: from scratch", ours.retention, partial(self.scratch, ours))
        parents = {row["size"]: row["accuracy"] for row in found(arms, arm="standard, restricted")}
        return {
            "arms": [{**row, "of_parent": row["accuracy"] / parents[row["size"]]} for row in arms],
            "seconds": seconds,
            "subsets": list(self.subsets(ours, whole)),
            "calibration": [row for labels in groups for row in self.calibration(ours, whole, labels)],
            "times": [
                *({"what": f"training, {arm}", "value": seconds[arm] / seconds["standard"]} for arm in ("ours", "MwT")),
                {"what": "artefact, s", "value": self.artefact(ours)},
                {"what": "artefact of resnet18, full width, s", "value": self.artefact(self.large())},
            ],
        }

    # -- training -------------------------------------------------------------------------------------------------
    @property
    def first_epochs(self) -> int:
        return round(self.network.epochs * self.settings.first_fraction)

    def train(self, model: nn.Module, folder: str, *, objective: Any = None, **changes: Any) -> float:
        """Train a network in place, and return the seconds."""
        self.note(folder)
        training = replace(self.training, **{"batch_size": self.network.batch_size, **changes})
        return spent(fit(model, self.task, training, objective=objective, folder=self.folder / folder))

    def subtasks(self, start: Neurons, rankings: Mapping[str, Ranking], folder: str) -> tuple[Neurons, float]:
        """Train sub-tasks by class rankings, from a network that is not changed; returns the seconds too."""
        neurons, epochs = start.on(copy.deepcopy(start.model)), self.network.epochs - self.first_epochs
        losses = ts.subtasks.objective(neurons, rankings, round_to=1)
        return neurons, self.train(neurons.model, folder, objective=losses, epochs=epochs)

    def published(self, add: Callable[[str, float, Callable[[Labels], float]], None]) -> float:
        """Train MwT; score its sub-models as published, and with folded gates and statistics of their own."""
        task = self.task
        gated = gates.attach(neurons_of(self.new(task), task), seed=self.seed)
        seconds = self.train(gated, "mwt", objective=gates.objective(), batch_size=self.network.mwt_batch_size)
        statistics = gates.statistics(gated, task, progress=self.progress)
        published = Sliced(gated.neurons.on(gated.fold()), gates.slices_from(gated, statistics))

        def folded(labels: Labels) -> float:
            means = {layer: values[list(labels)].mean(0) for layer, values in statistics.mean.items()}
            return self.score(Sliced(gated.neurons.on(gated.fold(means)), published.slices), labels)

        def as_published(labels: Labels) -> float:
            return accuracy(published.cut(labels), self.only(labels)).overall

        add("MwT, as published", published.retention, as_published)
        add("MwT, folded and recalibrated", published.retention, folded)
        return seconds

    # -- sub-models -----------------------------------------------------------------------------------------------
    def only(self, labels: Labels) -> Task:
        """Return the task of some classes."""
        return self.task.restrict([self.task.classes[label] for label in labels])

    def recalibrated(self, sliced: Sliced, labels: Labels) -> nn.Module:
        """Cut the sub-model of some classes, with batch-norm statistics of their images."""
        samples = self.settings.recalibration_samples
        return judge.recalibrate(sliced.cut(labels), self.only(labels), samples=samples, seed=self.seed)

    def score(self, sliced: Sliced, labels: Labels) -> float:
        """Return the test accuracy of the sub-model of some classes."""
        return accuracy(self.recalibrated(sliced, labels), self.only(labels)).overall

    def scratch(self, sliced: Sliced, labels: Labels) -> float:
        """Train a network of a sub-model's size on its sub-task, as long as the parent was, and score it."""
        self.note(f"from scratch, classes {labels}")
        new, only = judge.reinitialised(sliced.cut(labels), seed=self.seed), self.only(labels)
        training = replace(self.training, batch_size=self.network.batch_size)
        return accuracy(ts.finetune(new, only, training).model, only).overall

    def subsets(self, sliced: Sliced, whole: Tensor) -> Iterator[dict[str, Any]]:
        """Score sub-models of any classes beside the standard network restricted to them."""
        count = len(self.task.classes)
        for size in (*self.settings.subset_sizes, count):
            for labels in draw_subsets(count, size, self.settings.subsets, self.seed):
                ours, standard = self.score(sliced, labels), restricted(whole, self.task, labels)
                yield {"size": size, "ours": ours, "standard": standard, "change": ours - standard}

    def calibration(self, sliced: Sliced, whole: Tensor, labels: Labels) -> Iterator[dict[str, Any]]:
        """Measure the calibration error of the restricted network, and of a sub-model, as cut and calibrated."""
        small, only = self.recalibrated(sliced, labels), self.only(labels)
        answered = {"standard, restricted": answers(whole, self.task, labels)}
        networks = {"ours, cut": small, "ours, calibrated": judge.calibrate(neurons_of(small, only), only)[0]}
        answered |= {name: (judge.predict(network, only), only.test.labels) for name, network in networks.items()}
        for name, given in answered.items():
            yield {"size": len(labels), "network": name, "error": judge.calibration_error(*given)}

    def large(self) -> Sliced:
        """Return an untrained network of full size with random slices: it takes as long as a trained one."""
        classes, channels = self.task.classes, self.task.example.shape[1]
        model = ts.models.create("resnet18", num_classes=len(classes), channels=channels)
        neurons = neurons_of(model.to(choose_placement(self.device).device), self.task)
        fraction = self.settings.neuron_fraction
        return Sliced(neurons, {name: neurons.random(fraction, seed=i) for i, name in enumerate(classes)})

    def artefact(self, sliced: Sliced) -> float:
        """Return the seconds from a trained network in memory to the artefact of two classes, written and read back."""
        options = {"classes": self.task.classes[:2], "recalibration_samples": self.settings.recalibration_samples}
        options["tune"] = False
        with tempfile.TemporaryDirectory() as folder:
            path, started = Path(folder) / "pair.safetensors", time.perf_counter()
            neurons = neurons_of(sliced.neurons.model, self.task)
            ts.save(ts.reuse(neurons, self.task, sliced.slices, **options), path)
            ts.load(path)
            return time.perf_counter() - started


def answers(whole: Tensor, task: Task, labels: Labels) -> tuple[Tensor, Tensor]:
    """Return test logits [n, k] and labels [n] of some classes, from the logits [N, C] of all test images."""
    classes = torch.tensor(labels)
    chosen = torch.isin(task.test.labels, classes)
    return whole[chosen][:, list(labels)], torch.searchsorted(classes, task.test.labels[chosen])


def restricted(whole: Tensor, task: Task, labels: Labels) -> float:
    """Score a whole network that knows which classes are asked for."""
    return judge.accuracy_of(*answers(whole, task, labels)).overall


def disjoint(count: int, sizes: Sequence[int], most: int, seed: int) -> list[Labels]:
    """Return for every size the sub-tasks that follow each other and do not overlap, or `most` of them at random.

    >>> disjoint(5, (2, 3), 10, seed=0)
    [(0, 1), (2, 3), (0, 1, 2)]
    """
    groups = []
    for size in sizes:
        every = [tuple(range(i, i + size)) for i in range(0, count - size + 1, size)]
        groups += every if len(every) <= most else sorted(random.Random(seed).sample(every, most))
    return groups


def draw_subsets(count: int, size: int, most: int, seed: int) -> list[Labels]:
    """Return all sets of `size` of `count` classes, or `most` different ones of them at random.

    >>> draw_subsets(3, 2, 45, seed=0)
    [(0, 1), (0, 2), (1, 2)]
    """
    if count <= 12 and len(every := list(itertools.combinations(range(count), size))) <= most:
        return every
    generator, drawn = random.Random(seed), set[Labels]()
    while len(drawn) < (1 if size == count else most):
        drawn.add(tuple(sorted(generator.sample(range(count), size))))
    return sorted(drawn)


# -- the page -----------------------------------------------------------------------------------------------------
SUBSETS = {
    "mean": figure("subsets", "ours"),
    "spread": figure("subsets", "ours", of=deviation),
    "worst": figure("subsets", "ours", of=min),
    "standard: mean": figure("subsets", "standard"),
    "standard: spread": figure("subsets", "standard", of=deviation),
    "standard: worst": figure("subsets", "standard", of=min),
    "largest loss": figure("subsets", "change", of=min),
}


def write_page(result: dict[str, Any], path: Path) -> str:
    """Draw the curves over retention, and write the tables of every network."""
    settings = result["manifest"]["settings"]
    text = (
        "Test accuracy in percent of sub-models that were cut and never fine-tuned, mean over disjoint sub-tasks "
        f"({settings['sub_tasks']} of a size at most), then mean ± standard deviation over the seeds; in brackets its "
        "fraction of that of the standard network restricted to the same classes. Cut networks get batch-norm "
        f"statistics of {settings['recalibration_samples']} training images of their classes, unless it says "
        "otherwise. Times of training are over those of standard training; those of an artefact are from a trained "
        "network in memory to a saved and checked artefact of two classes."
    )
    panels = {
        f"{name}, {size} classes": {arm: [points(run, arm, size) for run in runs] for arm in ARMS}
        for name, runs in by_network(result["runs"]).items()
        for size in dict.fromkeys(row["size"] for row in runs[0]["arms"])
    }
    title = "Sub-models without fine-tuning; mean ± deviation over the seeds"
    x, y = "neurons per class, %", "test accuracy, %"
    picture = draw(path.with_suffix(".png"), panels, x=x, y=y, title=title)
    name = list(panels)[len(panels) // 6]  # of medium size, of the first network: for the front page
    draw(path.with_name(f"{path.name}-one.png"), {name: panels[name]}, x=x, y=y, title=title)
    return page("Sub-models that work at once", result, text=[text], section=section, arms=ARMS, picture=picture)


def points(run: Run, arm: str, size: int) -> Curve:
    """Return accuracy over retention; the standard network is a level line as long as ours."""
    own = curve(run["arms"], "retention", "accuracy", arm=arm, size=size)
    ends = [min, max] if arm == "standard, restricted" else []
    return [(end(points(run, "ours", size))[0], own[0][1]) for end in ends] or own


def section(runs: Runs, network: Run) -> list[str]:
    """Write the arms, sets of any classes, calibration and times of one network."""
    first, sizes = runs[0], network["sizes"]

    def of_size(size: int) -> Cell:
        """The accuracy, and its fraction of the restricted standard network's."""
        own = figure("arms", "accuracy", size=size)
        ratio = figure("arms", "of_parent", percent=False, digits=3, size=size)
        return lambda runs, row: f"{own(runs, row)} ({ratio(runs, row).partition(' ')[0]})"

    keys = [(arm, row["neuron_fraction"]) for arm in ARMS for row in found(first["arms"], arm=arm)]
    arms = [(arm, {"arm": arm, "neuron_fraction": fraction}) for arm, fraction in dict.fromkeys(keys)]
    figures = {"neurons per class, %": figure("arms", "retention")} | {f"{n} classes": of_size(n) for n in sizes}
    counts = Counter(row["size"] for row in first["subsets"])
    errors = {f"{n} classes": figure("calibration", "error", size=n) for n in sizes}
    networks = [(name, {"network": name}) for name in dict.fromkeys(row["network"] for row in first["calibration"])]
    times = [(row["what"], {"what": row["what"]}) for row in first["times"]]
    return [
        f"{about_training(network)}, batches of {network['batch_size']} (MwT {network['mwt_batch_size']}).",
        table(runs, arms, figures),
        table(
            runs, [(f"{n} set(s) of {s}", {"size": s}) for s, n in counts.items()], SUBSETS, corner="ours, any classes"
        ),
        table(runs, networks, errors, corner="calibration error, %"),
        table(runs, times, {"value": figure("times", "value", percent=False, digits=2)}, corner="time"),
    ]


BENCHMARK = Benchmark("reuse", SETTINGS, Reusing, write_page)
