"""Re-adaptation (NeuSemSlice, arXiv 2407.20281, third question): is it enough to train critical neurons?

Networks are adapted to adversarial samples, to corrupted images, of all classes or of some, and after damage to their
weights. Every arm trains something else in the same way, at the learning rate that is best for it on validation images.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from torchslice import Slice, accuracy
from torchslice.data import Images, Task, limit
from torchslice.find.semantic import Contributions, ReachTheta, groups, similarity
from torchslice.graph.neurons import Neurons
from torchslice.inputs import device_of
from torchslice.maintain import Computed, Partial, adapt, top_by_score_per_parameter
from torchslice.maintain.partial import moving_parameters

from .baselines import LowRank, deeparc_slice, layer_similarity
from .experiment import Benchmark, Part, Rated, Scale, inputs_of, neurons_of
from .shifts import ATTACKS, CORRUPTIONS, damaged, shifted
from .tables import Cell, Curve, Run, Runs, by_network, draw, figure, found, mean, page, table

METRIC = "taylor"
SHIFTS = (*ATTACKS, *CORRUPTIONS)
SOME, FAILING = 0.3, " of some"  # fraction of the classes that are corrupted, and what such scenarios are named
ARMS = {
    "not adapted": "the network as it was",
    "full fine-tuning": "all parameters, and batch-norm statistics",
    "last layer": "the rows of the logits only",
    "DeepArc": "the layers, five or half of all, at which the similarity of old and new images drops most",
    "low-rank adapters": "low-rank additions to all weights, as many parameters as the critical neurons have",
    "critical": "the neurons that contribute most per parameter, up to a fraction of all parameters",
    "theta": "the semantic slice of the largest theta that has no more parameters, or likewise of the smallest",
    "groups": "likewise as *critical*, but of the neurons that serve a class that fails, and by contribution to these",
    "groups, only": "likewise of the neurons that serve none but such classes, and their rows of the logits",
    "control: random": "random neurons of all layers, up to as many parameters",
    "control: as wide as critical": "as many random neurons of every layer, those outside the critical ones first",
    "control: as wide as groups": "likewise for *groups*",
}
OURS = ("critical", "theta", "groups", "groups, only")
DRAWN = ("full fine-tuning", "low-rank adapters", *OURS, *(arm for arm in ARMS if arm.startswith("control")))


@dataclass(frozen=True)
class Attacked(Rated):
    """A network, and what it meets.

    Attributes:
        epsilon: grey levels by which attacks may move pixels.
        shifts: attacks and corruptions of all classes, and `partial` of some.
        points: of training accuracy that damage costs.
        rates: learning rates beside those of the scale.
    """

    epsilon: int = 0
    shifts: tuple[str, ...] = SHIFTS
    partial: tuple[str, ...] = ("noise", "contrast")
    points: tuple[float, ...] = (0.1, 0.3, 0.5)
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Settings(Scale):
    """One scale of the benchmark.

    So many images of the validation and of the test split are measured, None is all. Damage is done by so many mutants
    per seed. Our arms have at most `param_fraction` of the parameters.
    """

    measured_images: int | None = None
    new_samples: int = 1_000
    epochs: int = 5
    mutants: int = 1
    param_fraction: float = 0.2
    replay: float = 1.0
    learning_rates: tuple[float, ...] = (0.005, 0.02)


SMALL: dict[str, Any] = {"shifts": ("fgsm",), "partial": ("contrast",), "points": (0.3,)}
FAST = Attacked("cifar10", "fast", 1.0, epochs=12, learning_rate=0.15, epsilon=6)
CPU = (  # a network of 92 % takes long on two cores, so it meets little
    Attacked("mnist", "lenet", 1.0, epochs=5, train_images=20_000, epsilon=40),
    replace(FAST, **{**SMALL, "shifts": ("noise",), "rates": (0.0003,)}),
)
PAPER = (
    Attacked("mnist", "lenet", 1.0, epochs=20, epsilon=40),
    replace(FAST, epochs=60),
    *(Attacked("cifar10", name, 1.0, epochs=160, epsilon=8) for name in ("resnet18", "vgg16")),
)
RATES = (0.0005, 0.002, 0.005, 0.02)
SETTINGS = {
    "smoke": Settings(
        (Attacked("digits", "convnet", 0.25, epochs=4, epsilon=30, **SMALL),),
        *(1, 16),
        new_samples=100,
        epochs=1,
        learning_rates=(0.005,),
    ),
    "cpu": Settings(CPU, measured_images=500, epochs=3, learning_rates=(0.001, 0.005, 0.02)),
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
        every, alike = range(len(task.classes)), similarity(neurons, task, scores, progress=self.progress)

        def theta(point: float) -> Slice:
            return ReachTheta(point).choose(scores, METRIC, alike).critical

        among = {"critical": neurons.full(), "theta": largest(neurons, theta, self.settings.param_fraction)}
        fixed = {arm: self.affordable(neurons, scores, every, slice_) for arm, slice_ in among.items()}
        rows = []
        for scenario in self.scenarios(neurons, task):
            failing = classes_that_fail(neurons, scenario, task)
            self.note(f"{scenario.name}: {', '.join(task.classes[c] for c in failing)} fail")
            slices = {**fixed, **self.of_groups(neurons, scores, failing)}
            for arm, row in self.adapted(neurons, scenario, task, slices, failing):
                rows.append({"scenario": scenario.name, "arm": arm, **row})
        return {"rows": rows}

    # -- slices ---------------------------------------------------------------------------------------------------
    def affordable(self, neurons: Neurons, scores: Contributions, classes: Sequence[int], among: Slice) -> Slice:
        """Return the neurons that contribute most to some classes per parameter, as many as may be trained."""
        worth = {layer: of[list(classes)].mean(0) * among[layer] for layer, of in scores[METRIC].items()}
        return top_by_score_per_parameter(neurons, worth, self.settings.param_fraction) & among

    def of_groups(self, neurons: Neurons, scores: Contributions, failing: Sequence[int]) -> dict[str, Slice]:
        """Return the neurons of the groups that serve classes that fail, or none but these."""
        made, names = groups(neurons, scores, metric=METRIC), [scores.classes[c] for c in failing]
        among = {"groups": made.serving(names), "groups, only": made.only(names)}
        return {arm: self.affordable(neurons, scores, failing, slice_) for arm, slice_ in among.items()}

    # -- scenarios ------------------------------------------------------------------------------------------------
    def scenarios(self, neurons: Neurons, task: Task) -> Iterator[Scenario]:
        """Make all that the network has to be adapted to."""
        settings, model, classes = self.settings, neurons.model, len(task.classes)
        original: Any = limit(task.train, settings.new_samples, seed=self.seed)
        test: Any = task.test
        drawn = random.Random(self.seed).sample(range(classes), max(1, round(SOME * classes)))
        every = [(name, "", range(classes)) for name in self.network.shifts]
        for name, suffix, of in (*every, *((name, FAILING, drawn) for name in self.network.partial)):
            new, held_out = (
                only_of(of, images, shifted(name, model, images, epsilon=self.network.epsilon, seed=self.seed + number))
                for number, images in enumerate((original, test))
            )
            yield Scenario(name + suffix, neurons, original, new, held_out)
        for points in self.network.points:
            for mutant in range(settings.mutants):
                hurt = neurons.on(damaged(model, task, points, seed=1000 * self.seed + mutant))
                yield Scenario(f"damage {points:.0%}", hurt, original, original, test)

    # -- arms -----------------------------------------------------------------------------------------------------
    def adapted(
        self,
        healthy: Neurons,
        scenario: Scenario,
        task: Task,
        slices: Mapping[str, Slice],
        failing: Sequence[int],
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Adapt a network by every arm and score it on the held-out new samples and on the clean test images."""
        neurons, model, every = scenario.neurons, scenario.neurons.model, range(len(task.classes))
        old, new = (inputs_of(images, device_of(model)) for images in (scenario.original, scenario.new))
        blocks = deeparc_slice(layer_similarity(healthy, old, model, new), neurons.full())

        def only(slice_: Slice, classes: Sequence[int] = ()) -> Partial:
            return Partial(neurons, slice_, classes=classes, batch_statistics=True)

        budget = only(slices["critical"]).param_fraction
        generator, widths = torch.Generator().manual_seed(self.seed), neurons.full().layers
        chance = {layer: torch.rand(width, generator=generator) for layer, width in widths.items()}

        def some(point: float) -> Slice:
            return Slice({layer: of < point for layer, of in chance.items()})

        drawn = {
            "control: random": largest(neurons, some, self.settings.param_fraction),
            **{f"control: as wide as {arm}": outside_first(slices[arm], chance) for arm in ("critical", "groups")},
        }
        networks: dict[str, Callable[[], nn.Module]] = {
            "full fine-tuning": lambda: model,
            "last layer": lambda: only(neurons.none(), every),
            "DeepArc": lambda: only(blocks),
            "low-rank adapters": lambda: LowRank(model, param_fraction=budget, seed=self.seed),
            **{arm: partial(only, slices[arm], failing if arm == "groups, only" else ()) for arm in OURS},
            **{arm: partial(only, slice_) for arm, slice_ in drawn.items()},
        }
        every_slice = {**slices, **drawn}
        shared = {arm: len(of & slices["critical"]) / max(1, len(of)) for arm, of in every_slice.items()}

        def scores(network: nn.Module) -> dict[str, float]:
            tests = {"new_accuracy": replace(task, test=scenario.held_out), "clean_accuracy": task}
            return {name: accuracy(network, test).overall for name, test in tests.items()}

        yield "not adapted", scores(model)
        settings = replace(self.training, epochs=self.settings.epochs, batch_size=64, optimizer="adamw")
        for arm, make in networks.items():
            network, tried = make(), {}
            for rate in (*self.network.rates, *self.settings.learning_rates):
                training = replace(settings, learning_rate=rate)
                tried[rate] = adapt(network, task, scenario.new, replay=self.settings.replay, training=training)
            rate, best = max(tried.items(), key=lambda item: item[1].best["validation_accuracy"])
            merged = best.model.merged() if isinstance(best.model, Computed) else best.model
            log = {key: [row[key] for row in best.log] for key in ("steps", "seconds")}
            log["seconds"] = list(accumulate(log["seconds"]))
            log |= {f"validation_{side}": [row[f"{side}_accuracy"] for row in best.log] for side in ("new", "clean")}
            about = {"param_fraction": best.about["param_fraction"], "learning_rate": rate, "best_epoch": best.kept}
            about["shared"] = shared.get(arm)
            yield arm, {**scores(merged), **about, **log}


