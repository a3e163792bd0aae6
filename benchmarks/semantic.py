"""Do semantic groups mean something? Their families of classes and of neurons beside superclasses nobody told them.

Every way to say how far classes are from each other gives a tree, cut into as many families as there are superclasses.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, roc_auc_score
from torch import Tensor, nn

import torchslice as ts
from torchslice import TorchsliceError, judge
from torchslice.data import Task
from torchslice.find.semantic import METRICS, Contributions, groups
from torchslice.find.semantic.groups import distances, families, profiles, tree
from torchslice.graph.neurons import Neurons

from .experiment import Benchmark, Network, Part, Scale, neurons_of
from .superclasses import SUPERCLASSES
from .tables import Cell, Run, Runs, about_training, draw, figure, found, mean, page, table
from .text import TINY, Tuned, minilm

CHANCES = 20  # random partitions of the same sizes
LARGEST = 10  # classes of a group whose pairs are looked at
ALL = "all layers"
KNOWN: dict[str, Mapping[str, str]] = {
    "cifar100": SUPERCLASSES,
    "cifar10": {"animals": "bird cat deer dog frog horse", "vehicles": "airplane automobile ship truck"},
    "digits": {"with a loop": "0 4 6 8 9", "without": "1 2 3 5 7"},
    "made-up": {"nature": "animals weather", "colours": "colours"},
}  # of TREC they stand before the colon
CONFUSION, HEAD, MEANS = "confusion", "rows of the last layer", "mean activations before the last layer"
KMEANS, CHANCE = "k-means of the neurons' profiles", "control: chance"
RIVALS = {
    CONFUSION: "1 - mean probability given to the other class, on validation samples (of classes that have none, "
    "training samples), symmetric and scaled",
    HEAD: "1 - cosine of the classes' weights, their mean taken off",
    MEANS: "1 - cosine of the classes' mean activations in the last sliced layer, their mean taken off",
    KMEANS: "as many clusters of neurons as superclasses (taylor); a class goes to the one that serves it best",
    CHANCE: f"random families as large as ours, mean of {CHANCES}",
}


@dataclass(frozen=True)
class Settings(Scale):
    """One scale of the benchmark."""

    metrics: tuple[str, ...] = tuple(METRICS.names())


@dataclass(frozen=True)
class Questions(Tuned):
    """A sentence encoder whose weights are a package that may be missing."""

    @property
    def absent(self) -> str:
        """Why it cannot be measured, if it cannot."""
        try:
            minilm()
        except TorchsliceError as error:
            return str(error)
        return ""


TREC = Questions("trec-fine", "all-MiniLM-L6-v2", 1.0, epochs=4)
CPU = (Network("cifar100", "fast", 1.0, epochs=12), Network("cifar10", "fast", 1.0, epochs=12), TREC)
SETTINGS = {
    "smoke": Settings((Network("digits", "convnet", 0.25, epochs=2), TINY), 1, samples_per_class=16),
    "cpu": Settings(CPU, learning_rate=0.15),
    "paper": Settings(tuple(Network("cifar100", name, 1.0, epochs=160) for name in ("resnet18", "vgg16"))),
}


@dataclass(frozen=True)
class Meaning(Part):
    """One trained network: how well families agree with the superclasses, by metric and layer, and those of rivals."""

    def result(self) -> dict[str, Any]:
        neurons = neurons_of(self.trained(self.task, folder=self.folder), self.task)
        refused = {"deeplift"} if isinstance(self.network, Tuned) else set[str]()
        metrics = [metric for metric in self.settings.metrics if metric not in refused]
        scores = self.contributions(neurons, self.task, metric=metrics)
        self.note("groups and rivals")
        of = {metric: profiles(scores.tied(neurons)[metric]) for metric in scores.metrics}
        ways = [{"way": w, "layer": layer, **self.agreement(d, p)} for w, layer, d, p in self.ways(neurons, scores, of)]
        ways += [{"way": w, "layer": ALL, **row} for w, row in self.without_distances(of["taylor"]).items()]
        accuracy = judge.accuracy_of(judge.predict(neurons.model, self.task), self.task.test.labels).overall
        groups_of = [{"metric": m, **self.groups(neurons, scores, m)} for m in scores.metrics]
        return {"accuracy": accuracy, "neurons": len(neurons), "ways": ways, "groups": groups_of}

    def trained(self, task: Task, *, folder: Path | None = None) -> nn.Module:
        if not isinstance(self.network, Tuned):
            return super().trained(task, folder=folder)
        torch.manual_seed(self.seed)
        model = self.network.create(task)
        ts.fit(model, task, self.network.training(self.training, self.network.learning_rate), folder=folder)
        return model

    @property
    def superclasses(self) -> list[int]:
        """The number of the superclass of every class."""
        kinds = {name: kind for kind, names in KNOWN.get(self.network.data, {}).items() for name in names.split()}
        of = [kinds.get(name, name.partition(":")[0]) for name in self.task.classes]
        return [sorted({*of}).index(kind) for kind in of]

    def ways(
        self, neurons: Neurons, scores: Contributions, of: Mapping[str, Mapping[str, Tensor]]
    ) -> Iterator[tuple[str, str, Tensor, Mapping[str, Tensor]]]:
        """Yield ways, layers, distances [C, C], and the profiles of the neurons that are looked at."""
        for metric, layers in of.items():
            yield metric, ALL, distances(layers), layers
            for layer, rows in layers.items():
                yield metric, layer, distances({layer: rows}), {layer: rows}
        every = of["taylor"]
        train, seen = self.task.train, self.task.validation
        seen = seen.join(train.take(~torch.isin(train.labels, seen.labels)))
        logits, labels = judge.predict(neurons.model, replace(self.task, validation=seen), "validation"), seen.labels
        probabilities = logits.softmax(1).double()
        mixed = torch.stack([probabilities[labels == c].mean(0) for c in range(len(self.task.classes))])
        scaled = mixed / mixed.diagonal().clamp(min=1e-12)[:, None]
        yield CONFUSION, ALL, (1 - (scaled + scaled.T) / 2).clamp(min=0).fill_diagonal_(0), every
        yield HEAD, ALL, apart(neurons.model.get_parameter(f"{neurons.head[-1]}.weight").detach().cpu()), every
        yield MEANS, ALL, apart([*scores["avg"].values()][-1]), every

    def agreement(self, distance: Tensor, of: Mapping[str, Tensor]) -> dict[str, float]:
        """Compare the families that a distance gives with the superclasses."""
        truth = torch.tensor(self.superclasses)
        count, pairs = len(set(self.superclasses)), torch.triu(torch.ones_like(distance), 1).bool()
        same = (truth[:, None] == truth)[pairs]
        return {
            **self.rand(numbers(families(tree(distance), count)), of),
            "auc": float(roc_auc_score(same, -distance[pairs])),
        }

    def rand(self, labels: Sequence[int], of: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the adjusted Rand index of classes, and of neurons by the family that each serves best."""
        rows = torch.cat([*of.values()])
        rows = rows[rows.any(1)]
        best = [(rows @ shares(way)).argmax(1).tolist() for way in (self.superclasses, labels)]
        classes = float(adjusted_rand_score(self.superclasses, labels))
        return {"classes": classes, "neurons": float(adjusted_rand_score(*best))}

    def without_distances(self, of: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
        """Return the agreement of families that come from no distance of classes."""
        rows, count = torch.cat([*of.values()]), len(set(self.superclasses))
        rows = rows[rows.any(1)]
        clusters = torch.from_numpy(KMeans(count, n_init=10, random_state=self.seed).fit_predict(rows.numpy()))
        centres = torch.stack([rows[clusters == k].mean(0) for k in range(count)])  # [k, C]
        ours = numbers(families(tree(distances(of)), count))
        drawn = [random.Random(self.seed + k).sample(ours, len(ours)) for k in range(CHANCES)]
        chances = [self.rand(labels, of) for labels in drawn]
        chance = {key: fmean(row[key] for row in chances) for key in chances[0]}
        return {KMEANS: self.rand(centres.argmax(0).tolist(), of), CHANCE: {**chance, "auc": 0.5}}

    def groups(self, neurons: Neurons, scores: Contributions, metric: str) -> dict[str, float]:
        """Return how many neurons serve one class, some and all, and how many pairs in small groups are of one kind."""
        made, kind = (
            groups(neurons, scores, metric=metric),
            dict(zip(self.task.classes, self.superclasses, strict=True)),
        )
        most = min(LARGEST, len(kind) - 1)
        small = [group for group in made if 1 < len(group.classes) <= most]
        alike = 0.0
        for group in small:
            kinds = [kind[name] for name in group.classes]
            pairs = [a == b for i, a in enumerate(kinds) for b in kinds[:i]]
            alike += len(group.slice) * sum(pairs) / len(pairs)
        one = sum(len(group.slice) for group in made if len(group.classes) == 1)
        few, total = sum(len(group.slice) for group in small), made.unused.total
        counts = [self.superclasses.count(k) for k in set(self.superclasses)]
        chance = sum(n * (n - 1) for n in counts) / (len(kind) * (len(kind) - 1))
        shares_of = {"one": one / total, "few": few / total, "all": len(made.shared) / total}
        return {**shares_of, "alike": alike / max(few, 1), "chance": chance}


def apart(rows: Tensor) -> Tensor:
    """Return 1 - cosine of rows [C, ...] whose mean is taken off, float64 [C, C]."""
    rows = torch.nn.functional.normalize(rows.double() - rows.double().mean(0), dim=1)
    return (1 - rows @ rows.T).clamp(min=0).fill_diagonal_(0)


def numbers(members: Sequence[Sequence[int]]) -> list[int]:
    """Return the number of the family of every class.

    >>> numbers([[0, 2], [1]])
    [0, 1, 0]
    """
    of = {label: number for number, family in enumerate(members) for label in family}
    return [of[label] for label in range(len(of))]


def shares(labels: Sequence[int]) -> Tensor:
    """Return what takes the mean of a profile over every family, 0 for one without a class: float64 [C, families].

    >>> shares([0, 1, 0]).tolist()
    [[0.5, 0.0], [0.0, 1.0], [0.5, 0.0]]
    """
    member = torch.nn.functional.one_hot(torch.tensor(labels)).double()
    return member / member.sum(0).clamp(min=1)


# -- the page -----------------------------------------------------------------------------------------------------
FIGURES = {
    "classes": figure("ways", "classes", percent=False, digits=3),
    "neurons": figure("ways", "neurons", percent=False, digits=3),
    "area under the curve": figure("ways", "auc", percent=False, digits=3),
}


def write_page(result: dict[str, Any], path: Path) -> str:
    """Write the page and draw where in a network meaning sits."""
    runs = result["runs"]
    panels: dict[str, dict[str, list[list[tuple[float, float]]]]] = {}
    for run in runs:
        metrics = [row["metric"] for row in run["groups"]]
        panel = panels.setdefault(f"{run['model']} on {run['data']}", {})
        for way in (*metrics, CHANCE):
            rows = [row for row in run["ways"] if row["way"] == way and (row["layer"] != ALL or way == CHANCE)]
            last = len([row for row in run["ways"] if row["way"] == metrics[0]]) - 1
            at = range(1, last + 1) if way != CHANCE else (1, last)
            values = [row["auc"] for row in rows] if way != CHANCE else [0.5, 0.5]
            panel.setdefault(way, []).append(list(zip(map(float, at), values, strict=True)))
    picture = draw(
        *(path.with_suffix(".png"), panels),
        x="layer",
        y="area under the curve",
        title="Where classes of one superclass are closest",
    )
    return page(
        "Do semantic groups mean something?",
        result,
        answer=answer(runs),
        text=TEXT,
        section=section,
        arms=RIVALS,
        picture=picture,
    )


TEXT = (
    "The superclasses come with the data and are used for nothing but this test (`animals` and `vehicles` of CIFAR-10 "
    "are ours). Of a transformer, neurons are heads and hidden units, and DeepLIFT is refused. *Classes* is the "
    "adjusted Rand index (1 is agreement, 0 is chance) of as many families of classes as there are superclasses. "
    "*Neurons* is that of the neurons, each with the family, or superclass, to which it contributes most on average. "
    "*Area under the curve*: how often two classes of one superclass are closer to each other than two of different "
    "ones; it needs no cut. All trees are by average linkage.",
)


def answer(runs: Runs) -> str:
    """Return the first line of the page."""
    lines = []
    for name in dict.fromkeys(run["data"] for run in runs):
        own = [run for run in runs if run["data"] == name]

        def of(way: str, key: str = "classes", own: Runs = own) -> float:
            rows = [found(run["ways"], way=way, layer=ALL)[0][key] for run in own]
            return mean(rows) or 0.0

        rivals = {way: of(way) for way in (CONFUSION, HEAD, MEANS, KMEANS)}
        best = max(rivals, key=lambda way: rivals[way])
        lines.append(
            f"On {name} the families of the neurons (taylor, all layers) agree with the superclasses by "
            f"{of('taylor'):.2f}, the best rival ({best}) by {rivals[best]:.2f}, chance by {of(CHANCE):.2f}."
        )
    return " ".join(lines)


def section(runs: Runs, network: Mapping[str, Any]) -> Sequence[str]:
    """Return the tables of one network."""
    metrics = [row["metric"] for row in runs[0]["groups"]]
    ways = [(metric, {"way": metric, "layer": ALL}) for metric in metrics]
    ways += [(way, {"way": way, "layer": ALL}) for way in RIVALS]
    layers = list(dict.fromkeys(row["layer"] for row in runs[0]["ways"] if row["layer"] != ALL))
    cells: dict[str, Cell] = {m: figure("ways", "auc", percent=False, digits=3, way=m) for m in metrics}
    names = {
        "one class": "one",
        f"2 to {LARGEST}": "few",
        "all": "all",
        "pairs of one kind": "alike",
        "by chance": "chance",
    }
    accuracy = figure("", "accuracy")(runs, {})
    rows: list[tuple[str, Run]] = [(layer, {"layer": layer}) for layer in layers]
    return (
        f"{about_training(network)}; test accuracy {accuracy} %, {runs[0]['neurons']} neurons.",
        table(runs, ways, FIGURES, corner="families by"),
        "Area under the curve of the families that one layer gives:",
        table(runs, rows, cells, corner="layer"),
        f"Neurons in percent by the number of classes that they serve, and of the pairs in groups of 2 to {LARGEST} "
        "classes, by neurons, how many are of one superclass:",
        table(
            runs,
            [(metric, {"metric": metric}) for metric in metrics],
            {heading: figure("groups", key) for heading, key in names.items()},
            corner="groups by",
        ),
    )


BENCHMARK = Benchmark("semantic", SETTINGS, Meaning, write_page)
