"""Slicing precision (NeuSemSlice, arXiv 2407.20281, first question): accuracy of networks held to critical neurons.

Three strategies, five metrics and ten operating points each, without any training after the cut, beside random slices.
A run is one network and one seed; an arm is a strategy and a metric; a cell is a run and a compression.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torchslice import Slice, accuracy, extract, judge, retention
from torchslice.data import Task
from torchslice.find.semantic import METRICS, Contributions, PerClass, PerLayer, ReachTheta, Similarity, similarity
from torchslice.graph.neurons import Neurons

from .experiment import Benchmark, Network, Part, Scale, neurons_of
from .tables import Cell, Run, Runs, by_network, curve, draw, found, interpolated, is_control, mean, page, spread, table

POSITIONS = {"mean": "CKA of means", "all": "CKA of maps"}
SLOPED = "taylor"  # with it a theta that falls with depth is tried
RANDOM, RANDOM_WIDTHS = "control: random", "control: random, widths of CKA of maps"
COMPRESSIONS = (0.1, 0.2, 0.3, 0.4, 0.5)
ROUNDING = 1e-4  # figures have four digits

Arm = tuple[str, str]
Losses = dict[Arm, dict[tuple[Any, ...], float]]  # arm -> cell (data, model, compression) -> accuracy lost


@dataclass(frozen=True)
class Settings(Scale):
    """One scale of the benchmark; so many images are scored for every slice, None is all."""

    scored_validation_images: int | None = None
    scored_test_images: int | None = None
    neuron_fractions: tuple[float, ...] = tuple(n / 10 for n in range(1, 11))
    thetas: tuple[float, ...] = (0.6, 0.75, 0.85, *(n / 100 for n in range(90, 100)))  # three below the published ten


SMALL = (Network("digits", "lenet", 0.5, epochs=2), Network("digits", "convnet", 0.25, epochs=2))
CPU = (
    Network("mnist", "lenet", 1.0, epochs=5, train_images=20_000),
    Network("fashion-mnist", "convnet", 0.5, epochs=6, train_images=20_000),
    Network("cifar10", "resnet20", 1.0, epochs=8, train_images=20_000),
    Network("cifar10", "vgg16", 0.5, epochs=8, train_images=20_000),
)
PAPER = (
    Network("mnist", "lenet", 1.0, epochs=20),
    Network("fashion-mnist", "convnet", 1.0, epochs=60),
    *(Network("cifar10", name, 1.0, epochs=160) for name in ("resnet20", "resnet18", "vgg16")),
    Network("cifar100", "resnet18", 1.0, epochs=160),
)
SETTINGS = {
    "smoke": Settings(SMALL, 1, 16, neuron_fractions=(0.3, 0.6, 0.9), thetas=(0.9, 0.95, 0.99)),
    "cpu": Settings(CPU, scored_validation_images=500, scored_test_images=1_000),
    "paper": Settings(PAPER, samples_per_class=256),
}


@dataclass(frozen=True)
class Slicing(Part):
    """One trained network, held to slices of every kind and size."""

    def result(self) -> dict[str, Any]:
        task, settings = self.task, self.settings
        neurons = neurons_of(self.trained(task, folder=self.folder), task)
        scores = self.contributions(neurons, task, metric=METRICS.names())
        found = {p: similarity(neurons, task, scores, positions=p, progress=self.progress) for p in POSITIONS}
        counts = {"validation": settings.scored_validation_images, "test": settings.scored_test_images}
        scored = task.limit(**counts, seed=settings.seed)
        points = [
            {"strategy": strategy, "metric": metric, "point": point, **measure(neurons, slice_, scored)}
            for strategy, metric, point, slice_ in self.slices(scores, found, neurons)
        ]
        return {"whole": measure(neurons, neurons.full(), scored), "points": points}

    def slices(
        self, scores: Contributions, found: Mapping[str, Similarity], neurons: Neurons
    ) -> Iterator[tuple[str, str, float, Slice]]:
        """Yield strategy, metric, operating point and slice."""
        for metric in scores.metrics:
            for point in self.settings.neuron_fractions:
                mass = ReachTheta(point, slope=0.0, criterion="mass")
                strategies = {"PerLayer": PerLayer(point), "PerClass": PerClass(point), "ReachTheta, mass": mass}
                for name, strategy in strategies.items():
                    yield name, metric, point, strategy.choose(scores, metric).critical
            for point in self.settings.thetas:
                for positions, name in POSITIONS.items():
                    cka = ReachTheta(point, slope=0.0, positions=positions)
                    critical = cka.choose(scores, metric, found[positions]).critical
                    yield f"ReachTheta, {name}", metric, point, critical
                yield RANDOM_WIDTHS, metric, point, judge.random_like(critical, seed=self.seed)
                if metric == SLOPED:
                    sloped = ReachTheta(point).choose(scores, metric, found["all"]).critical
                    yield "ReachTheta, CKA of maps, sloped", metric, point, sloped
            self.note(f"{metric} done")
        for point in self.settings.neuron_fractions:
            yield RANDOM, "-", point, neurons.random(point, seed=self.seed)


def measure(neurons: Neurons, slice_: Slice, task: Task) -> dict[str, float]:
    """Return compression (fraction of parameters held at zero), neuron retention and accuracies of a slice."""
    small = extract(neurons, slice_)  # computes what the masked network does, faster
    return {
        "compression": 1 - retention(neurons, slice_).param,
        "neuron_retention": slice_.neuron_retention,
        **{split: accuracy(small, task, split).overall for split in ("validation", "test")},
    }


# -- figures ------------------------------------------------------------------------------------------------------
def curves(run: Run) -> dict[Arm, list[Run]]:
    """Return the measured points of every arm and, as their beginning, the whole network."""
    arms: dict[Arm, list[Run]] = {}
    for point in run["points"]:
        arms.setdefault((point["strategy"], point["metric"]), [run["whole"]]).append(point)
    return arms


def at_compression(points: Sequence[Run], compression: float, split: str = "test") -> float | None:
    """Interpolate a curve's accuracy at a compression, None beyond its end."""
    return interpolated([(point["compression"], point[split]) for point in points], compression)


