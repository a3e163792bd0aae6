"""Re-adaptation (NeuSemSlice, arXiv 2407.20281, third question): is it enough to train critical neurons?

Networks are adapted to adversarial samples, to corrupted images, and after damage to their weights. Every arm trains
something else in the same way, at the learning rate that is best for it on validation images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from torchslice import Slice, accuracy, judge
from torchslice.data import Images, Task, limit
from torchslice.find.semantic import PerLayer
from torchslice.graph.neurons import Neurons
from torchslice.inputs import device_of
from torchslice.maintain import Computed, Partial, adapt, top_by_score_per_parameter

from .baselines import LowRank, deeparc_slice, layer_similarity
from .experiment import Benchmark, Network, Part, Scale, inputs_of, neurons_of
from .shifts import ATTACKS, CORRUPTIONS, damaged, shifted
from .tables import Cell, Curve, Run, Runs, by_network, draw, figure, found, page, table

METRIC = "taylor"
SHIFTS = (*ATTACKS, *CORRUPTIONS)
FEW = ("fgsm", "pgd", "noise", "blur", "contrast")  # the toolbox takes too long for larger networks on two cores
ARMS = {
    "not adapted": "the network as it was",
    "full fine-tuning": "all parameters, and batch-norm statistics",
    "last layer": "the rows of the logits only",
    "DeepArc": "the layers, five or half of all, at which the similarity of old and new images drops most",
    "low-rank adapters": "low-rank additions to all weights, as many parameters as the critical neurons have",
    "critical neurons": "the neurons that contribute most per parameter, up to a fraction of all parameters",
    "critical neurons, classifier": "the same and the rows of the logits",
    "critical neurons, equal fractions": "the neurons that contribute most in every layer, the same fraction of each",
    "control: random neurons": "as many random neurons in every layer as the critical ones",
    "control: random, equal fractions": "the same fraction of every layer",
}
DRAWN = [arm for arm in ARMS if arm != "not adapted" and "classifier" not in arm and "equal" not in arm]


@dataclass(frozen=True)
class Attacked(Network):
    """A network, the attacks and corruptions it meets, and by how many grey levels attacks may move pixels."""

    epsilon: int = 0
    shifts: tuple[str, ...] = SHIFTS


@dataclass(frozen=True)
class Settings(Scale):
    """One scale of the benchmark.

    So many images of the validation and of the test split are measured, None is all. `points` are those that damage
    costs, by so many mutants per seed. Critical neurons have `param_fraction` of the parameters.
    """

    measured_images: int | None = None
    new_samples: int = 1_000
    epochs: int = 5
    points: tuple[float, ...] = (0.1, 0.3, 0.5)
    mutants: int = 1
    param_fraction: float = 0.2
    replay: float = 1.0
    learning_rates: tuple[float, ...] = (0.005, 0.02)


DIGITS = Attacked("digits", "convnet", 0.25, epochs=4, epsilon=30, shifts=("fgsm", "contrast"))
CPU = (
    Attacked("mnist", "lenet", 1.0, epochs=5, train_images=20_000, epsilon=40),
    Attacked("fashion-mnist", "convnet", 0.5, epochs=6, train_images=20_000, epsilon=12, shifts=FEW),
    Attacked("cifar10", "convnet", 0.25, epochs=10, train_images=20_000, epsilon=6, shifts=FEW),
)
PAPER = (
    Attacked("mnist", "lenet", 1.0, epochs=20, epsilon=40),
    Attacked("fashion-mnist", "convnet", 1.0, epochs=60, epsilon=12),
    *(Attacked("cifar10", name, 1.0, epochs=160, epsilon=8) for name in ("resnet18", "vgg16")),
)
RATES = (0.0005, 0.002, 0.005, 0.02)
SETTINGS = {
    "smoke": Settings((DIGITS,), 1, 16, new_samples=100, epochs=1, points=(0.3,), learning_rates=(0.005,)),
    "cpu": Settings(CPU, measured_images=1_000),
    "paper": Settings(PAPER, samples_per_class=256, epochs=20, mutants=3, learning_rates=RATES),
}


@dataclass(frozen=True)
class Scenario:
    """A network to adapt, training samples to adapt it to beside their originals, and test samples like them."""

    name: str
    neurons: Neurons
    original: Images
    new: Images
    held_out: Images


@dataclass(frozen=True)
class Readapting(Part):
    """One trained network, adapted in every scenario by every arm."""

    def result(self) -> dict[str, Any]:
        count = self.settings.measured_images
        neurons = neurons_of(self.trained(self.task, folder=self.folder), self.task)
        task = self.task.limit(validation=count, test=count, seed=self.seed)
        scores = self.contributions(neurons, task, metric=METRIC)
        scores_of_all = {layer: score.mean(0) for layer, score in scores[METRIC].items()}
        critical = top_by_score_per_parameter(neurons, scores_of_all, self.settings.param_fraction)
        equal = PerLayer(self.settings.param_fraction).choose(scores).critical
        rows = []
        for scenario in self.scenarios(neurons, task):
            self.note(scenario.name)
            for arm, row in self.adapted(neurons, scenario, task, critical, equal):
                rows.append({"scenario": scenario.name, "arm": arm, **row})
        return {"rows": rows}

    def scenarios(self, neurons: Neurons, task: Task) -> Iterator[Scenario]:
        """Make all that the network has to be adapted to."""
        settings, model = self.settings, neurons.model
        original: Any = limit(task.train, settings.new_samples, seed=self.seed)
        test: Any = task.test
        for name in self.network.shifts:
            new, held_out = (
                shifted(name, model, images, epsilon=self.network.epsilon, seed=self.seed + number)
                for number, images in enumerate((original, test))
            )
            yield Scenario(name, neurons, original, new, held_out)
        for points in settings.points:
            for mutant in range(settings.mutants):
                hurt = neurons.on(damaged(model, task, points, seed=1000 * self.seed + mutant))
                yield Scenario(f"damage {points:.0%}", hurt, original, original, test)

    def adapted(
        self, healthy: Neurons, scenario: Scenario, task: Task, critical: Slice, equal: Slice
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Adapt a network by every arm and score it on the held-out new samples and on the clean test images."""
        neurons, model, every = scenario.neurons, scenario.neurons.model, range(len(task.classes))
        old, new = (inputs_of(images, device_of(model)) for images in (scenario.original, scenario.new))
        blocks = deeparc_slice(layer_similarity(healthy, old, model, new), neurons.full())

        def only(slice_: Slice, classes: range = range(0)) -> Partial:
            return Partial(neurons, slice_, classes=classes, batch_statistics=True)

        budget = only(critical).param_fraction
        networks: dict[str, Callable[[], nn.Module]] = {
            "full fine-tuning": lambda: model,
            "last layer": lambda: only(neurons.none(), every),
            "DeepArc": lambda: only(blocks),
            "low-rank adapters": lambda: LowRank(model, param_fraction=budget, seed=self.seed),
            "critical neurons": lambda: only(critical),
            "critical neurons, classifier": lambda: only(critical, every),
            "critical neurons, equal fractions": lambda: only(equal),
            "control: random neurons": lambda: only(judge.random_like(critical, seed=self.seed)),
            "control: random, equal fractions": lambda: only(judge.random_like(equal, seed=self.seed)),
        }

        def scores(network: nn.Module) -> dict[str, float]:
            tests = {"new_accuracy": replace(task, test=scenario.held_out), "clean_accuracy": task}
            return {name: accuracy(network, test).overall for name, test in tests.items()}

        yield "not adapted", scores(model)
        settings = replace(self.training, epochs=self.settings.epochs, batch_size=64, optimizer="adamw")
        for arm, make in networks.items():
            network, tried = make(), {}
            for rate in self.settings.learning_rates:
                training = replace(settings, learning_rate=rate)
                tried[rate] = adapt(network, task, scenario.new, replay=self.settings.replay, training=training)
            rate, best = max(tried.items(), key=lambda item: item[1].best["validation_accuracy"])
            merged = best.model.merged() if isinstance(best.model, Computed) else best.model
            log = {key: [row[key] for row in best.log] for key in ("steps", "seconds")}
            log["seconds"] = list(accumulate(log["seconds"]))
            log |= {f"validation_{side}": [row[f"{side}_accuracy"] for row in best.log] for side in ("new", "clean")}
            about = {"param_fraction": best.about["param_fraction"], "learning_rate": rate, "best_epoch": best.kept}
            yield arm, {**scores(merged), **about, **log}


