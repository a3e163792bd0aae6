"""Restructuring (NeuSemSlice, arXiv 2407.20281, second question): does keeping critical neurons help compression?

Four ways to remove weights, and one to remove neurons, each from the whole network, from its semantic slice, and from a
random slice with as many neurons in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchslice import Slice, accuracy, extract, judge, restructure
from torchslice.find.semantic import ReachTheta, similarity
from torchslice.graph.neurons import Neurons
from torchslice.maintain import PRUNING

from .experiment import Benchmark, Network, Part, Scale, neurons_of, spent
from .tables import Curve, Run, Runs, by_network, draw, figure, found, page, table

METRIC, STRUCTURED = "taylor", "structured"
LOG = ("step", "param_retention", "mac_retention", "sparsity", "validation_accuracy", "seconds")
ARMS = {
    "whole": "without slicing",
    "slice": "from the semantic slice",
    "random": "control: from a random slice with as many neurons in every layer",
}


@dataclass(frozen=True)
class Settings(Scale):
    """One scale of the benchmark.

    The slice is that of the smallest of `thetas` that loses at most `slice_loss` validation accuracy, untrained. Every
    iteration retrains on so many images; None is all.
    """

    retraining_images: int | None = None
    epochs_per_iteration: int = 1
    patience: int = 1
    param_retention: float = 0.05
    max_accuracy_loss: float = 0.01
    prune_fraction: float = 0.2
    thetas: tuple[float, ...] = (0.6, 0.75, 0.85, 0.9, 0.92, 0.94, 0.96, 0.98)
    slice_loss: float = 0.05
    retraining_learning_rate: float = 0.02


DIGITS = Network("digits", "lenet", 0.5, epochs=4)
CPU = (
    Network("mnist", "lenet", 1.0, epochs=5, train_images=20_000, validation_images=2_000),
    Network("fashion-mnist", "convnet", 0.5, epochs=6, train_images=20_000, validation_images=2_000),
    Network("cifar10", "convnet", 0.25, epochs=10, train_images=20_000, validation_images=2_000),
)
PAPER = (
    Network("mnist", "lenet", 1.0, epochs=20),
    Network("fashion-mnist", "convnet", 1.0, epochs=60),
    *(Network("cifar10", name, 1.0, epochs=160) for name in ("resnet18", "vgg16")),
)
SETTINGS = {
    "smoke": Settings((DIGITS,), 1, 16, retraining_images=400, prune_fraction=0.5, param_retention=0.2),
    "cpu": Settings(CPU, retraining_images=4_000),
    "paper": Settings(PAPER, samples_per_class=256, epochs_per_iteration=10, patience=2),
}


@dataclass(frozen=True)
class Restructuring(Part):
    """One trained network, compressed by every method from every start."""

    def result(self) -> dict[str, Any]:
        task = self.task
        neurons = neurons_of(self.trained(task, folder=self.folder), task)
        scores = self.contributions(neurons, task, metric=METRIC)
        alike = similarity(neurons, task, scores, progress=self.progress)
        slices = {t: ReachTheta(t).choose(scores, similarity=alike).critical for t in self.settings.thetas}
        theta = self.chosen(neurons, slices)
        starts = {"whole": None, "slice": slices[theta], "random": judge.random_like(slices[theta], seed=self.seed)}
        mean = {layer: score.mean(0) for layer, score in scores[METRIC].items()}
        rows = []
        for method in (*PRUNING.names(), STRUCTURED):
            for arm, start in starts.items():
                self.note(f"{method}, {ARMS[arm]}")
                given = {"scores": mean} if method == STRUCTURED else {}
                rows.append({"method": method, "arm": arm, **self.compressed(neurons, start, method=method, **given)})
        return {
            "test_accuracy": accuracy(neurons.model, task).overall,
            "theta": theta,
            "neuron_retention": slices[theta].neuron_retention,
            "rows": rows,
        }

    def chosen(self, neurons: Neurons, slices: dict[float, Slice]) -> float:
        """Return the first theta that loses little validation accuracy without training, else the last that cuts."""
        least = accuracy(neurons.model, self.task, "validation").overall - self.settings.slice_loss
        cutting = [theta for theta, slice_ in slices.items() if len(slice_) < len(neurons)]
        for theta in cutting:
            if accuracy(extract(neurons, slices[theta]), self.task, "validation").overall >= least:
                return theta
        return cutting[-1]

    def compressed(self, neurons: Neurons, start: Slice | None, **options: Any) -> dict[str, Any]:
        """Compress within the allowed loss; then, if weights are removed, go on to the target whatever it costs."""
        settings, task = self.settings, self.task.limit(train=self.settings.retraining_images, seed=self.seed)
        epochs, rate = settings.epochs_per_iteration, settings.retraining_learning_rate
        options |= {"training": replace(self.training, epochs=epochs, learning_rate=rate)}
        options |= {"prune_fraction": settings.prune_fraction}
        limit = {"max_accuracy_loss": settings.max_accuracy_loss, "patience": settings.patience}
        target = settings.param_retention
        within = restructure(neurons, task, start, param_retention=target, **limit, **options)
        reached, path = within.about["stopped"] == "target", within.log[: within.kept + 1]
        least = path[0]["validation_accuracy"] - settings.max_accuracy_loss - 1e-9
        row = {
            "compression": 1 - within.best["param_retention"] if within.best["validation_accuracy"] >= least else 0.0,
            "test_accuracy": accuracy(within.model, self.task).overall,
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
            "target_test_accuracy": accuracy(last, self.task).overall,
        }


# -- the page -----------------------------------------------------------------------------------------------------
def write_page(result: dict[str, Any], path: Path) -> str:
    """Write one table per network: a row per method and arm; draw the way of LAMP from every start."""
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
        before, kept = (figure("", key)(runs, {}) for key in ("test_accuracy", "neuron_retention"))
        thetas = ", ".join(f"{run['theta']:g}" for run in runs)
        about = f"Before: {before} %. The slice keeps {kept} % of the neurons (theta {thetas})."
        keys = [{key: row[key] for key in ("method", "arm")} for row in runs[0]["rows"]]
        return [about, table(runs, [(", ".join(key.values()), key) for key in keys], figures, corner="method")]

    text = (
        f"Every iteration removes {settings['prune_fraction']:.0%} of the surviving weights and trains "
        f"{settings['epochs_per_iteration']} epoch(s), up to {settings['patience']} time(s) again where more than "
        f"{settings['max_accuracy_loss']:.0%} of validation accuracy is lost. Compression is the fraction of the "
        "parameters that are gone, the largest within that loss, 0 where even the cut slice loses more; the test "
        f"accuracy beside it is that of the network kept. Then to {target} compression, whatever it costs: how many "
        "trainings it takes (that of the cut slice included), their time, and test accuracy at the end. Mean ± "
        "standard deviation."
    )
    names = {"slice": "slice", "whole": "control: whole network", "random": "control: random slice"}
    panels = {
        network: {name: [way(run, arm) for run in runs] for arm, name in names.items()}
        for network, runs in by_network(result["runs"]).items()
    }
    title = "LAMP within the allowed loss; mean ± deviation over the seeds"
    axes: dict[str, Any] = {"x": "parameters left, %", "y": "validation accuracy, %", "log_x": True}
    picture = draw(path.with_suffix(".png"), panels, title=title, **axes)
    return page("Restructuring", result, text=[text], section=section, arms=ARMS, picture=picture)


def way(run: Run, arm: str) -> Curve:
    """Return the last accuracy of LAMP at every number of parameters, in percent."""
    row = found(run["rows"], method="lamp", arm=arm)[0]
    steps = zip(row["param_retention"], row["validation_accuracy"], strict=True)
    return list({100 * left: 100 * accuracy for left, accuracy in steps}.items())


BENCHMARK = Benchmark("restructure", SETTINGS, Restructuring, write_page)
