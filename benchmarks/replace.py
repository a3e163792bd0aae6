"""Replacing and composing: a strong part for a weak class, and one classifier from parts of two data sets.

Weak networks are those of MODA (arXiv 2411.01074, section on replacement): underfitted, overfitted on a tenth of the
data, and, ours, with a damaged class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchslice as ts
from torchslice import judge
from torchslice.budget import fit_budget
from torchslice.data import Task, hold_out, joined, limit
from torchslice.data.images import channel_statistics
from torchslice.graph.neurons import Neurons
from torchslice.judge.calibrate import likeliest
from torchslice.maintain import Composition
from torchslice.models.composed import Composed
from torchslice.rankings import by_mean_score
from torchslice.reused import Reused
from torchslice.runs.recipe import make_model
from torchslice.training import Cost, cost

from .experiment import Benchmark, Cells, Network, Part, Scale, neurons_of
from .tables import Run, Runs, draw, figure, found, meanings, page, table

WEAK = {
    "underfitted": "trained for too few epochs",
    "overfitted": "trained on a tenth of the images, for long",
    "damaged": "trained without nine tenths of the images of the class",
}
ARMS = {
    "weak network": "as it was",
    "control: calibration alone": "the row of the class made anew from the weak network's own logits alone",
    "replaced": "`replace` by a part of the strong network: the neurons that contribute most to the class, tuned",
    "control: whole calibration layer": "the same part; all rows of the layer made anew, as published",
    "control: ensemble": "the mean of the probabilities of both whole networks",
    "control: retrained": "the weak architecture trained anew on all images, for long",
    "strong network": "that the parts come from",
}
COMPOSED = {
    "composed": "`compose` of both parts",
    "control: not calibrated": "the largest logit of both parts",
    "control: ensemble": "the most probable class of both whole networks",
    "control: one network": "one network trained on all classes, as long as both",
    "data set known": "each image answered by the part of its data set",
}
Answers = tuple[Tensor, Cost]  # test logits, and what it costs to make them
Make = Callable[[], Answers]
SCORES = (*judge.SCORES, "nearest features")


@dataclass(frozen=True)
class Weak(Network):
    """A weak architecture and how long it trains, and the strong network that its parts come from."""

    few_epochs: int = 2
    many_epochs: int = 40
    rate: float = 0.02
    strong: str = "fast"
    strong_width: float = 0.5
    strong_epochs: int = 4


@dataclass(frozen=True)
class Pair(Network):
    """Two data sets, a network for each, and how many classes of each are asked for; the others are none of them."""

    other_data: str = "fashion-mnist"
    other_model: str = "convnet"
    other_width: float = 0.5
    rate: float = 0.02
    asked: int = 8
    halves: int = 10  # classes of the first data set

    def load(self, data_dir: str | Path | None, seed: int) -> Task:
        """Load both data sets as one; if they are the same, it has both halves of the classes already."""
        first, second = (replace(self, data=name) for name in (self.data, self.other_data))
        task = Network.load(first, data_dir, seed)
        return task if first == second else joined(task, Network.load(second, data_dir, seed))


@dataclass(frozen=True)
class Settings(Scale):
    """One scale of the benchmark: how many classes are replaced, by parts of which fractions of the strong network."""

    classes: int = 5
    budgets: tuple[float, ...] = (0.1, 0.3)
    tuning_epochs: int = 1


CPU = (
    Weak("cifar10", "lenet", 1.0, epochs=12, train_images=15_000, validation_images=2_500),
    Pair("mnist", "lenet", 1.0, epochs=5, train_images=10_000, validation_images=2_500),
)
PAPER = (
    Weak("cifar10", "lenet", 1.0, epochs=60, few_epochs=4, strong_width=1.0, strong_epochs=12),
    Pair("mnist", "lenet", 1.0, epochs=20),
)
SMOKE = (
    Weak("digits", "lenet", 0.5, epochs=2, few_epochs=1, many_epochs=2, strong_width=0.5, strong_epochs=2),
    Pair("digits", "convnet", 0.5, epochs=2, other_data="digits", other_width=0.5, asked=4, halves=5),
)
SETTINGS = {
    "smoke": Settings(SMOKE, 1, 16, classes=1, budgets=(0.5,)),
    "cpu": Settings(CPU),
    "paper": Settings(PAPER, samples_per_class=256, classes=10, tuning_epochs=3),
}


@dataclass(frozen=True)
class Replacing(Part):
    """One seed of replacing, or of composing where the network is a pair."""

    def result(self) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {**asdict(self.settings), "networks": asdict(self.network), "seeds": self.seed}
        cells = Cells(self.folder / "cells.jsonl", settings)
        if isinstance(self.network, Pair):
            return {"replaced": [], "composed": list(self.composed(cells))}
        return {"replaced": list(self.replaced(cells)), "composed": []}

    def train(self, folder: str, name: str, width: float, task: Task, **options: Any) -> Neurons:
        """Train a network on a task, or read what was trained before."""
        if folder not in self.made:
            self.note(folder)
            model = make_model(name, task, {"width": width}, seed=self.seed)
            ts.fit(model, task, replace(self.training, **options), folder=self.folder / folder)
            self.made[folder] = neurons_of(model.eval(), task)
        return self.made[folder]

    @cached_property
    def made(self) -> dict[str, Neurons]:
        """The networks that were made, by name."""
        return {}

    @cached_property
    def seen(self) -> dict[nn.Module, Answers]:
        """What they were asked."""
        return {}

    # -- replacing ------------------------------------------------------------------------------------------------
    def replaced(self, cells: Cells) -> Iterator[dict[str, Any]]:
        """Score every arm for every weak network and class."""
        for name in self.task.classes[: self.settings.classes]:
            for kind in WEAK:
                for arm, budget, make in self.arms(kind, name):
                    key = {"weak": kind, "class": name, "arm": arm, "budget": budget}
                    yield {**key, **cells(key, partial(self.scored, make, name))}

    def arms(self, kind: str, name: str) -> Iterator[tuple[str, float | None, Make]]:
        """Yield each arm and what makes its test logits, and says what it costs."""
        weak = cache(partial(self.weak, kind, name))

        def replaced(budget: float) -> Answers:
            part = self.part(name, budget)
            return self.joined(ts.replace(weak(), {name: part}, self.task).model, weak(), part)

        def layer(budget: float) -> Answers:
            part = self.part(name, budget)
            return self.joined(self.layer(weak(), part), weak(), part)

        def alone() -> Answers:
            logits, _ = self.joined(ts.replace(weak(), {name: weak()}, self.task).model, weak())
            return logits, cost(weak().model, self.task.example)  # a layer more costs next to nothing

        yield "weak network", None, lambda: self.asked(weak())
        yield "control: calibration alone", None, alone
        for budget in self.settings.budgets:
            yield "replaced", budget, partial(replaced, budget)
            yield "control: whole calibration layer", budget, partial(layer, budget)
        yield "control: ensemble", None, lambda: self.ensemble(weak(), self.strong)
        yield "control: retrained", None, lambda: self.asked(self.retrained)
        yield "strong network", None, lambda: self.asked(self.strong)

    def weak(self, kind: str, name: str) -> Neurons:
        """Train a weak network."""
        network, task, epochs, folder = self.network, self.task, self.network.few_epochs, kind
        if kind == "overfitted":
            task, epochs = task.limit(train=len(task.train) // 10, seed=self.seed), network.many_epochs
        if kind == "damaged":
            own = task.train.labels == task.class_indices([name])[0]
            left, _ = hold_out(task.train.take(own), 0.9, seed=self.seed)
            task, epochs = replace(task, train=task.train.take(~own).join(left)), max(1, network.epochs // 3)
            folder = f"{kind}-{name}"
        return self.train(folder, network.model, network.width, task, epochs=epochs, learning_rate=network.rate)

    @cached_property
    def retrained(self) -> Neurons:
        return self.train(
            "retrained", self.network.model, self.network.width, self.task, learning_rate=self.network.rate
        )

    @cached_property
    def strong(self) -> Neurons:
        network = self.network
        return self.train("strong", network.strong, network.strong_width, self.task, epochs=network.strong_epochs)

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        return self.contributions(self.strong, self.task, metric="taylor")["taylor"]

    def part(self, name: str, budget: float) -> Neurons:
        """Cut the neurons that contribute most to a class out of the strong network, and tune them."""
        path = self.folder / f"part-{name}-{budget:g}.safetensors"
        if not path.is_file():
            self.note(path.stem)
            label = self.task.classes.index(name)
            ranking = by_mean_score({layer: of[label : label + 1] for layer, of in self.scores.items()})
            small = ts.extract(self.strong, fit_budget(self.strong, ranking, mac_retention=budget))
            training = replace(self.training, epochs=self.settings.tuning_epochs)
            recalibrated = judge.recalibrate(small, self.task, samples=2000, seed=self.seed)
            ts.save(ts.finetune(recalibrated, self.task, training).model, path)
        if path.stem not in self.made:
            self.made[path.stem] = neurons_of(ts.load(path).model, self.task)
        return self.made[path.stem]

    def asked(self, neurons: Neurons) -> Answers:
        """Return what a network answers to the test images, and what it costs; it is asked once."""
        if neurons.model not in self.seen:
            self.seen[neurons.model] = judge.predict(neurons.model, self.task), cost(neurons.model, self.task.example)
        return self.seen[neurons.model]

    def joined(self, model: Any, *networks: Neurons) -> Answers:
        """Return what a composed network makes of the answers of its networks, and what it costs."""
        logits = [self.asked(neurons)[0] for neurons in networks]
        return model.calibration(torch.cat(logits, dim=1)).detach(), cost(model, self.task.example)

    def layer(self, weak: Neurons, part: Neurons) -> nn.Module:
        """Make all rows of the layer on both networks' logits anew."""
        networks, labels, count = [weak.model, part.model], self.task.validation.labels, len(self.task.classes)
        logits = judge.predict(Composed(networks, nn.Identity()), self.task, "validation")

        def rows(values: Tensor) -> tuple[Tensor, Tensor]:
            found = values.view(count, -1)
            return found[:, :-1], found[:, -1]

        start = torch.eye(count, logits.shape[1] + 1).flatten()
        return Composed(networks, likeliest(rows, start, logits, labels))

    def ensemble(self, *networks: Neurons) -> Answers:
        """Return the logarithm of the mean probabilities of several networks."""
        logits, costs = zip(*map(self.asked, networks), strict=True)
        both = torch.stack([of.softmax(1) for of in logits]).mean(0).log()
        return both, Cost(sum(of.parameters for of in costs), sum(of.macs for of in costs))

    def scored(self, make: Make, name: str) -> dict[str, Any]:
        """Score an arm on the class and on the others."""
        (logits, needs), labels = make(), self.task.test.labels
        own = labels == self.task.class_indices([name])[0]
        parts = {"own": own, "others": ~own, "all": own | True}
        scores = {part: judge.accuracy_of(logits[rows], labels[rows]).overall for part, rows in parts.items()}
        return {**scores, **asdict(needs)}

    # -- composing ------------------------------------------------------------------------------------------------
    def composed(self, cells: Cells) -> Iterator[dict[str, Any]]:
        """Score every arm on the test images of all classes, and how well it tells those of none of them."""
        for arm in COMPOSED:
            yield {"arm": arm, **cells({"arm": arm}, partial(self.composed_by, arm))}

    @cached_property
    def sides(self) -> list[Task]:
        """The classes asked for, of each data set, prepared as this data set is."""
        network, names = self.network, self.task.classes
        halves = [names[: network.halves], names[network.halves :]]
        first, second = (self.task.restrict(half[: network.asked]) for half in halves)
        images: Any = second.train
        return [first, second.like(dict(zip(("mean", "std"), channel_statistics(images.images), strict=True)))]

    @cached_property
    def asked_for(self) -> Task:
        return self.task.restrict([name for side in self.sides for name in side.classes])

    @cached_property
    def outside(self) -> Task:
        """The other classes, which no network has seen."""
        return self.task.restrict([name for name in self.task.classes if name not in self.asked_for.classes])

    @cached_property
    def parents(self) -> list[Neurons]:
        first, second, network = *self.sides, self.network
        return [
            self.train("first parent", network.model, network.width, first, learning_rate=network.rate),
            self.train("second parent", network.other_model, network.other_width, second),
        ]

    @cached_property
    def parts(self) -> list[Reused]:
        """What a budget of 60 % of the multiply-accumulates leaves of each parent, tuned."""
        made = []
        for parent, side in zip(self.parents, self.sides, strict=True):
            rate = self.network.rate / 2
            training = replace(self.training, epochs=self.settings.tuning_epochs, learning_rate=rate)
            options: dict[str, Any] = {"training": training, "seed": self.seed, "progress": self.progress}
            made.append(ts.reuse(parent, side, classes=side.classes, mac_retention=0.6, **options))
        return made

    @cached_property
    def composition(self) -> Composition:
        return ts.compose(self.parts, self.asked_for, renormalise=True)

    def composed_by(self, arm: str) -> dict[str, Any]:
        """Score one arm: accuracy, cost, and by every score how well it tells the classes from images of none."""
        task, composed = self.asked_for, self.composition.model
        networks: list[Any] = [*composed.networks.children()]  # type: ignore[union-attr]
        costs = [cost(network, task.example) for network in networks]
        if arm == "control: ensemble":
            wholes = [parent.model for parent in self.parents]
            costs = [cost(whole, task.example) for whole in wholes]
            answers = [self.probabilities(wholes, of) for of in (task, self.outside)]
        else:
            model: nn.Module = Composed(networks, nn.Identity())
            if arm == "composed":
                model = composed
            if arm == "control: one network":
                network = self.network
                model = self.train("one network", network.other_model, network.other_width, task).model
                costs = [cost(model, task.example)]
            answers = [judge.predict(model, of) for of in (task, self.outside)]
        logits, labels, border = answers[0], task.test.labels, len(self.sides[0].classes)
        if arm == "data set known":
            logits = logits.clone()
            logits[labels < border, border:] = logits[labels >= border, :border] = -torch.inf
        found = {name: [score(of) for of in answers] for name, score in judge.SCORES.items()}
        if arm == "composed":
            known = replace(task, test=limit(task.train, 5_000, seed=self.seed))
            inside, outside, near = (self.features(of) for of in (task, self.outside, known))
            found["nearest features"] = [judge.nearest(inside, near), judge.nearest(outside, near)]
        row: dict[str, Any] = {"accuracy": judge.accuracy_of(logits, labels).overall}
        row |= {"parameters": sum(of.parameters for of in costs), "macs": sum(of.macs for of in costs)}
        if arm != "data set known":
            row |= {f"auroc, {name}": judge.auroc(*pair) for name, pair in found.items()}
            row |= {f"fpr, {name}": judge.false_positive_rate(*pair) for name, pair in found.items()}
        return row

    def probabilities(self, networks: list[nn.Module], task: Task) -> Tensor:
        """Return the logarithms of the probabilities of several networks, side by side."""
        pairs = zip(networks, self.sides, strict=True)
        sides = [judge.predict(network, task.like(side.preprocessing)) for network, side in pairs]
        return torch.cat([logits.log_softmax(1) for logits in sides], dim=1)

    def features(self, task: Task) -> Tensor:
        """Return the features of all parts, side by side, each of length 1."""
        wanted = [(part.model, task.like(part.preprocessing)) for part in self.parts]
        parts = [judge.features(ts.find_neurons(model, of.example), of) for model, of in wanted]
        return torch.cat([F.normalize(of, dim=1) for of in parts], dim=1)


