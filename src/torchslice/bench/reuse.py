"""Sub-models that work at once: what any set of classes is worth, cut from one trained network and never fine-tuned.

Sub-task training (torchslice's own) over the share of neurons that a class keeps, beside MwT (arXiv 2306.09376) and
the controls.
"""

from __future__ import annotations

import copy
import itertools
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..core.find import find_neurons
from ..data import Data
from ..modular import SubTasks, attach_gates, gate_statistics, objective
from ..modular import slices_from as slices_by_gates
from ..semantic import Contributions, Rule, contributions, slices_from
from ..slices import Slice, union
from ..submodel import reuse
from ..training import fit
from ..use.artefacts import load, save
from ..use.calibrate import calibrate, calibration_error
from ..use.controls import random_like, reinitialised
from ..use.evaluate import accuracy, accuracy_of, device_of, predict_logits, restrict_logits
from ..use.extract import extract
from ..use.finetune import finetune
from ..use.recalibrate import recalibrate
from .experiment import BENCHES, Bench, Network, Part, spent
from .reuse_page import page

METRIC = "taylor"


@dataclass(frozen=True)
class Divided(Network):
    """A network, the sizes of its disjoint sub-tasks and of batches, and the shares that class slices keep."""

    sizes: tuple[int, ...] = (2, 5, 10)
    batch_size: int = 128
    mwt_batch_size: int = 128  # as published
    retentions: tuple[float, ...] = (0.05, 0.1, 0.15, 0.25)


@dataclass(frozen=True)
class Settings:
    """One scale of the bench. `retention`, one of those of every network, is where everything is measured."""

    networks: tuple[Divided, ...]
    seeds: int
    retention: float = 0.15
    taper: float = 0.1
    first_share: float = 1 / 2  # of the epochs, trained as standard does
    sub_tasks: int = 10  # disjoint ones, at most so many of each size
    subsets: int = 45  # at most so many sets of each size
    subset_sizes: tuple[int, ...] = (2, 3, 5)
    statistics_images: int = 500
    samples_per_class: int = 128
    learning_rate: float = 0.05
    mwt_classes: int = 10  # of a batch, where there are more
    scratch: bool = True
    seed: int = 0


SETTINGS = {
    "smoke": Settings(
        (Divided("digits", "convnet", 0.25, epochs=3, sizes=(2, 10), retentions=(0.3, 0.5)),),
        seeds=1,
        retention=0.3,
        subsets=2,
        samples_per_class=16,
    ),
    "cpu": Settings(
        (
            Divided("cifar10", "convnet", 1.0, epochs=12, train_images=20_000, validation_images=2_000, batch_size=64),
            Divided(
                "mnist-pairs",
                "mobilenet",
                0.25,
                epochs=10,
                train_images=10_000,
                validation_images=2_000,
                batch_size=32,
                mwt_batch_size=32,
                sizes=(2, 10, 100),
                retentions=(0.15, 0.25),
            ),
        ),
        seeds=3,
    ),
    "paper": Settings(
        (
            *(Divided("cifar10", name, 1.0, epochs=200) for name in ("resnet18", "vgg16", "mobilenet")),
            Divided("cifar100", "resnet18", 1.0, epochs=200, sizes=(2, 10, 100)),
        ),
        seeds=3,
        samples_per_class=256,
    ),
}


