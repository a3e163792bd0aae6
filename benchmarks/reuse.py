"""Sub-models of any classes at any size: of any trained network with a little tuning, at once of one trained for it.

What a sub-model is worth over its multiply-accumulates and over the seconds it took, beside the same tuning of random
slices and of new networks, MwT (arXiv 2306.09376) and MODA.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import nn

import torchslice as ts
from torchslice import Slice, Training, extract, gates, judge
from torchslice.data import Task
from torchslice.files import atomic_write
from torchslice.find.gates.slicing import GateStatistics
from torchslice.graph.neurons import Neurons
from torchslice.inputs import device_of
from torchslice.rankings import Ranking
from torchslice.reused import Reused
from torchslice.runs.recipe import make_model
from torchslice.slices import union
from torchslice.submodel import a_minute
from torchslice.training.costs import Cost, cost, latency_ms

from . import moda, reuse_page
from .experiment import Benchmark, Cells, Network, Part, Scale, neurons_of, spent
from .superclasses import SUPERCLASSES

Labels = tuple[int, ...]  # of the classes of a sub-task, rising
Trained = tuple[nn.Module, int]  # a network, and how many samples it saw when it was made of a trained one
Make = Callable[[], Trained]


@dataclass(frozen=True)
class Asked(Network):
    """A network, and what is asked of it; its name may have widths, as fast-64-256-256 has.

    Attributes:
        budgets: (number of classes, fractions of the MACs): the sizes of sub-tasks and of their sub-models.
        most: so many sub-tasks of a size, at most.
        compared: the budget at which networks are trained from scratch, as its place among those of a size; ten times
            as long for the first sub-task alone.
        rivals: whether MwT and MODA are trained too.
        seeds: number of seeds, where it is not that of the scale.
    """

    budgets: tuple[tuple[int, tuple[float, ...]], ...] = ((2, (0.1, 0.2, 0.4)), (5, (0.2, 0.5)), (10, (0.5, 1.0)))
    most: int = 3
    compared: int = 1
    rivals: bool = True
    seeds: int | None = None


@dataclass(frozen=True)
class Settings(Scale):
    """One scale of the benchmark. The first training follows the default recipe, but for the epochs."""

    recalibration_samples: int = 1000
    pairs: int = 45  # cut at once, at most
    pairs_at: float = 0.4  # of the MACs
    tuning_epochs: int | None = None  # None is about a minute of one core
    longer: int = 10  # times the tuning: a network from scratch
    published_epochs: int = 10  # of MwT's fine-tuning, at its published learning rate
    published_rate: float = 0.05
    repeats: int = 11  # of every measured latency


HUNDRED = ((2, (0.1, 0.2)), (5, (0.2, 0.5)), (10, (0.2, 0.5)), (100, (0.5, 1.0)))
SMALL = Asked("digits", "convnet", 0.25, epochs=2, budgets=((2, (0.6,)), (10, (0.8,))), most=1, compared=0)
SETTINGS = {
    "smoke": Settings(
        (SMALL,), 1, samples_per_class=16, pairs=2, pairs_at=0.6, longer=2, published_epochs=1, repeats=1
    ),
    "cpu": Settings(
        (
            Asked("cifar10", "fast", 1.0, epochs=12),
            Asked("cifar10", "fast-64-256-256", 1.0, epochs=10, rivals=False, seeds=1),
            Asked("cifar100", "fast", 1.0, epochs=12, budgets=HUNDRED, seeds=1),
        ),
        learning_rate=0.15,
    ),
    "paper": Settings(
        tuple(Asked("cifar10", name, 1.0, epochs=20) for name in ("resnet18", "vgg16")), 1, tuning_epochs=5
    ),
}

ARMS = {
    "whole network": "trained as usual, answering with one of the chosen classes only: what the others are held to",
    "slice, tuned": "of this network, chosen by contributions to the classes, tuned on their images for about a minute",
    "slice": "the same before tuning: what remains is fitted to make up for what left, without labels",
    "trained to be cut": "of a network trained with rankings and budgets: cut and fitted, never tuned",
    "trained to be cut, tuned": "of that network, tuned alike",
    "control: slice, statistics only": "not fitted, only given batch-norm statistics of the classes, never tuned",
    "control: trained to be cut, statistics only": "of the network trained to be cut, not fitted either",
    "control: random slice": "random neurons of the whole network, as many in every layer, fitted alike, never tuned",
    "control: random slice, tuned": "random neurons of the whole network, as many in every layer, tuned alike",
    "control: from scratch": "a new network as wide, its weights drawn anew, in as many steps",
    "control: from scratch, longer": "the same in ten times the steps, for the first sub-task of each size",
    "MwT, as published": "gates dropped; ReLU and a linear layer on the old logits, fine-tuned for ten epochs",
    "MwT, folded": "mean gates of the classes in the weights, statistics of the classes, never tuned",
    "MODA": "trained with its losses and ReLU; modules joined, never tuned",
    "MODA's rule": "the same rule on the network with ReLU trained as usual, never tuned",
}


NEEDED = {  # of `Reusing`, beside the network trained as usual, before an arm is measured
    "trained to be cut": "cuttable",
    "trained to be cut, tuned": "cuttable",
    "control: trained to be cut, statistics only": "cuttable",
    "MwT, as published": "gate_slices",
    "MwT, folded": "gate_slices",
    "MODA": "moda_slices",
    "MODA's rule": "relu_slices",
}


@dataclass(frozen=True)
class Reusing(Part):
    """One network, trained in every way, and its sub-models."""

    def result(self) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {**asdict(self.settings), "networks": asdict(self.network), "seeds": self.seed}
        cells = Cells(self.folder / "cells.jsonl", settings)
        rows = []
        for about, make in self.asked():
            key = {**about, "classes": list(about["classes"])}
            rows.append({**key, **cells(key, partial(self.measured, about["arm"], make, about["classes"]))})
        wholes = {tuple(row["classes"]): row["accuracy"] for row in rows if row["arm"] == "whole network"}
        for row in rows:
            row["size"], row["of_whole"] = len(row["classes"]), row["accuracy"] / wholes[tuple(row["classes"])]
        return {"rows": rows, "pairs": list(self.pairs(cells)), "training": self.trainings()}

    # -- what is measured -----------------------------------------------------------------------------------------
    def asked(self) -> Iterator[tuple[dict[str, Any], Make]]:
        """Yield what a row is about, and what makes its network and says how many samples that was trained on."""
        for number, (size, budgets) in enumerate(self.network.budgets):
            tasks = sub_tasks(self.task.classes, size, self.network.most, seed=self.seed + number)
            for labels in tasks:
                yield {"arm": "whole network", "classes": labels, "budget": None}, self.whole(labels)
                for budget in budgets:
                    compared = budget == budgets[self.network.compared]
                    for arm, make in self.arms(labels, budget, compared, longer=compared and labels == tasks[0]):
                        yield {"arm": arm, "classes": labels, "budget": budget}, make
                for arm, make in self.rivals(labels) if self.network.rivals else ():
                    yield {"arm": arm, "classes": labels, "budget": None}, make

    def arms(self, labels: Labels, budget: float, compared: bool, longer: bool) -> Iterator[tuple[str, Make]]:
        """Yield the arms that are as large as the budget allows."""

        @cache
        def chosen() -> Slice:
            return self.reused(self.standard, labels, budget, tune=False).slice

        def chance(tune: bool) -> Trained:
            random = judge.random_like(chosen(), seed=self.seed)
            return self.made(self.reused(self.standard, labels, None, random, tune=tune))

        def ranked(tune: bool) -> Reused:
            return self.reused(self.cuttable, labels, budget, self.rankings, tune=tune)

        if budget < 1:  # else all of them are the whole network
            yield "slice", lambda: self.made(self.reused(self.standard, labels, budget, tune=False))
            yield "slice, tuned", lambda: self.made(self.reused(self.standard, labels, budget))
            yield "control: slice, statistics only", lambda: self.untuned(self.standard, chosen(), labels)
            yield "control: random slice", lambda: chance(False)
            yield "control: random slice, tuned", lambda: chance(True)
        yield "trained to be cut", lambda: self.made(ranked(False))
        yield (
            "control: trained to be cut, statistics only",
            lambda: self.untuned(self.cuttable, ranked(False).slice, labels),
        )
        yield "trained to be cut, tuned", lambda: self.made(ranked(True))
        if compared:
            yield "control: from scratch", lambda: self.scratch(chosen(), labels, 1)
        if longer:
            yield "control: from scratch, longer", lambda: self.scratch(chosen(), labels, self.settings.longer)

    def rivals(self, labels: Labels) -> Iterator[tuple[str, Make]]:
        """Yield the published methods, whose sub-models have a size of their own."""
        yield "MwT, as published", lambda: self.published(labels)
        yield "MwT, folded", lambda: self.folded(labels)
        yield "MODA", lambda: self.module(self.moda, self.moda_slices, labels)
        yield "MODA's rule", lambda: self.module(self.relu, self.relu_slices, labels)

    def measured(self, arm: str, make: Make, labels: Labels) -> dict[str, Any]:
        """Make a network; return its test accuracy on its classes, what it costs, and what it took to make."""
        for needed in ("standard", NEEDED.get(arm, "standard")):  # the trainings are no part of what it took
            getattr(self, needed)
        self.note(f"{arm}, classes {labels}")
        started = time.process_time()
        model, samples = make()
        seconds, only = time.process_time() - started, self.only(labels)
        logits, mine, whole = judge.predict(model, only), cost(model, self.task.example), self.whole_cost
        networks = {"whole": self.standard.model, "part": model}
        times = latency_ms(networks, self.task.example, repeats=self.settings.repeats)
        speed_up = {f"speed_up_{n}": times["whole"][n].median_ms / times["part"][n].median_ms for n in (1, 64)}
        return {
            "accuracy": judge.accuracy_of(logits, only.test.labels).overall,
            "calibration_error": judge.calibration_error(logits, only.test.labels),
            "parameters": mine.parameters,
            "param_retention": mine.parameters / whole.parameters,
            "mac_retention": mine.macs / whole.macs,
            **{f"ms_{n}": times["part"][n].median_ms for n in (1, 64)},
            **speed_up,
            "samples": samples,
            "core_seconds": seconds,
        }

    def pairs(self, cells: Cells) -> Iterator[dict[str, Any]]:
        """Score pairs of classes, cut at once from the network trained for it and the usual one, beside the whole."""
        every = list(itertools.combinations(range(len(self.task.classes)), 2))
        drawn = sorted(random.Random(self.seed).sample(every, min(self.settings.pairs, len(every))))

        def score(labels: Labels) -> dict[str, float]:
            networks = {"ours": (self.cuttable, self.rankings), "ordinary": (self.standard, None)}
            made = {
                name: self.reused(neurons, labels, self.settings.pairs_at, by, tune=False).model
                for name, (neurons, by) in networks.items()
            }
            made["whole"] = extract(self.standard, self.standard.full(), classes=labels)
            return {name: ts.accuracy(model, self.only(labels)).overall for name, model in made.items()}

        for labels in drawn:
            key = {"arm": "pairs", "classes": list(labels)}
            found = cells(key, partial(score, labels))
            change = {"change": found["ours"] - found["whole"], "ordinary_change": found["ordinary"] - found["whole"]}
            yield {**key, **found, **change}

    # -- trainings ------------------------------------------------------------------------------------------------
    def new(self, task: Task) -> nn.Module:
        name, *widths = self.network.model.split("-")
        arguments = {"widths": tuple(map(int, widths))} if widths else {"width": self.network.width}
        return make_model(name, task, arguments, seed=self.seed)

    def train(self, folder: str, model: nn.Module, *, epochs: int | None = None, **options: Any) -> nn.Module:
        """Train a network in place by the recipe, or read what was trained before."""
        self.note(folder)
        training = replace(self.training, epochs=epochs or self.network.epochs)
        ts.fit(model, self.task, training, folder=self.folder / folder, **options)
        return model

    def trainings(self) -> list[dict[str, Any]]:
        """Return what every training took."""
        logs = {path.parent.name: path.read_text() for path in sorted(self.folder.glob("*/metrics.jsonl"))}
        seconds = {name: spent([json.loads(line) for line in log.splitlines()]) for name, log in logs.items()}
        return [{"what": name, "of_standard": value / seconds["standard"]} for name, value in seconds.items()]

    @cached_property
    def standard(self) -> Neurons:
        return neurons_of(self.train("standard", self.new(self.task)), self.task)

    @cached_property
    def whole_cost(self) -> Cost:
        return cost(self.standard.model, self.task.example)

    @cached_property
    def cuttable(self) -> Neurons:
        """The network trained as usual for the first half of the epochs, then with rankings and budgets."""
        first = self.network.epochs // 2
        neurons = neurons_of(self.train("first", self.new(self.task), epochs=first), self.task)
        objective = ts.subtasks.objective(neurons, self.ranked(neurons), label_smoothing=self.training.label_smoothing)
        self.train("subtasks", neurons.model, epochs=self.network.epochs - first, objective=objective)
        return neurons

    @cached_property
    def rankings(self) -> Mapping[str, Ranking]:
        plain = json.loads((self.folder / "rankings.json").read_text())
        return {name: Ranking.from_plain(of) for name, of in plain.items()}

    def ranked(self, neurons: Neurons) -> Mapping[str, Ranking]:
        """Rank the neurons of the network as it is now, or as it was when it was ranked first."""
        path = self.folder / "rankings.json"
        if not path.is_file():
            found = ts.subtasks.rank(neurons, self.task, self.contributions(neurons, self.task))
            atomic_write(path, json.dumps({name: ranking.to_plain() for name, ranking in found.items()}))
        return self.rankings

    @cached_property
    def gated(self) -> gates.GatedModel:
        made = gates.attach(neurons_of(self.new(self.task), self.task), seed=self.seed)
        self.train("mwt", made, objective=gates.objective())
        return made

    @cached_property
    def gate_slices(self) -> Mapping[str, Slice]:
        return gates.slices_from(self.gated, self.gate_statistics)

    @cached_property
    def gate_statistics(self) -> GateStatistics:
        return gates.statistics(self.gated, self.task, progress=self.progress)

    @cached_property
    def relu(self) -> Neurons:
        return neurons_of(self.train("relu", moda.with_relu(self.new(self.task))), self.task)

    @cached_property
    def relu_slices(self) -> Mapping[str, Slice]:
        return moda.class_slices(self.relu, self.task)

    @cached_property
    def moda(self) -> Neurons:
        neurons = neurons_of(moda.with_relu(self.new(self.task)), self.task)
        return neurons.on(self.train("moda", neurons.model, objective=moda.Moda(neurons)))

    @cached_property
    def moda_slices(self) -> Mapping[str, Slice]:
        return moda.class_slices(self.moda, self.task)

    # -- sub-models -----------------------------------------------------------------------------------------------
    def only(self, labels: Labels) -> Task:
        """Return the task of some classes."""
        return self.task.restrict(self.names(labels))

    def names(self, labels: Labels) -> list[str]:
        """Return the names of some classes."""
        return [self.task.classes[label] for label in labels]

    def whole(self, labels: Labels) -> Make:
        """Return what cuts the whole network to the logits of some classes."""
        return lambda: (extract(self.standard, self.standard.full(), classes=labels), 0)

    def untuned(self, neurons: Neurons, slice_: Slice, labels: Labels) -> Trained:
        """Cut a sub-model and give it batch-norm statistics of its classes."""
        samples, only = self.settings.recalibration_samples, self.only(labels)
        small = extract(neurons, slice_, classes=labels)
        return judge.recalibrate(small, only, samples=samples, seed=self.seed), 0

    def reused(
        self, neurons: Neurons, labels: Labels, budget: float | None, by: Any = None, *, tune: bool = True
    ) -> Reused:
        """Make a sub-model as `reuse` does by default: within a budget, or of a slice."""
        names = self.names(labels)
        options: dict[str, Any] = {"mac_retention": budget, "tune": tune, "seed": self.seed, "progress": self.progress}
        by = dict.fromkeys(names, by) if isinstance(by, Slice) else by
        if tune and self.settings.tuning_epochs:
            options["training"] = self.tuned_for(self.settings.tuning_epochs)
        samples = self.settings.recalibration_samples
        return ts.reuse(neurons, self.task, by, classes=names, recalibration_samples=samples, **options)

    def made(self, reused: Reused) -> Trained:
        """Return the network that was kept, and the samples that its tuning took."""
        samples = len(self.task.restrict(reused.classes).train)
        if "fine-tuned" not in reused.networks:
            return reused.model, 0
        return reused.model, samples * self.tuning(reused.model, reused.costs["sub-model"].macs, samples)

    def tuning(self, model: nn.Module, macs: int, samples: int) -> int:
        """Return the number of epochs by which a sub-model is tuned."""
        return self.settings.tuning_epochs or a_minute(model, macs, samples).epochs

    def tuned_for(self, epochs: int) -> Training:
        """Return the settings of a tuning."""
        return Training(epochs=epochs, seed=self.seed, device=self.device, progress=self.progress)

    def scratch(self, slice_: Slice, labels: Labels, times: int) -> Trained:
        """Train a new network as wide as a slice."""
        small, only = extract(self.standard, slice_, classes=labels), self.only(labels)
        small = judge.reinitialised(small, seed=self.seed)  # by its own widths, as a new network would be
        epochs = times * self.tuning(small, cost(small, self.task.example).macs, len(only.train))
        model = ts.finetune(small, only, replace(self.training, epochs=epochs)).model
        return model, epochs * len(only.train)

    def published(self, labels: Labels) -> Trained:
        """Make a module of MwT as published: a new layer on all logits, fine-tuned with everything else."""
        slice_ = union(self.gate_slices[name] for name in self.names(labels))
        small = extract(self.gated.neurons.on(self.gated.fold()), slice_)
        torch.manual_seed(self.seed)
        last = nn.Linear(len(self.task.classes), len(labels)).to(device_of(small))
        model = nn.Sequential(small, nn.ReLU(), last)
        epochs, rate = self.settings.published_epochs, self.settings.published_rate
        only, training = self.only(labels), replace(self.training, epochs=epochs, learning_rate=rate)
        return ts.finetune(model, only, training).model, epochs * len(only.train)

    def folded(self, labels: Labels) -> Trained:
        """Make a sub-model of the network with gates, its classes' mean gates in the weights."""
        means = {layer: values[list(labels)].mean(0) for layer, values in self.gate_statistics.mean.items()}
        slice_ = union(self.gate_slices[name] for name in self.names(labels))
        return self.untuned(self.gated.neurons.on(self.gated.fold(means)), slice_, labels)

    def module(self, neurons: Neurons, slices: Mapping[str, Slice], labels: Labels) -> Trained:
        """Join the modules of some classes as MODA does."""
        return extract(neurons, union(slices[name] for name in self.names(labels)), classes=labels), 0


def sub_tasks(classes: Sequence[str], size: int, most: int, *, seed: int) -> list[Labels]:
    """Return disjoint sets of `size` classes, at most `most`: random ones, or superclasses where these are as large.

    >>> sub_tasks("abcde", 2, 5, seed=0)
    [(0, 1), (3, 4)]
    """
    shuffled, natural = random.Random(seed), [names.split() for names in SUPERCLASSES.values()]
    groups = [sorted(map([*classes].index, names)) for names in natural if {*names} <= {*classes}]
    if not groups or size != len(groups[0]):
        order = shuffled.sample(range(len(classes)), len(classes))
        groups = [sorted(order[first : first + size]) for first in range(0, len(order) - size + 1, size)]
    return [tuple(group) for group in shuffled.sample(groups, min(most, len(groups)))]


BENCHMARK = Benchmark("reuse", SETTINGS, Reusing, partial(reuse_page.write_page, ARMS))
