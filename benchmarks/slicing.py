"""Slicing precision (NeuSemSlice, arXiv 2407.20281, first question): accuracy of networks held to critical neurons.

Every slicer and metric gives slices of the same compressions. All are scored as cut; those of the best metric of every
slicer also with statistics recalibrated, and after a tuning of equally many steps for all.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

import torchslice as ts
from torchslice import Slice, accuracy, extract, judge, retention
from torchslice.data import Task
from torchslice.find.semantic import (
    METRICS,
    Contributions,
    PerClass,
    PerLayer,
    ReachTheta,
    Similarity,
    allocate,
    similarity,
)
from torchslice.find.semantic.selection import top_fraction
from torchslice.graph.neurons import Neurons
from torchslice.graph.tied import mean_scores

from .experiment import Benchmark, Part, Rated, Scale, neurons_of
from .tables import Cell, Run, Runs, about_training, by_network, curve, draw, figure, found, mean, page, spread, table

SEMANTIC, GLOBAL, CATEGORY = "semantic", "global", "category-wise"
MAGNITUDE, RANDOM, WIDTHS = "control: magnitude", "control: random", "control: random, semantic widths"
SLICERS = {
    SEMANTIC: "per class the first neurons of every layer that reach theta, then their union",
    CATEGORY: "per class the same fraction of every layer by contribution, then their union",
    GLOBAL: "a fraction of every layer by the mean contribution",
    MAGNITUDE: "a fraction of every layer by the norm of the weights",
    RANDOM: "the same fraction of every layer at random",
    WIDTHS: "at random, as many neurons in every layer as the semantic slice has",
}
ALLOCATIONS = {
    "even": "theta or the fraction is the same for all layers",
    "sloped": "theta falls with depth",
    "measured": "each layer has its own: step by step, that one is cut which adds least loss per parameter",
}
AS_CUT, STATISTICS, TUNED = "as cut", "recalibrated", "tuned"
GRID = 200  # operating points that are tried for a compression
LEVELS = (0.99, 0.98, 0.96, 0.93, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # theta or fraction, measured
SAMPLES = 256  # training images for that

Arm = tuple[str, str, str]  # slicer, metric, allocation
Points = Callable[[float], Slice]  # a larger operating point in (0, 1] gives a larger slice


@dataclass(frozen=True)
class Settings(Scale):
    """One scale of the benchmark; so many images are scored for every slice, None is all.

    `repaired` are the compressions that are recalibrated and tuned, by so many steps.
    """

    scored_validation_images: int | None = None
    scored_test_images: int | None = None
    compressions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
    repaired: tuple[float, ...] = (0.1, 0.3, 0.5)
    tuning_steps: int = 100


FAST = Rated("cifar10", "fast", 1.0, epochs=12, learning_rate=0.15)
CPU = (
    FAST,
    Rated("cifar10", "resnet20", 1.0, epochs=10),
    Rated("cifar10", "vgg16", 0.5, epochs=10),
    Rated("mnist", "lenet", 1.0, epochs=5, train_images=20_000),
)
PAPER = (
    replace(FAST, epochs=60),
    *(Rated("cifar10", name, 1.0, epochs=160) for name in ("resnet20", "resnet18", "vgg16")),
    Rated("cifar100", "resnet18", 1.0, epochs=160),
)
SETTINGS = {
    "smoke": Settings((Rated("digits", "lenet", 0.5, epochs=2),), 1, 16, repaired=(0.3,), tuning_steps=5),
    "cpu": Settings(CPU, scored_validation_images=500, scored_test_images=1_000),
    "paper": Settings(PAPER, samples_per_class=256, tuning_steps=400),
}


@dataclass(frozen=True)
class Slicing(Part):
    """One trained network, held to slices of every kind and size, some of them repaired."""

    def result(self) -> dict[str, Any]:
        settings = self.settings
        counts = {"validation": settings.scored_validation_images, "test": settings.scored_test_images}
        scored = self.task.limit(**counts, seed=settings.seed)
        neurons = neurons_of(self.trained(self.task, folder=self.folder), self.task)
        scores = self.contributions(neurons, self.task, metric=METRICS.names()).tied(neurons)
        alike = similarity(neurons, self.task, scores, progress=self.progress)
        rows: list[dict[str, Any]] = []
        slices: dict[tuple[Arm, float], Slice] = {}

        def score(arm: Arm, make: Callable[[float], Slice]) -> None:
            for compression in settings.compressions:
                slice_ = slices[arm, compression] = make(compression)
                kept = {"neurons": slice_.neuron_retention, "compression": 1 - retention(neurons, slice_).param}
                figures = scores_of(extract(neurons, slice_), scored)  # as the masked network, faster
                rows.append({**keys(arm, compression, AS_CUT), **kept, **figures})
            self.note(f"{', '.join(arm)}: {rows[-1]['validation']:.1%} of validation images")

        for arm, points in self.arms(neurons, scores, alike):
            score(arm, partial(compressed, neurons, points))
        samples = scores.samples[:: -(-len(scores.samples) // SAMPLES)]
        few = replace(self.task, train=self.task.train.take(samples))
        for slicer, metric, points in self.spread(neurons, scores, alike, best_arms(rows)):
            levels, most = [*map(points, LEVELS)], 1 - settings.compressions[-1]
            path = allocate(neurons, few, levels, param_retention=most, samples=SAMPLES, progress=self.progress)
            score((slicer, metric, "measured"), partial(compressed, neurons, partial(point_of, path)))
        best = best_arms(rows)
        like = {c: judge.random_like(slices[best[SEMANTIC], c], seed=self.seed) for c in settings.compressions}
        score((WIDTHS, "-", "-"), like.__getitem__)
        for arm in best_arms(rows).values():
            for compression in settings.repaired:
                self.note(f"{arm[0]} repaired at {compression:.0%} compression")
                for repair, figures in self.repaired(neurons, slices[arm, compression], scored):
                    rows.append({**keys(arm, compression, repair), **figures})
        return {"whole": scores_of(neurons.model, scored), "rows": rows}

    def arms(self, neurons: Neurons, scores: Contributions, alike: Similarity) -> Iterator[tuple[Arm, Points]]:
        """Yield what needs no measuring: slicer, metric and allocation, and their slices."""

        by = partial(by_contribution, scores, alike)
        for metric in scores.metrics:
            yield (GLOBAL, metric, "even"), by(PerLayer, metric)
            yield (CATEGORY, metric, "-"), by(PerClass, metric)
            yield (SEMANTIC, metric, "even"), by(partial(ReachTheta, slope=0.0), metric)
            yield (SEMANTIC, metric, "sloped"), by(partial(ReachTheta, slope=1.0), metric)
        yield (MAGNITUDE, "-", "even"), by_magnitude(neurons)
        yield (RANDOM, "-", "-"), lambda point: neurons.random(point, seed=self.seed)

    def spread(
        self, neurons: Neurons, scores: Contributions, alike: Similarity, best: Mapping[str, Arm]
    ) -> Iterator[tuple[str, str, Points]]:
        """Yield what is spread over the layers by measuring: slicer, metric, and slices of every level."""
        by = partial(by_contribution, scores, alike)
        yield GLOBAL, best[GLOBAL][1], by(PerLayer, best[GLOBAL][1])
        yield SEMANTIC, best[SEMANTIC][1], by(partial(ReachTheta, slope=0.0), best[SEMANTIC][1])
        yield MAGNITUDE, "-", by_magnitude(neurons)

    def repaired(self, neurons: Neurons, slice_: Slice, scored: Task) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the figures of a slice with statistics computed again, and after tuning."""
        small = judge.recalibrate(extract(neurons, slice_), self.task, seed=self.seed)
        yield STATISTICS, scores_of(small, scored)
        rate = 0.1 if any(isinstance(module, nn.BatchNorm2d) for module in small.modules()) else 0.01
        training = replace(self.training, epochs=1, learning_rate=rate)
        few = scored.limit(train=self.settings.tuning_steps * training.batch_size, seed=self.seed)
        yield TUNED, scores_of(ts.finetune(small, few, training).model, scored)