# -- the page -----------------------------------------------------------------------------------------------------
def with_changes(run: Run) -> Run:
    """Return a run whose rows also say what an arm changes to the weak network of its class, and its share of MACs."""
    rows = []
    for row in run.get("replaced", ()):
        (weak,) = found(run["replaced"], weak=row["weak"], **{"class": row["class"]}, arm="weak network")
        changes = {f"{part}_change": row[part] - weak[part] for part in ("own", "others", "all")}
        rows.append({**row, **changes, "times": row["macs"] / weak["macs"]})
    return {**run, "replaced": rows}


def write_page(result: dict[str, Any], path: Path) -> str:
    """Write a table per kind of weak network, and one of what was composed."""
    settings, runs = result["manifest"]["settings"], list(map(with_changes, result["runs"]))
    text = (
        f"A weak network's part for a class is replaced by one of a strong network, for {settings['classes']} classes "
        "in turn; and parts of two data sets are composed. Calibration, epochs and thresholds are chosen on validation "
        "images. Test accuracy in percent; changes are points against the weak network, first the mean over the "
        "classes, then mean ± standard deviation over the seeds. MACs are multiples of those of the weak network."
    )
    panels = {
        kind: {
            arm: [points(run, kind, arm) for run in runs if run["replaced"]] for arm in ARMS if arm != "weak network"
        }
        for kind in WEAK
    }
    title = "Accuracy on the replaced class; mean ± deviation over the seeds"
    x = "multiply-accumulates, of the weak network"
    picture = draw(path.with_suffix(".png"), panels, x=x, y="points gained", title=title, log_x=True)
    return page("Replacing and composing", {**result, "runs": runs}, text=[text], section=section, picture=picture)