def largest(points: Sequence[Run], loss: float = 0.01) -> float:
    """Return the largest compression measured at which at most `loss` test accuracy is lost to the whole network."""
    return max(point["compression"] for point in points if point["test"] >= points[0]["test"] - loss - ROUNDING)


def losses(runs: Runs, seed: int) -> dict[str, Losses]:
    """Return the accuracy that every arm loses in every cell that its curve reaches, for validation and test images."""
    lost: dict[str, Losses] = {"validation": {}, "test": {}}
    for run in found(runs, seed=seed):
        for (arm, points), split, at in itertools.product(curves(run).items(), lost, COMPRESSIONS):
            cells, value = lost[split].setdefault(arm, {}), at_compression(points, at, split)
            if value is not None:
                cells[run["data"], run["model"], at] = run["whole"][split] - value
    return lost


def ranked(seeds: Sequence[Mapping[str, Losses]], cells: int) -> list[Arm]:
    """Order arms by what they lose on validation images, mean over the cells and seeds.

    Arms that do not reach every cell come last: they lack the hardest ones.
    """

    def rank(arm: Arm) -> tuple[bool, float]:
        lost = [value for seed in seeds for value in seed["validation"][arm].values()]
        return len(lost) < cells * len(seeds), fmean(lost) if lost else math.inf

    return sorted(seeds[0]["validation"], key=rank)


def over_seeds(read: Callable[[Run, Arm], float | None]) -> Cell:
    """Return the cell of a figure of an arm that is read from what is known of a seed."""
    return lambda seeds, row: spread([read(seed, row["arm"]) for seed in seeds])


def ahead(split: str, other: Callable[[Arm], Arm]) -> Cell:
    """Return the cell of what another arm loses more, in the cells that both reach."""

    def read(seed: Run, arm: Arm) -> float | None:
        own, theirs = seed[split][arm], seed[split].get(other(arm), {})
        return mean(theirs[cell] - own[cell] for cell in own if cell in theirs)

    return over_seeds(read)


