"""Another look at Avg and Var (NeuSemSlice, arXiv 2407.20281): is it the metrics, or how activations are read?

Networks are held to the first neurons of every layer by readings of their activations, without any training after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchslice import Slice, accuracy, extract, judge
from torchslice.find.semantic.contributions import by_position
from torchslice.find.semantic.selection import top_fraction
from torchslice.graph.activations import find_activations, reading
from torchslice.graph.functions import ACTIVATIONS
from torchslice.graph.neurons import Neurons
from torchslice.inputs import device_of

from .experiment import Benchmark, Network, Part, Scale, neurons_of
from .tables import Runs, about_training, draw, figure, found, mean, page, table

TAYLOR, RANDOM = "taylor", "control: random"
PLACES = {"after": "after the activation function", "before": "before it, after the norm"}
READINGS: dict[str, Callable[[Tensor], Tensor]] = {  # activations [B, N, P] -> [B, N]
    "mean": lambda a: a.mean(2),
    "size": lambda a: a.abs().mean(2),
    "largest": lambda a: a.abs().amax(2),
}
MEANINGS = {
    "mean": "the mean over the positions (as the metrics are defined)",
    "size": "the mean of the sizes over the positions",
    "largest": "the largest size at any position",
    "x weights": "the score times the norm of the weights that read the neuron in the next layer",
}


@dataclass(frozen=True)
class Settings(Scale):
    """One scale: which fractions of every layer are kept, and how many images are scored (None is all)."""

    kept: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5)
    scored_validation_images: int | None = None
    scored_test_images: int | None = None


CPU = (
    Network("cifar10", "fast", 1.0, epochs=12),
    Network("fashion-mnist", "convnet", 0.5, epochs=4, train_images=20_000),
)
SETTINGS = {
    "smoke": Settings((Network("digits", "convnet", 0.25, epochs=2),), 1, samples_per_class=16, kept=(0.8, 0.5)),
    "cpu": Settings(CPU, learning_rate=0.15, scored_validation_images=1_000, scored_test_images=2_000),
    "paper": Settings((Network("cifar10", "vgg16", 1.0, epochs=160),)),
}


class Sums:
    """Sums of a reading over the samples of a class, of its size and of its square, {layer: float64 [C, N]}."""

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, dtype=torch.float64)
        self.totals: dict[tuple[str, str], Any] = {}

    def add(self, layer: str, member: Tensor, value: Tensor) -> None:
        """Add the values [B, N] of samples that are members [C, B] of classes."""
        for kind, part in (("size", value.abs()), ("value", value), ("square", value**2)):
            self.totals[kind, layer] = self.totals.get((kind, layer), 0) + member @ part
        if layer == next(iter(self.totals))[1]:
            self.counts += member.sum(1)

    def means(self, kind: str) -> dict[str, Tensor]:
        """Return the means over the samples of every class."""
        return {layer: total / self.counts[:, None] for (of, layer), total in self.totals.items() if of == kind}


@dataclass(frozen=True)
class Read(Part):
    """One trained network: accuracy of what is left by every reading."""

    def result(self) -> dict[str, Any]:
        neurons = neurons_of(self.trained(self.task, folder=self.folder), self.task)
        counts = {"validation": self.settings.scored_validation_images, "test": self.settings.scored_test_images}
        scored = self.task.limit(**counts, seed=self.settings.seed)
        whole = {split: accuracy(neurons.model, scored, split).overall for split in ("validation", "test")}
        taylor = self.contributions(neurons, self.task)["taylor"]
        scores = {TAYLOR: {layer: of.mean(0) for layer, of in taylor.items()}, **dict(self.scores(neurons))}
        rows = []
        for kept in self.settings.kept:
            arms = {name: Slice({n: top_fraction(of, kept) for n, of in by.items()}) for name, by in scores.items()}
            arms[RANDOM] = judge.random_like(arms["taylor"], seed=self.seed)
            for name, slice_ in arms.items():
                small = extract(neurons, slice_)
                shares = {split: accuracy(small, scored, split).overall / of for split, of in whole.items()}
                rows.append({"arm": name, "kept": kept, **shares})
            self.note(f"{kept:.0%} kept")
        return {"accuracy": whole["test"], "rows": rows}

    def scores(self, neurons: Neurons) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield names of readings and what they say of every neuron, mean over the classes."""
        outgoing = weights_that_read(neurons)
        for place in PLACES:
            sums = self.sums(neurons, place)
            for name, of in sums.items():
                average = {layer: size.mean(0) for layer, size in of.means("size").items()}
                squares, values = of.means("square"), of.means("value")
                variance = {n: (squares[n] - values[n] ** 2).clamp(min=0).mean(0) for n in values}
                for metric, by in (("avg", average), ("var", variance)):
                    yield f"{metric}, {place}, {name}", by
                    power = 1 if metric == "avg" else 2
                    yield f"{metric}, {place}, {name}, x weights", {n: s * outgoing[n] ** power for n, s in by.items()}

    @torch.no_grad()
    def sums(self, neurons: Neurons, place: str) -> dict[str, Sums]:
        """Return the sums of every reading."""
        where, task = find_activations(neurons), self.task
        if place == "before":
            chains = {n: chain[:-1] if chain[-1] in ACTIVATIONS else chain for n, chain in where.chains.items()}
            where = replace(where, chains=chains, copied=frozenset(chains))  # some activations overwrite what they read
        labels, classes = task.train.labels, len(task.classes)
        rows = torch.cat([(labels == c).nonzero().flatten()[: self.settings.samples_per_class] for c in range(classes)])
        batches, found = rows.split(64), {name: Sums(classes) for name in READINGS}
        read = task.train.read(batches, device=device_of(neurons.model))
        for batch, inputs in zip(batches, read, strict=True):
            member = torch.nn.functional.one_hot(labels[batch], classes).double().T  # [C, B]
            with reading(neurons.model.eval(), where) as seen:
                neurons.logits(inputs)
            for layer, uses in seen.values.items():
                activations = by_position(uses, layer, where, len(batch)).double()
                for name, sums in found.items():
                    sums.add(layer, member, READINGS[name](activations))
        return found