def largest(neurons: Neurons, make: Callable[[float], Slice], param_fraction: float) -> Slice:
    """Return the largest slice that `make` gives for a point in (0, 1] whose neurons have so few parameters."""

    most = param_fraction * sum(parameter.numel() for parameter in neurons.model.parameters())

    def too_large(step: int) -> bool:
        return moving_parameters(neurons, make(step / 100)) > most

    return make(max(1, bisect_left(range(101), True, lo=1, key=too_large) - 1) / 100)


def outside_first(slice_: Slice, chance: Mapping[str, Tensor]) -> Slice:
    """Return as many neurons of every layer as a slice has, by chance in [0, 1), those outside it first.

    >>> slice_ = Slice({"conv": torch.tensor([True, True, False])})
    >>> outside_first(slice_, {"conv": torch.tensor([0.1, 0.2, 0.0])})["conv"]
    tensor([False,  True,  True])
    """
    masks = {}
    for layer, mask in slice_.masks.items():
        first = (chance[layer] - mask.float()).argsort(descending=True, stable=True)[: int(mask.sum())]
        masks[layer] = torch.zeros_like(mask).index_fill_(0, first, True)
    return Slice(masks)


def only_of(classes: Sequence[int], images: Images, changed: Images) -> Images:
    """Return images of which those of some classes are changed."""
    chosen = torch.isin(images.labels, torch.tensor([*classes]))
    return replace(images, images=torch.where(chosen[:, None, None, None], changed.images, images.images))