def points(run: Run, kind: str, arm: str) -> list[tuple[float, float]]:
    """Return what an arm gains on the class, and its MACs, for every size of the part; means over the classes."""
    rows = found(run["replaced"], weak=kind, arm=arm)
    of_budget = [found(rows, budget=budget) for budget in dict.fromkeys(row["budget"] for row in rows)]
    return [(fmean(row["times"] for row in own), 100 * fmean(row["own_change"] for row in own)) for own in of_budget]


CHANGES = {
    "class": figure("replaced", "own"),
    "change": figure("replaced", "own_change"),
    "others": figure("replaced", "others"),
    "their change": figure("replaced", "others_change", digits=2),
    "all": figure("replaced", "all"),
    "MACs": figure("replaced", "times", percent=False),
}
ANSWERS = {
    "accuracy": figure("composed", "accuracy"),
    "MACs, millions": figure("composed", "macs", percent=False, unit=1e6),
    **{f"AUROC, {name}": figure("composed", f"auroc, {name}") for name in SCORES},
    **{f"false positives, {name}": figure("composed", f"fpr, {name}") for name in SCORES},
}


def section(runs: Runs, network: Run) -> list[str]:
    """Write the tables of one network, or of one pair."""
    if not runs[0]["replaced"]:
        about = (
            f"{network['model']} for {network['asked']} classes of {network['data']}, {network['other_model']} for as "
            f"many of {network['other_data']}, {network['epochs']} epochs; each is cut to 60 % of its "
            "multiply-accumulates and tuned briefly. Images of the other classes, which no network has seen, are none "
            "of the classes: how often a score tells them from test images of the classes (AUROC), and how many it "
            "lets pass with 95 % of those."
        )
        return [
            about,
            meanings(COMPOSED),
            table(runs, [(arm, {"arm": arm}) for arm in COMPOSED], ANSWERS, corner="arm"),
        ]
    names = dict.fromkeys(row["class"] for row in runs[0]["replaced"])
    blocks = [
        f"Weak: {network['model']}; strong: {network['strong']}, width {network['strong_width']:g}, "
        f"{network['strong_epochs']} epochs. The class is in turn: {', '.join(names)}.",
        meanings(ARMS),
    ]
    for kind, meaning in WEAK.items():
        budgets = {
            arm: dict.fromkeys(row["budget"] for row in found(runs[0]["replaced"], weak=kind, arm=arm)) for arm in ARMS
        }
        rows = [
            (named(arm, b), {"arm": arm, "budget": b, "weak": kind}) for arm, known in budgets.items() for b in known
        ]
        blocks += [f"### {kind}: {meaning}", table(runs, rows, CHANGES, corner="arm")]
    return blocks


def named(arm: str, budget: float | None) -> str:
    """Name an arm, with the size of its part."""
    return arm if budget is None else f"{arm}, {budget:.0%} of the strong network"


BENCHMARK = Benchmark("replace", SETTINGS, Replacing, write_page)
