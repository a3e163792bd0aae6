"""Restructuring (NeuSemSlice, arXiv 2407.20281, second question): does keeping critical neurons help compression?

Four ways to remove weights, and one to remove neurons, each from the whole network, from its semantic slices, and from
random slices with as many neurons in every layer; for the task as it is, and for half of its classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchslice import Slice, accuracy, extract, judge, restructure
from torchslice.data import Task
from torchslice.find.semantic import ByGroup, ReachTheta, similarity
from torchslice.graph.neurons import Neurons
from torchslice.maintain import PRUNING
from torchslice.slices import union

from .experiment import Benchmark, Part, Rated, Scale, neurons_of, spent
from .tables import Curve, Run, Runs, by_network, draw, figure, found, mean, page, table

METRIC, STRUCTURED = "taylor", "structured"
LOG = ("step", "param_retention", "mac_retention", "sparsity", "validation_accuracy", "seconds")
ALL, HALF = "all classes", "half of the classes"
LIKE = "control: random, as wide as "
ARMS = {
    "whole": "without slicing",
    "theta": "from the semantic slice of a theta; for half of the classes the union of their slices",
    "groups": "from the neurons of the semantic groups that serve one of these classes",
    f"{LIKE}theta": "from a random slice with as many neurons in every layer",
    f"{LIKE}groups": "likewise",
}


@dataclass(frozen=True)
class Compressed(Rated):
    """A network, and the methods that compress it."""

    methods: tuple[str, ...] = (*PRUNING.names(), STRUCTURED)


@dataclass(frozen=True)
class Settings(Scale):
    """One scale of the benchmark.

    Slices are those of the smallest of `thetas`, and of the largest of `outside` (of groups), that lose at most
    `slice_loss` validation accuracy once they are repaired. Every iteration retrains on so many images
    and chooses its epoch by so many; None is all.
    """

    retraining_images: int | None = None
    choosing_images: int | None = None
    epochs_per_iteration: int = 1
    patience: int = 1
    param_retention: float = 0.05
    max_accuracy_loss: float = 0.01
    prune_fraction: float = 0.2
    thetas: tuple[float, ...] = (0.6, 0.7, 0.8, 0.85, 0.9, 0.94, 0.98)
    outside: tuple[float, ...] = (0.5, 0.35, 0.2, 0.1)
    slice_loss: float = 0.05
    retraining_learning_rate: float = 0.02


CPU = (
    Compressed("mnist", "lenet", 1.0, epochs=5, train_images=20_000),
    Compressed("cifar10", "fast", 1.0, epochs=12, learning_rate=0.15, methods=("lamp",)),
)
PAPER = (
    Compressed("mnist", "lenet", 1.0, epochs=20),
    Compressed("cifar10", "fast", 1.0, epochs=60, learning_rate=0.15),
    *(Compressed("cifar10", name, 1.0, epochs=160) for name in ("resnet18", "vgg16")),
)
SMOKE = Compressed("digits", "lenet", 0.5, epochs=4, methods=("lamp", STRUCTURED))
SETTINGS = {
    "smoke": Settings((SMOKE,), 1, 16, retraining_images=400, prune_fraction=0.5, param_retention=0.2),
    "cpu": Settings(CPU, retraining_images=2_000, choosing_images=1_000),
    "paper": Settings(PAPER, samples_per_class=256, epochs_per_iteration=10, patience=2),
}


@dataclass(frozen=True)
class Restructuring(Part):
    """One trained network, compressed by every method from every start."""

    def result(self) -> dict[str, Any]:
        task, settings = self.task, self.settings
        neurons = neurons_of(self.trained(task, folder=self.folder), task)
        scores = self.contributions(neurons, task, metric=METRIC).tied(neurons)
        alike = similarity(neurons, task, scores, progress=self.progress)
        strategies: dict[str, list[Any]] = {
            "theta": [*map(ReachTheta, settings.thetas)],
            "groups": [*map(ByGroup, settings.outside)],
        }
        found = {arm: [one.choose(scores, METRIC, alike) for one in of] for arm, of in strategies.items()}
        limits = {"train": settings.retraining_images, "validation": settings.choosing_images}
        rows, about = [], []
        for name, own, whole in self.tasks(neurons):
            some = whole.limit(**limits, seed=self.seed)
            slices: dict[str, Slice] = {}
            for arm in ("theta",) if name == ALL else found:  # groups serve all classes together with all neurons
                every = [
                    of.critical if name == ALL else union(of[label] for label in some.classes) for of in found[arm]
                ]
                slices[arm] = self.chosen(own, some, list(map(neurons.closed, every)))
                slices[f"{LIKE}{arm}"] = judge.random_like(slices[arm], seed=self.seed)
            about.append({"task": name, **{arm: of.neuron_retention for arm, of in slices.items() if LIKE not in arm}})
            labels = neurons.class_indices(some.classes)
            mean = {layer: score[labels].mean(0) for layer, score in scores[METRIC].items()}
            for method in self.network.methods:
                for arm, start in {"whole": None, **slices}.items():
                    self.note(f"{name}: {method}, {arm}")
                    given = {"scores": mean} if method == STRUCTURED else {}
                    figures = self.compressed(own, start, some, method=method, **given)
                    rows.append({"task": name, "method": method, "arm": arm, **figures})
        return {"test_accuracy": accuracy(neurons.model, task).overall, "slices": about, "rows": rows}

    def tasks(self, neurons: Neurons) -> Iterator[tuple[str, Neurons, Task]]:
        """Yield the task, and that of its first classes with a network cut to them."""
        yield ALL, neurons, self.task
        some = self.task.restrict(self.task.classes[: len(self.task.classes) // 2])
        yield HALF, neurons_of(extract(neurons, neurons.full(), classes=some.classes), some), some

    def chosen(self, neurons: Neurons, task: Task, slices: list[Slice]) -> Slice:
        """Return the first slice that loses little validation accuracy without training, else the last that cuts."""
        least = accuracy(neurons.model, task, "validation").overall - self.settings.slice_loss
        cutting = [slice_ for slice_ in slices if len(slice_) < len(neurons)]
        for slice_ in cutting:
            repaired = judge.repair(neurons, slice_, task, seed=self.seed)
            if repaired.accuracy[repaired.kept].overall >= least:
                return slice_
        return cutting[-1]

    def compressed(self, neurons: Neurons, start: Slice | None, task: Task, **options: Any) -> dict[str, Any]:
        """Compress within the allowed loss; then, if weights are removed, go on to the target whatever it costs."""
        settings = self.settings
        epochs, rate = settings.epochs_per_iteration, settings.retraining_learning_rate
        options |= {"training": replace(self.training, epochs=epochs, learning_rate=rate)}
        options |= {"prune_fraction": settings.prune_fraction}
        limit = {"max_accuracy_loss": settings.max_accuracy_loss, "patience": settings.patience}
        target = settings.param_retention
        within = restructure(neurons, task, start, param_retention=target, **limit, **options)
        reached, path = within.best["param_retention"] <= target, within.log[: within.kept + 1]
        least = path[0]["validation_accuracy"] - settings.max_accuracy_loss - 1e-9
        row = {
            "compression": 1 - within.best["param_retention"] if within.best["validation_accuracy"] >= least else 0.0,
            "test_accuracy": accuracy(within.model, task).overall,
            "reached": reached,
            **{key: [step[key] for step in within.log] for key in LOG},
        }
        if options["method"] == STRUCTURED:
            return row
        last = within.model
        if not reached:
            options |= {"param_retention": target / within.best["param_retention"], "max_accuracy_loss": None}
            rest = restructure(neurons_of(last, task), task, None, **options)
            last, path = rest.model, (*path, *rest.log[1:])
        return {
            **row,
            "trainings": sum(step["step"] not in ("whole", "cut") for step in path),
            "target_seconds": spent(path),
            "target_test_accuracy": accuracy(last, task).overall,
        }


# -- the page -----------------------------------------------------------------------------------------------------
def write_page(result: dict[str, Any], path: Path) -> str:
    """Write the answer, a table per network and task with a row per method and arm, and draw the way of LAMP."""
    settings = result["manifest"]["settings"]
    target = f"{1 - settings['param_retention']:.0%}"
    figures = {
        "compression, %": figure("rows", "compression"),
        "test accuracy, %": figure("rows", "test_accuracy"),
        f"trainings to {target}": figure("rows", "trainings", percent=False),
        "seconds": figure("rows", "target_seconds", percent=False),
        f"at {target}, %": figure("rows", "target_test_accuracy"),
    }

    def section(runs: Runs, network: Run) -> list[str]:
        kept = {arm: figure("slices", arm) for arm in ("theta", "groups")}
        tasks = [(about["task"], {"task": about["task"]}) for about in runs[0]["slices"]]
        tables = [f"Before: {figure('', 'test_accuracy')(runs, {})} %. Neurons that the slices keep, in percent:"]
        tables.append(table(runs, tasks, kept, corner="task"))
        for name, task in tasks:
            keys = [{**task, "method": row["method"], "arm": row["arm"]} for row in found(runs[0]["rows"], **task)]
            rows = [(f"{key['method']}, {key['arm']}", key) for key in keys]
            tables.append(table(runs, rows, figures, corner=name))
        return tables

    text = (
        f"Every iteration removes {settings['prune_fraction']:.0%} of the surviving weights and trains "
        f"{settings['epochs_per_iteration']} epoch(s), up to {settings['patience']} time(s) again where more than "
        f"{settings['max_accuracy_loss']:.0%} of validation accuracy is lost. Compression is the fraction of the "
        "parameters that are gone, the largest within that loss, 0 where even the cut slice loses more; the test "
        f"accuracy beside it is that of the network kept. Then to {target} compression, whatever it costs: how many "
        "trainings it takes (that of the cut slice included), their time, and test accuracy at the end. A smaller "
        "start saves trainings by arithmetic alone, so only what beats the random slice as wide counts. Mean ± "
        "standard deviation."
    )
    arms = {
        task: list(dict.fromkeys(row["arm"] for row in found(result["runs"][0]["rows"], task=task)))
        for task in (HALF, ALL)
    }
    panels = {
        f"{name}, {task}": {arm: [way(run, arm, task) for run in runs] for arm in arms[task]}
        for name, runs in by_network(result["runs"]).items()
        for task in (HALF, ALL)
    }
    title = "LAMP within the allowed loss; mean ± deviation over the seeds"
    axes: dict[str, Any] = {"x": "parameters left, %", "y": "validation accuracy, %", "log_x": True}
    picture = draw(path.with_suffix(".png"), panels, title=title, **axes)
    about: dict[str, Any] = {"answer": answer(result["runs"], target), "picture": picture, "text": [text], "arms": ARMS}
    return page("Restructuring", result, section=section, **about)


def answer(runs: Runs, target: str) -> str:
    """Return the first line of the page."""
    parts = []
    for name, own in by_network(runs).items():
        for task, arm in ((ALL, "theta"), (HALF, "theta"), (HALF, "groups")):
            rows = [
                [row for run in own for row in found(run["rows"], method="lamp", task=task, arm=of)]
                for of in (arm, f"{LIKE}{arm}")
            ]
            (ours, theirs), (within, other) = (
                [mean(row[key] for row in of) or 0.0 for of in rows] for key in ("trainings", "compression")
            )
            parts.append(
                f"{name}, {task}, {arm}: {ours:.1f} trainings against {theirs:.1f} ({ours / max(theirs, 1) - 1:+.0%}), "
                f"{within:.0%} against {other:.0%} compressed within the allowed loss"
            )
    return f"By LAMP to {target} compression, semantic slices against random ones as wide. {'; '.join(parts)}."


def way(run: Run, arm: str, task: str) -> Curve:
    """Return the last accuracy of LAMP at every number of parameters, in percent."""
    row = found(run["rows"], method="lamp", arm=arm, task=task)[0]
    steps = zip(row["param_retention"], row["validation_accuracy"], strict=True)
    return list({100 * left: 100 * accuracy for left, accuracy in steps}.items())


BENCHMARK = Benchmark("restructure", SETTINGS, Restructuring, write_page)