def classes_that_fail(healthy: Neurons, scenario: Scenario, task: Task) -> list[int]:
    """Return the classes that lose at least the mean of accuracy on the new training samples."""
    pairs = (healthy.model, scenario.original), (scenario.neurons.model, scenario.new)
    before, after = (accuracy(model, replace(task, validation=images), "validation") for model, images in pairs)
    lost = [(was or 0.0) - (now or 0.0) for was, now in zip(before.per_class, after.per_class, strict=True)]
    return [label for label, value in enumerate(lost) if value >= fmean(lost) - 1e-9]


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
            at |= {"mean": (row["new_accuracy"] + row["clean_accuracy"]) / 2, "validation": None}
            if arm != "not adapted":
                at["validation"] = fmean(row[f"validation_{side}"][row["best_epoch"]] for side in ("new", "clean"))
            rows.append({**row, **at, "reached": float(epoch is not None) if tried else None})
    return {**run, "rows": rows}


def write_page(result: dict[str, Any], path: Path) -> str:
    """Write the answer, and two tables per network: means over the scenarios, and the accuracies in each of them."""
    settings, runs = result["manifest"]["settings"], list(map(with_targets, result["runs"]))
    text = (
        f"Each arm is trained on {settings['new_samples']} new samples and {settings['replay']:g} old ones per new one "
        f"for {settings['epochs']} epochs; learning rate and epoch are those of the best mean accuracy on "
        "held-back new samples and clean validation images. Test accuracy in percent, on held-out new samples and on "
        f"the clean test set; damage leaves images as they are, *{FAILING.strip()}* changes those of {SOME:.0%} of the "
        "classes. A class fails that loses at least as much training accuracy as classes do on average. *Shared* is "
        "the fraction of the neurons that are *critical* too: layers that are trained nearly whole leave a control "
        "as wide little choice. Steps and seconds are those to nine tenths of the gain that full fine-tuning makes on "
        "new validation samples, where it makes any and an arm gets there. First the mean over the scenarios, then "
        "mean ± standard deviation over the seeds."
    )
    panels = {
        name: {arm: [mean_curve(run, arm) for run in own] for arm in DRAWN} for name, own in by_network(runs).items()
    }
    title = "Re-adaptation, validation; mean ± deviation over the seeds"
    picture = draw(path.with_suffix(".png"), panels, x="epoch", y="mean of new and clean accuracy, %", title=title)
    about: dict[str, Any] = {"answer": answer(runs), "picture": picture, "text": [text], "arms": ARMS}
    own = partial(section, settings["learning_rates"])
    return page("Re-adaptation", {**result, "runs": runs}, section=own, **about)