@dataclass(frozen=True)
class Reusing(Part):
    """One network, trained in every way, and its sub-models."""

    def result(self) -> dict[str, Any]:
        settings, data = self.settings, self.data
        seconds: dict[str, float] = {}
        standard = self.new(data)
        self.note(f"standard training, {self.network.epochs} epochs")
        seconds["standard"] = spent(fit(standard, data, folder=self.folder / "standard", **self.training))
        tasks = disjoint(len(data.classes), self.network.sizes, settings.sub_tasks, settings.seed)
        whole = predict_logits(standard, data)
        arms: list[dict[str, Any]] = []

        def add(arm: str, retention: float, found: Mapping[tuple[int, ...], float]) -> None:
            for size in self.network.sizes:
                values = [right for task, right in found.items() if len(task) == size]
                arms.append({"arm": arm, "retention": retention, "size": size, "accuracy": sum(values) / len(values)})

        add("standard, restricted", 1.0, {task: restricted(whole, data, task) for task in tasks})
        scores = self.contributions(standard)
        for retention in self.network.retentions:
            slices = self.slices(scores, retention)
            add("control: standard, sliced", kept(slices), self.scores(standard, slices, tasks))
        self.published(tasks, add, seconds)
        first = round(self.network.epochs * settings.first_share)
        self.note(f"first part of ours, {first} epochs")
        start = self.new(data)
        begun = spent(fit(start, data, folder=self.folder / "first", **{**self.training, "epochs": first}))
        started = time.perf_counter()
        scores = self.contributions(start)
        begun += time.perf_counter() - started
        for retention in self.network.retentions:
            started = time.perf_counter()
            slices = self.slices(scores, retention)
            choosing = time.perf_counter() - started
            ours, rows = self.subtasks(start, slices, f"ours-{retention:g}")
            if retention == settings.retention:
                seconds["ours"] = begun + choosing + spent(rows)
                chosen = (ours, slices)
            add("ours", kept(slices), self.scores(ours, slices, tasks))
        ours, slices = chosen
        chance = {name: random_like(part, seed=self.seed + i) for i, (name, part) in enumerate(slices.items())}
        lucky, _ = self.subtasks(start, chance, "random")
        add("control: random slices, trained", kept(chance), self.scores(lucky, chance, tasks))
        if settings.scratch:
            add("control: from scratch", kept(slices), {task: self.scratch(ours, slices, task) for task in tasks})
        return {
            "arms": arms,
            "seconds": seconds,
            "retention": settings.retention,
            "subsets": self.subsets(ours, slices, whole),
            "calibration": self.calibration(ours, slices, whole, tasks),
            "artefact_seconds": {
                f"{self.network.model} of this table": self.artefact(ours, slices),
                "resnet18, full width": self.artefact(*self.large()),
            },
        }

    # -- training -----------------------------------------------------------------------------------------------
    @property
    def training(self) -> dict[str, Any]:
        return {**super().training, "batch_size": self.network.batch_size}

    def contributions(self, model: nn.Module) -> Contributions:
        """Measure by what sub-task training chooses class slices."""
        options: dict[str, Any] = {"samples_per_class": self.settings.samples_per_class, "seed": self.seed}
        return contributions(model, self.data, metric=METRIC, **options, **self.running)

    def slices(self, scores: Contributions, retention: float) -> dict[str, Slice]:
        """Choose class slices as sub-task training does."""
        return slices_from(scores, Rule(METRIC, "budget", share=retention, taper=self.settings.taper)).by_class

    def subtasks(
        self, start: nn.Module, slices: dict[str, Slice], folder: str
    ) -> tuple[nn.Module, list[dict[str, Any]]]:
        """Train sub-tasks on class slices, from a network that is not changed; returns the rows of training too."""
        self.note(f"sub-task training, {folder}, {kept(slices):.1%} of the neurons per class")
        model = copy.deepcopy(start)
        losses = SubTasks(model, slices, self.data.example.to(device_of(model)))
        epochs = self.network.epochs - round(self.network.epochs * self.settings.first_share)
        options = {**self.training, "epochs": epochs, "classes_per_batch": losses.sizes}
        return model, fit(model, self.data, objective=losses, folder=self.folder / folder, **options)

    def published(self, tasks: Sequence[tuple[int, ...]], add: Any, seconds: dict[str, float]) -> None:
        """Train MwT; score its sub-models as published, and with folded gates and statistics of their own."""
        data, settings = self.data, self.settings
        gated = attach_gates(self.new(data), data.example, seed=self.seed)
        self.note(f"MwT, {self.network.epochs} epochs")
        few = (settings.mwt_classes,) if len(data.classes) > settings.mwt_classes else None
        options = {**self.training, "classes_per_batch": few, "batch_size": self.network.mwt_batch_size}
        seconds["MwT"] = spent(fit(gated, data, objective=objective(), folder=self.folder / "mwt", **options))
        statistics = gate_statistics(gated, data, **self.running)
        slices, means = slices_by_gates(gated, statistics), statistics.mean
        example, plain = data.example.to(device_of(gated)), gated.fold()
        dropped, folded = {}, {}
        for task in tasks:
            only = self.only(task)
            part = union(slices[data.classes[label]] for label in task)
            dropped[task] = accuracy(extract(plain, part, example, classes=task), only).overall
            own = gated.fold({layer: mean[list(task)].mean(0) for layer, mean in means.items()})
            small = extract(own, part, example, classes=task)
            folded[task] = accuracy(self.recalibrated(small, only), only).overall
        add("MwT, as published", kept(slices), dropped)
        add("MwT, folded and recalibrated", kept(slices), folded)

    # -- sub-models ---------------------------------------------------------------------------------------------
    def only(self, task: Sequence[int]) -> Data:
        """Return the data of some classes."""
        return self.data.restrict([self.data.classes[label] for label in task])

    def recalibrated(self, small: nn.Module, only: Data) -> nn.Module:
        sample = only.train.limit(self.settings.statistics_images, seed=self.seed).images
        return recalibrate(small, only.normalise(sample), seed=self.seed)

    def cut(self, model: nn.Module, slices: Mapping[str, Slice], task: Sequence[int]) -> tuple[nn.Module, Data]:
        """Cut the sub-model of some classes and give it batch-norm statistics of their images; return these too."""
        only, part = self.only(task), union(slices[self.data.classes[label]] for label in task)
        small = extract(model, part, self.data.example.to(device_of(model)), classes=task)
        return self.recalibrated(small, only), only

    def scores(
        self, model: nn.Module, slices: Mapping[str, Slice], tasks: Sequence[tuple[int, ...]]
    ) -> dict[tuple[int, ...], float]:
        """Return the test accuracy of every sub-model."""
        return {task: accuracy(*self.cut(model, slices, task)).overall for task in tasks}

    def scratch(self, model: nn.Module, slices: Mapping[str, Slice], task: tuple[int, ...]) -> float:
        """Train a network of a sub-model's size on its sub-task, as long as the parent was."""
        self.note(f"from scratch, classes {task}")
        small, only = self.cut(model, slices, task)
        tuned = finetune(reinitialised(small, seed=self.seed), only, **self.training)
        return accuracy(tuned.model, only).overall

    def subsets(self, model: nn.Module, slices: Mapping[str, Slice], whole: Tensor) -> list[dict[str, Any]]:
        """Score sub-models of any classes beside the standard network restricted to them."""
        count, found = len(self.data.classes), []
        for size in (*self.settings.subset_sizes, count):
            tasks = draw_subsets(count, size, self.settings.subsets, self.seed)
            right = self.scores(model, slices, tasks)
            values = [[right[task], restricted(whole, self.data, task)] for task in tasks]
            found.append({"size": size, "values": values})
        return found

    def calibration(
        self, model: nn.Module, slices: Mapping[str, Slice], whole: Tensor, tasks: Sequence[tuple[int, ...]]
    ) -> list[dict[str, float]]:
        """Return the calibration error of every sub-model, as cut and calibrated, and of the restricted network."""
        found = []
        for task in tasks:
            small, only = self.cut(model, slices, task)
            networks = {"cut": small, "calibrated": calibrate(small, only)[0]}
            errors = {
                name: calibration_error(predict_logits(n, only), only.test.labels) for name, n in networks.items()
            }
            errors["restricted"] = calibration_error(*answers(whole, self.data, task))
            found.append({"size": len(task), **errors})
        return found

    def large(self) -> tuple[nn.Module, dict[str, Slice]]:
        """Return an untrained network of full size with random slices: it takes as long as a trained one."""
        data = self.data
        model = models.create("resnet18", num_classes=len(data.classes), channels=data.train.images.shape[1])
        neurons = find_neurons(model, data.example)
        share = self.settings.retention
        return model, {name: neurons.random(share, seed=i) for i, name in enumerate(data.classes)}

    def artefact(self, model: nn.Module, slices: Mapping[str, Slice]) -> float:
        """Return the seconds from a trained network in memory to the artefact of two classes, written and read back."""
        pair, images = self.data.classes[:2], self.settings.statistics_images
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pair.safetensors"
            started = time.perf_counter()
            made = reuse(model, self.data, slices=slices, classes=pair, recalibration_images=images, **self.running)
            save(made.model, path, classes=made.classes, preprocessing=self.data.preprocessing)
            load(path)
            return time.perf_counter() - started