# -- the page -----------------------------------------------------------------------------------------------------
def to_target(case: Mapping[str, Run], *, gain: float = 0.9) -> dict[str, int | None]:
    """Return for every arm the first epoch with nine tenths of the gain on new samples that full fine-tuning makes.

    All on validation images; None for an arm that does not get there, nothing at all where that gain is below a point.
    """
    full = case["full fine-tuning"]
    start, end = (full["validation_new"][epoch] for epoch in (0, full["best_epoch"]))
    if end - start < 0.01:
        return {}
    target = start + gain * (end - start) - 1e-4  # figures have four digits
    ways = {arm: enumerate(row["validation_new"] or ()) for arm, row in case.items()}
    return {arm: next((epoch for epoch, value in way if value >= target), None) for arm, way in ways.items()}


def with_targets(run: Run) -> Run:
    """Return a run whose rows also say the mean of both accuracies and, where there is a target, how it is reached."""
    rows = []
    for start in range(0, len(run["rows"]), len(ARMS)):  # of one scenario or mutant
        case = {row["arm"]: row for row in run["rows"][start : start + len(ARMS)]}
        target = to_target(case)
        for arm, row in case.items():
            epoch, tried = target.get(arm), arm in target and arm != "not adapted"
            at = {key: None if epoch is None else row[key][epoch] for key in ("steps", "seconds")}
            both = (row["new_accuracy"] + row["clean_accuracy"]) / 2
            rows.append({**row, **at, "mean": both, "reached": float(epoch is not None) if tried else None})
    return {**run, "rows": rows}