def by_contribution(scores: Contributions, alike: Similarity, strategy: Callable[[float], Any], metric: str) -> Points:
    """Return the slices of a strategy at every point."""
    return lambda point: strategy(point).choose(scores, metric, alike).critical


def by_magnitude(neurons: Neurons) -> Points:
    """Return the slices of a fraction of every layer by the norm of the weights."""
    norms = {n: neurons.model.get_parameter(f"{n}.weight").detach().flatten(1).norm(dim=1) for n in neurons.layers}
    worth = mean_scores(neurons.sets, norms)
    return lambda point: Slice({n: top_fraction(of, point) for n, of in worth.items()})


def keys(arm: Arm, compression: float, repair: str) -> dict[str, Any]:
    """Return the keys of a row."""
    return {**dict(zip(("slicer", "metric", "allocation"), arm, strict=True)), "at": compression, "repair": repair}


def point_of(path: Sequence[Slice], point: float) -> Slice:
    """Return the slice at a point in [0, 1] of slices that become ever smaller, the first at 1."""
    return path[round((1 - point) * (len(path) - 1))]


def compressed(neurons: Neurons, points: Points, compression: float) -> Slice:
    """Return the largest slice whose network is compressed by that much at least: so no arm gains by a coarse step."""

    @cache
    def at(step: int) -> Slice:
        return neurons.closed(points(step / GRID))

    def too_large(step: int) -> bool:
        return 1 - retention(neurons, at(step)).param < compression

    return at(max(1, bisect_left(range(GRID + 1), True, lo=1, key=too_large) - 1))