def answer(runs: Runs) -> str:
    """Return the first line of the page: of our arms that with the best mean on validation images."""

    def of(arm: str, key: str, ending: str = "") -> float:
        rows = (row for run in runs for row in found(run["rows"], arm=arm) if row["scenario"].endswith(ending))
        return 100 * (mean(row[key] for row in rows) or 0.0)

    def both(arm: str, ending: str = "") -> str:
        return f"{of(arm, 'new_accuracy', ending):.1f} / {of(arm, 'clean_accuracy', ending):.1f}"

    best = {ending: max(OURS, key=lambda arm: of(arm, "validation", ending)) for ending in ("", FAILING)}
    others = ("full fine-tuning", "low-rank adapters", "control: random", "control: as wide as critical")
    parts = [
        f"{where} {', '.join(f'{arm} {both(arm, ending)}' for arm in (best[ending], *others))}"
        for where, ending in (("over all scenarios", ""), ("where only some classes change", FAILING))
    ]
    share = of(best[""], "param_fraction")
    return f"New / clean test accuracy, training {share:.0f} % of the parameters: {'; '.join(parts)}."


FIGURES = {
    "new samples": figure("rows", "new_accuracy"),
    "clean": figure("rows", "clean_accuracy"),
    "mean": figure("rows", "mean"),
    "parameters trained": figure("rows", "param_fraction"),
    "shared": figure("rows", "shared"),
    "target reached": figure("rows", "reached"),
    "steps": figure("rows", "steps", percent=False),
    "seconds": figure("rows", "seconds", percent=False),
}


def section(rates: Sequence[float], runs: Runs, network: Run) -> list[str]:
    """Write the means over the scenarios of one network, and each scenario."""
    arms = [(arm, {"arm": arm}) for arm in ARMS]
    rates = [*network["rates"], *rates]
    full = [row["learning_rate"] for run in runs for row in found(run["rows"], arm="full fine-tuning")]
    tried = (
        f"Learning rates {', '.join(f'{rate:g}' for rate in rates)}; full fine-tuning took the lowest in "
        f"{full.count(min(rates))} of {len(full)} cases, the highest in {full.count(max(rates))}."
    )

    def both(scenario: str) -> Cell:
        sides = [figure("rows", f"{side}_accuracy", scenario=scenario) for side in ("new", "clean")]
        return lambda runs, row: " / ".join(side(runs, row) for side in sides)

    scenarios = {row["scenario"]: both(row["scenario"]) for row in runs[0]["rows"]}
    return [tried, table(runs, arms, FIGURES, corner="arm"), table(runs, arms, scenarios, corner="new / clean")]


def mean_curve(run: Run, arm: str) -> Curve:
    """Return the mean of both accuracies over the epochs, averaged over the scenarios, in percent."""
    rows = found(run["rows"], arm=arm)
    epochs = zip(*(row[f"validation_{side}"] for row in rows for side in ("new", "clean")), strict=True)
    return [(float(epoch), 100 * fmean(values)) for epoch, values in enumerate(epochs)]


BENCHMARK = Benchmark("readapt", SETTINGS, Readapting, write_page)