def write_page(result: dict[str, Any], path: Path) -> str:
    """Write two tables per network: means over the scenarios, and the accuracies in each of them."""
    settings = result["manifest"]["settings"]
    rates = " or ".join(f"{rate:g}" for rate in settings["learning_rates"])
    text = (
        f"Each arm is trained on {settings['new_samples']} new samples and {settings['replay']:g} old ones per new one "
        f"for {settings['epochs']} epochs; learning rate ({rates}) and epoch are those of the best mean accuracy on "
        "held-back new samples and clean validation images. Test accuracy in percent, on held-out new samples and on "
        "the clean test set; damage leaves images as they are. Steps and seconds are those to nine tenths of the "
        "gain that full fine-tuning makes on new validation samples, where it makes any and an arm gets there. "
        "First the mean over the scenarios, then mean ± standard deviation over the seeds."
    )
    panels = {
        name: {arm: [mean_curve(run, arm) for run in runs] for arm in DRAWN}
        for name, runs in by_network(result["runs"]).items()
    }
    title = "Re-adaptation, validation; mean ± deviation over the seeds"
    picture = draw(path.with_suffix(".png"), panels, x="epoch", y="mean of new and clean accuracy, %", title=title)
    return page("Re-adaptation", result, text=[text], section=section, arms=ARMS, picture=picture)


FIGURES = {
    "new samples": figure("rows", "new_accuracy"),
    "clean": figure("rows", "clean_accuracy"),
    "mean": figure("rows", "mean"),
    "parameters trained": figure("rows", "param_fraction"),
    "target reached": figure("rows", "reached"),
    "steps": figure("rows", "steps", percent=False),
    "seconds": figure("rows", "seconds", percent=False),
}


def section(runs: Runs, network: Run) -> list[str]:
    """Write the means over the scenarios of one network, and each scenario."""
    arms = [(arm, {"arm": arm}) for arm in ARMS]

    def both(scenario: str) -> Cell:
        sides = [figure("rows", f"{side}_accuracy", scenario=scenario) for side in ("new", "clean")]
        return lambda runs, row: " / ".join(side(runs, row) for side in sides)

    scenarios = {row["scenario"]: both(row["scenario"]) for row in runs[0]["rows"]}
    means = table(list(map(with_targets, runs)), arms, FIGURES, corner="arm")
    return [means, table(runs, arms, scenarios, corner="new / clean")]


def mean_curve(run: Run, arm: str) -> Curve:
    """Return the mean of both accuracies over the epochs, averaged over the scenarios, in percent."""
    rows = found(run["rows"], arm=arm)
    epochs = zip(*(row[f"validation_{side}"] for row in rows for side in ("new", "clean")), strict=True)
    return [(float(epoch), 100 * fmean(values)) for epoch, values in enumerate(epochs)]


BENCHMARK = Benchmark("readapt", SETTINGS, Readapting, write_page)