def scores_of(network: torch.nn.Module, task: Task) -> dict[str, float]:
    """Return the accuracies of a network."""
    return {split: accuracy(network, task, split).overall for split in ("validation", "test")}


def best_arms(rows: Runs) -> dict[str, Arm]:
    """Return the arm of every slicer with the best mean on validation images, as cut."""
    means: dict[Arm, list[float]] = {}
    for row in found(rows, repair=AS_CUT):
        means.setdefault((row["slicer"], row["metric"], row["allocation"]), []).append(row["validation"])
    slicers = dict.fromkeys(arm[0] for arm in means)
    return {
        slicer: max((arm for arm in means if arm[0] == slicer), key=lambda arm: fmean(means[arm])) for slicer in slicers
    }


# -- the page -----------------------------------------------------------------------------------------------------
def with_losses(run: Run) -> dict[str, Any]:
    """Return a run whose rows also say what is lost to the whole network, and which are of a slicer's best arm."""
    best, rows = best_arms(run["rows"]), []
    for row in run["rows"]:
        lost = {f"lost, {split}": run["whole"][split] - row[split] for split in ("validation", "test")}
        rows.append({**row, **lost, "best": best[row["slicer"]] == (row["slicer"], row["metric"], row["allocation"])})
    return {**run, "rows": rows, "arms": best}


def write_page(result: dict[str, Any], path: Path) -> str:
    """Write the answer, the curves of every slicer's best arm, all networks together, and tables per network."""
    settings, runs = result["manifest"]["settings"], list(map(with_losses, result["runs"]))
    seeds = [
        {"rows": [row for run in found(runs, seed=n) for row in run["rows"]]} for n in {run["seed"] for run in runs}
    ]
    repaired = settings["repaired"]
    figures = {AS_CUT: figure("rows", "lost, test", best=True, repair=AS_CUT)}
    for repair in (AS_CUT, STATISTICS, TUNED):
        for at in repaired:
            heading = f"{at:.0%}, {repair}"
            figures[heading] = figure("rows", "lost, test", best=True, repair=repair, at=at)
    panels = {
        name: {
            slicer: [
                [
                    (0.0, 100 * run["whole"]["test"]),
                    *curve(run["rows"], "at", "test", slicer=slicer, best=True, repair=AS_CUT),
                ]
                for run in own
            ]
            for slicer in SLICERS
        }
        for name, own in by_network(runs).items()
    }
    title = "Test accuracy of what is left as cut; mean ± deviation over the seeds"
    picture = draw(path.with_suffix(".png"), panels, x="compression, %", y="test accuracy, %", title=title)
    together = table(seeds, [(slicer, {"slicer": slicer}) for slicer in SLICERS], figures, corner="points lost")
    text = (
        together,
        "Points of test accuracy lost to the whole network, mean over the networks; first as cut, over all "
        "compressions. Compression is the fraction of the parameters that are held at zero, at least what is said. Of "
        "every slicer the metric, and how its slices are spread over the layers, is chosen for each network and seed "
        f"by {settings['scored_validation_images'] or 'all'} validation images as cut; the semantic one has most to "
        "choose from. *Recalibrated*: batch-norm statistics are computed again. *Tuned*: then "
        f"{settings['tuning_steps']} steps for every arm, the better of before and after on validation images. Neurons "
        "that leave together are chosen as one.",
        "\n".join(f"- **{name}**: {meaning}." for name, meaning in ALLOCATIONS.items()),
    )
    return page(
        "Slicing precision",
        {**result, "runs": runs},
        answer=answer(seeds, by_network(runs), repaired),
        picture=picture,
        text=text,
        section=section,
        arms=SLICERS,
    )