# -- the page -----------------------------------------------------------------------------------------------------
def write_page(result: dict[str, Any], path: Path) -> str:
    """Write all networks together, the curves of the best metric, and a table per network."""
    runs, networks = result["runs"], by_network(result["runs"])
    seeds, cells = [losses(runs, n) for n in {run["seed"]: 0 for run in runs}], len(networks) * len(COMPRESSIONS)
    arms = ranked(seeds, cells)
    best = next(arm for arm in arms if not is_control(arm[0]))
    figures: dict[str, Cell] = {
        "metric": lambda seeds, row: row["arm"][1],
        "reached": lambda seeds, row: f"{fmean(len(seed['validation'][row['arm']]) / cells for seed in seeds):.0%}",
        "lost, validation": over_seeds(lambda seed, arm: mean(seed["validation"][arm].values())),
        "lost, test": over_seeds(lambda seed, arm: mean(seed["test"][arm].values())),
        "ahead of best": ahead("validation", lambda arm: best),
        "ahead of random": ahead("test", lambda arm: (RANDOM, "-")),
        "ahead of random widths": ahead("test", lambda arm: (RANDOM_WIDTHS, arm[1])),
    }
    its = {heading: cell(seeds, {"arm": best}) for heading, cell in figures.items()}
    panels = {
        name: {
            arm[0]: [curve(curves(run)[arm], "compression", "test") for run in own]
            for arm in curves(own[0])
            if arm[1] in (best[1], "-")
        }
        for name, own in networks.items()
    }
    title = f"Slices by {best[1]} contributions, no training after the cut; mean ± deviation over the seeds"
    blocks = [
        "Networks are held to slices without any training after the cut; "
        f"{result['manifest']['settings']['samples_per_class']} images per class for the contributions. Compression is "
        "the fraction of the parameters that are held at zero. Accuracies at 10 to 50 % compression are interpolated "
        "between the measured points of a curve, the whole network being its beginning: where even the largest slice "
        "is smaller than that, they lie on a straight line to it. Figures are mean ± standard deviation over seeds.",
        "## All networks together",
        "Points of accuracy lost to the whole network, mean over the networks and 10 to 50 % compression. Choices are "
        "made on validation images; test images stand beside them. A curve counts where it gets to; *reached* says in "
        "how many of the networks, seeds and compressions that is. Arms that do not reach all lack the hardest, and so "
        "stand at the end whatever they lose. The last three columns compare in the same cells: how many points more "
        "are lost, on validation images, by the best arm, and on test images by random slices: of one "
        "fraction of every layer, and with the layer widths of the slices by CKA of maps.",
        f"Least is lost on validation images by **{', '.join(best)}**: {its['lost, validation']} points, "
        f"{its['lost, test']} on test images, where random slices lose {its['ahead of random']} points more, and "
        f"those with the layer widths of CKA of maps {its['ahead of random widths']} more.",
        table(seeds, [(arm[0], {"arm": arm}) for arm in arms], figures, corner="strategy"),
        draw(path.with_suffix(".png"), panels, x="compression, %", y="test accuracy, %", title=title),
        "Below, for each network alone: test accuracy in percent at 10 to 50 % compression, and the largest measured "
        "compression at which at most one point of it is lost; - where a curve does not get that far for any seed.",
    ]
    return page("Slicing precision", result, text=blocks, section=section)


def section(runs: Runs, network: Run) -> list[str]:
    """Write the accuracy of every arm of one network over compression."""
    seeds = [curves(run) for run in runs]

    def at(compression: float) -> Cell:
        return over_seeds(lambda seed, arm: at_compression(seed[arm], compression))

    figures: dict[str, Cell] = {"metric": lambda seeds, row: row["arm"][1]}
    figures |= {f"{compression:.0%}": at(compression) for compression in COMPRESSIONS}
    figures["largest compression, %"] = over_seeds(lambda seed, arm: largest(seed[arm]))
    whole = f"Uncut: {spread([run['whole']['test'] for run in runs], digits=2)} %."
    return [whole, table(seeds, [(arm[0], {"arm": arm}) for arm in seeds[0]], figures, corner="strategy")]


BENCHMARK = Benchmark("slicing", SETTINGS, Slicing, write_page)