def weights_that_read(neurons: Neurons) -> dict[str, Tensor]:
    """Return the norm of the weights that read every neuron, of networks whose layers are one chain: {layer: [N]}."""
    names = [*neurons.layers, *neurons.head]
    found = {}
    for layer, following in pairwise(names):
        weight = neurons.model.get_parameter(f"{following}.weight").detach().double()
        found[layer] = weight.movedim(1, 0).reshape(neurons.layers[layer].count, -1).norm(dim=1)
    return found


# -- the page -----------------------------------------------------------------------------------------------------
def write_page(result: dict[str, Any], path: Path) -> str:
    """Write the page and its picture."""
    runs = result["runs"]
    shown = ["taylor", "avg, after, mean", "var, after, mean", best_of(runs, "avg"), best_of(runs, "var"), RANDOM]
    panels: dict[str, dict[str, Any]] = {}
    for run in runs:
        panel = panels.setdefault(f"{run['model']} on {run['data']}", {})
        for arm in dict.fromkeys(shown):
            rows = [(100 * (1 - row["kept"]), 100 * row["test"]) for row in found(run["rows"], arm=arm)]
            panel.setdefault(arm, []).append([(0.0, 100.0), *rows])
    title = "Accuracy of what is left, in percent of the whole network"
    picture = draw(
        path.with_suffix(".png"), panels, x="neurons removed from every layer (%)", y="accuracy (%)", title=title
    )
    return page(
        "Avg and Var: the metrics, or how we read them?",
        result,
        text=(answer(runs), TEXT),
        section=section,
        arms=MEANINGS,
        picture=picture,
    )


TEXT = (
    "Every layer keeps the same fraction of its neurons, the first by the score, mean over the classes; random slices "
    "are as wide. Figures are test accuracies as a fraction of the whole network's, as cut. *Mean* is over the "
    "fractions that are kept; the best reading is the one with the highest mean on validation images. *After* and "
    "*before* are the place of the activation function. Ens is the mean of Avg and Var, both scaled, so it has no "
    "reading of its own."
)


def mean_of(runs: Runs, arm: str, split: str = "test") -> float:
    """Return the mean accuracy of an arm over runs and what is kept."""
    return mean(row[split] for run in runs for row in found(run["rows"], arm=arm)) or 0.0


def best_of(runs: Runs, metric: str) -> str:
    """Return the reading of a metric that keeps most accuracy on validation images."""
    arms = dict.fromkeys(row["arm"] for run in runs for row in run["rows"] if row["arm"].startswith(metric))
    return max(arms, key=lambda arm: mean_of(runs, arm, "validation"))


def answer(runs: Runs) -> str:
    """Return the first line of the page."""
    texts = []
    for metric in ("avg", "var"):
        best = best_of(runs, metric)
        plain, read = (100 * mean_of(runs, arm) for arm in (f"{metric}, after, mean", best))
        texts.append(f"{metric} as defined keeps {plain:.1f} %, its best reading ({best}) {read:.1f} %")
    taylor, chance = (100 * mean_of(runs, arm) for arm in (TAYLOR, RANDOM))
    return f"{'; '.join(texts)}; taylor keeps {taylor:.1f} %, random slices {chance:.1f} %."


def section(runs: Runs, network: Mapping[str, Any]) -> list[str]:
    """Return the table of one network."""
    arms = dict.fromkeys(row["arm"] for row in runs[0]["rows"])
    order = sorted(arms, key=lambda arm: -mean_of(runs, arm))
    fractions = dict.fromkeys(row["kept"] for row in runs[0]["rows"])
    cells = {
        "mean": figure("rows", "test"),
        **{f"{k:.0%} kept": figure("rows", "test", kept=k) for k in fractions},
    }
    whole = figure("", "accuracy")(runs, {})
    return [
        f"{about_training(network)}; test accuracy {whole} %.",
        table(runs, [(arm, {"arm": arm}) for arm in order], cells, corner="reading"),
    ]


BENCHMARK = Benchmark("readings", SETTINGS, Read, write_page)