def kept(slices: Mapping[str, Slice]) -> float:
    """Return the mean share of neurons of class slices."""
    return sum(part.neuron_retention for part in slices.values()) / len(slices)


def answers(whole: Tensor, data: Data, task: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return test logits [n, k] and labels [n] of classes in rising order, from the logits [N, C] of all images."""
    classes, labels = torch.tensor(task), data.test.labels.cpu()
    chosen = torch.isin(labels, classes)
    return restrict_logits(whole[chosen], task), torch.searchsorted(classes, labels[chosen])


def restricted(whole: Tensor, data: Data, task: Sequence[int]) -> float:
    """Score a whole network that knows which classes are asked for."""
    return accuracy_of(*answers(whole, data, task)).overall


def disjoint(count: int, sizes: Sequence[int], most: int, seed: int) -> list[tuple[int, ...]]:
    """Return for every size the sub-tasks that follow each other and do not overlap, or `most` of them at random.

    >>> disjoint(5, (2, 3), 10, seed=0)
    [(0, 1), (2, 3), (0, 1, 2)]
    """
    found = []
    for size in sizes:
        every = [tuple(range(i, i + size)) for i in range(0, count - size + 1, size)]
        found += every if len(every) <= most else sorted(random.Random(seed).sample(every, most))
    return found


def draw_subsets(count: int, size: int, most: int, seed: int) -> list[tuple[int, ...]]:
    """Return all sets of `size` of `count` classes, or `most` different ones of them at random.

    >>> draw_subsets(3, 2, 45, seed=0)
    [(0, 1), (0, 2), (1, 2)]
    """
    if count <= 12 and len(every := list(itertools.combinations(range(count), size))) <= most:
        return every
    generator, found = random.Random(seed), set[tuple[int, ...]]()
    while len(found) < (1 if size == count else most):
        found.add(tuple(sorted(generator.sample(range(count), size))))
    return sorted(found)


BENCHES.register("reuse")(Bench("reuse", SETTINGS, Reusing, page))