def answer(seeds: Runs, networks: Mapping[str, Runs], repaired: Sequence[float]) -> str:
    """Return the first line of the page."""

    def lost(runs: Runs, slicer: str, **where: Any) -> float:
        rows = (row for run in runs for row in found(run["rows"], slicer=slicer, best=True, **where))
        return mean(row["lost, test"] for row in rows) or 0.0

    rivals, parts = [slicer for slicer in SLICERS if slicer != SEMANTIC], []
    for repair in (AS_CUT, STATISTICS, TUNED):
        best = min(rivals, key=lambda slicer: lost(seeds, slicer, repair=repair))
        ahead = [
            name
            for name, runs in networks.items()
            if all(
                lost(runs, SEMANTIC, repair=repair, at=at) < lost(runs, rival, repair=repair, at=at)
                for rival in rivals
                for at in repaired
            )
        ]
        ours, theirs = (100 * lost(seeds, slicer, repair=repair) for slicer in (SEMANTIC, best))
        parts.append(
            f"{ours:z.1f} points {repair} (best rival, {best}: {theirs:z.1f}; ahead of all rivals everywhere on "
            f"{', '.join(ahead) or 'no network'})"
        )
    return f"Semantic slices lose, of test accuracy, {', '.join(parts)}."


def section(runs: Runs, network: Run) -> list[str]:
    """Write the accuracies of every slicer's best arm, repaired too, and those of all arms as cut."""
    rows = runs[0]["rows"]
    compressions = list(dict.fromkeys(row["at"] for row in rows))
    best: dict[str, Cell] = {"chosen": lambda runs, row: "; ".join(named(run["arms"][row["slicer"]]) for run in runs)}
    for repair in (AS_CUT, STATISTICS, TUNED):
        for at in dict.fromkeys(row["at"] for row in found(rows, repair=repair)):
            best[f"{at:.0%}, {repair}"] = figure("rows", "test", best=True, repair=repair, at=at)
    for at in (compressions[0], compressions[-1]):  # layers of many parameters are cut in large steps
        best[f"compressed at {at:.0%}"] = figure("rows", "compression", best=True, repair=AS_CUT, at=at)
    arms = dict.fromkeys((row["slicer"], row["metric"], row["allocation"]) for run in runs for row in run["rows"])
    every = {f"{at:.0%}": figure("rows", "test", repair=AS_CUT, at=at) for at in compressions}
    titles = [
        (f"{arm[0]}, {named(arm)}", dict(zip(("slicer", "metric", "allocation"), arm, strict=True))) for arm in arms
    ]
    return [
        f"{about_training(network)}. Uncut: {spread([run['whole']['test'] for run in runs], digits=2)} %.",
        table(runs, [(slicer, {"slicer": slicer}) for slicer in SLICERS], best, corner="test accuracy, %"),
        "All arms as cut:",
        table(runs, titles, every, corner="test accuracy, %"),
    ]


def named(arm: Arm) -> str:
    """Return metric and allocation of an arm, where it has them."""
    return ", ".join(part for part in arm[1:] if part != "-") or "-"


BENCHMARK = Benchmark("slicing", SETTINGS, Slicing, write_page)
