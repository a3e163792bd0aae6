"""Incremental development (NeuSemSlice, arXiv 2407.20281, fourth question): a network learns more classes.

Ours stands beside naive retraining, replay, EWC, LwF, DeepArc, a random slice, a network of its own for the new
classes, and training on everything at once.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from torchslice import Slice, Training, accuracy, extend, extract, judge
from torchslice.data import Task, joined
from torchslice.find.semantic import Contributions, PerLayer, ReachTheta, groups, similarity
from torchslice.find.semantic.selection import top_fraction
from torchslice.graph.neurons import Neurons
from torchslice.maintain import Extended, settle

from .baselines import best_fit, by_task, learned, with_bias
from .experiment import Benchmark, Network, Part, Scale, neurons_of
from .tables import Run, Runs, by_network, draw, figure, found, mean, page, table

METRIC, VARIANT = "taylor", ("choice", "neuron_fraction", "restart")
CHOICES = {
    "layer": "a fraction of every layer by contribution",
    "theta": "the semantic slice of the largest theta that keeps no larger fraction of the neurons",
    "groups": "a fraction of every layer, those first whose semantic group has most classes, then by contribution",
}
NO_MEMORY, MEMORY = ("naive", "EWC", "LwF", "DeepArc"), "replay 10%"
FIGURES = {
    "arms": {"known": "known", "kept": "kept", "new": "new"}
    | {"all, not given": "all", "known, not given": "all_known", "new, not given": "all_new"},
    "variants": {"slice as found": "found", "settled": "settled", "known, after extending": "known", "new": "new"},
}
ARMS = {
    "ours": "the critical neurons settle on the known classes, the others learn the new ones; logits simply joined",
    "ours, bias": "the same; rule and bias between known and new logits chosen on validation images of both",
    "ours, replay": "the same, trained with 10 % of the images of the known classes as well",
    "control: random slice": "as ours, with a random slice that has as many neurons in every layer",
    "control: random slice, replay": "as ours, replay, with the random slice",
    "naive": "all weights learn the new classes",
    MEMORY: "all weights learn the new classes and 10 % of the images of the known ones",
    "replay 100%": "likewise, all of them",
    "EWC": "all weights learn the new classes, held where they matter to the known ones",
    "LwF": "all weights learn the new classes, the known logits are kept on their images",
    "DeepArc": "the redundant layers learn the new classes",
    "upper bound: joint": "one network trained on all classes from scratch, for twice as many epochs",
    "scratch": "a network of its own for the new classes, trained as long as the others learn them",
}


@dataclass(frozen=True)
class Settings(Scale):
    """One scale of the benchmark. Where there are several values, the best on validation is used."""

    settle_epochs: int = 3
    settle_learning_rate: float = 0.02
    neuron_fractions: tuple[float, ...] = (0.5, 0.7)  # critical neurons
    restarts: tuple[bool, ...] = (True, False)  # whether the others start anew
    replay: float = 0.1
    known: int = 5  # classes
    per_task: int = 2  # classes of each step of the chain
    chain_fraction: float = 0.3
    learning_rates: tuple[float, ...] = (0.01,)  # of every arm, beside the first
    ewc_weights: tuple[float, ...] = (100.0, 1000.0)
    lwf_weights: tuple[float, ...] = (0.5, 2.0)
    fisher_samples: int = 500
    similarity_samples: int = 512


CPU = (
    Network("mnist", "lenet", 1.0, epochs=5, train_images=10_000, validation_images=1_000),
    Network("cifar10", "fast", 0.5, epochs=6, train_images=8_000, validation_images=1_000),
)
PAPER = (
    Network("mnist", "lenet", 1.0, epochs=20),
    Network("fashion-mnist", "convnet", 1.0, epochs=40),
    *(Network("cifar10", name, 1.0, epochs=100) for name in ("fast", "resnet18", "vgg16")),
)
SMOKE: dict[str, Any] = {"settle_epochs": 1, "neuron_fractions": (0.5,), "learning_rates": (), "per_task": 5}
SMOKE |= {"ewc_weights": (100.0,), "lwf_weights": (1.0,), "fisher_samples": 20, "similarity_samples": 64}
SETTINGS = {
    "smoke": Settings((Network("digits", "convnet", 0.25, epochs=2),), 1, 16, **SMOKE),
    "cpu": Settings(CPU),
    "paper": Settings(PAPER, samples_per_class=256, settle_epochs=20, neuron_fractions=(0.3, 0.5, 0.7)),
}


@dataclass(frozen=True)
class Start:
    """A network of the known classes, the neurons it will answer with them through, and whether others start anew."""

    neurons: Neurons
    critical: Slice
    restart: bool = True


@dataclass(frozen=True)
class Extending(Part):
    """One network that learns more classes in every way."""

    def result(self) -> dict[str, Any]:
        started, settings = time.perf_counter(), self.settings
        known, new = self.tasks((settings.known, len(self.task.classes) - settings.known))
        base = neurons_of(self.trained(known), known)
        before = accuracy(base.model, known).overall
        variants = list(self.variants(base, known, new))
        chosen, start, extended = max(variants, key=lambda variant: variant[0]["validation"])
        random = self.settled(base, judge.random_like(start.critical, seed=self.seed), known)
        starts = {"ours": start, "control: random slice": replace(random, restart=start.restart)}
        arms = {"ours, bias": self.scores(extended.calibrated(known, new), start, known, new)}
        for arm, own in starts.items():
            again = extended if own is start else self.extended(own, known, new)
            arms[arm] = self.scores(again, own, known, new)
            replayed = self.extended(own, known, new, replay=settings.replay)
            arms[f"{arm}, replay"] = self.scores(replayed, own, known, new)
        arms |= self.baselines(base.model, known, new)
        self.note("a chain of small tasks")
        return {
            "train_images": len(self.task.train),
            "epochs": self.network.epochs,
            "whole": before,
            "variants": [row for row, _, _ in variants],
            "chosen": {key: chosen[key] for key in VARIANT},
            "arms": [{"arm": arm, **arms[arm], "kept": arms[arm].get("known", 0) / before or None} for arm in ARMS],
            "chain": list(self.chain(start.restart)),
            "seconds": time.perf_counter() - started,
        }

    def tasks(self, sizes: Iterable[int]) -> list[Task]:
        """Divide the classes, in their order, into tasks of these sizes."""
        names = iter(self.task.classes)
        return [self.task.restrict([next(names) for _ in range(size)]) for size in sizes]

    # -- ours -----------------------------------------------------------------------------------------------------
    def variants(self, base: Neurons, known: Task, new: Task) -> Iterator[tuple[dict[str, Any], Start, Extended]]:
        """Settle and extend by every choice and fraction, then go on with the best in the other ways to start.

        `validation` is the mean accuracy on known and new classes.
        """
        first, *others = self.settings.restarts
        found = []
        for choice, fraction, critical in self.slices(base, known):
            start = replace(self.settled(base, critical, known), restart=first)
            row = {"choice": choice, "neuron_fraction": fraction}
            row["found"] = accuracy(extract(base, critical), known).overall
            row["settled"] = accuracy(extract(start.neurons, critical), known).overall
            found.append((row, start, self.extended(start, known, new)))
        scored = [({**row, **self.figures(start, made, known, new)}, start, made) for row, start, made in found]
        yield from scored
        row, start, _ = max(scored, key=lambda variant: variant[0]["validation"])
        for restart in others:
            start = replace(start, restart=restart)
            made = self.extended(start, known, new)
            yield {**row, **self.figures(start, made, known, new)}, start, made

    def slices(self, base: Neurons, known: Task) -> Iterator[tuple[str, float, Slice]]:
        """Yield choices, fractions, and the critical neurons."""
        scores = self.contributions(base, known, metric=METRIC)
        alike = similarity(base, known, scores, progress=self.progress)
        worth = served(base, scores)
        thetas = [ReachTheta(step / 100).choose(scores, METRIC, alike).critical for step in range(1, 101)]
        for fraction in self.settings.neuron_fractions:
            count = bisect_left(thetas, True, lo=1, key=lambda slice_: slice_.neuron_retention > fraction)
            yield "layer", fraction, PerLayer(fraction).choose(scores).critical
            yield "theta", fraction, thetas[count - 1]
            yield "groups", fraction, Slice({layer: top_fraction(of, fraction) for layer, of in worth.items()})

    def figures(self, start: Start, extended: Extended, known: Task, new: Task) -> dict[str, Any]:
        """Return the accuracies of a variant, task given."""
        pairs = dict(zip(("known", "new"), zip(extended.networks(), (known, new), strict=True), strict=True))
        found = {key: accuracy(*pair).overall for key, pair in pairs.items()}
        chosen = fmean(accuracy(*pair, "validation").overall for pair in pairs.values())
        return {"restart": start.restart, **found, "validation": chosen}

    @property
    def settling(self) -> Training:
        settings = self.settings
        return replace(self.training, epochs=settings.settle_epochs, learning_rate=settings.settle_learning_rate)

    def settled(self, start: Neurons, critical: Slice, task: Task) -> Start:
        """Train the critical neurons to answer alone."""
        self.note(f"{critical.neuron_retention:.0%} of the neurons settle on {len(task.classes)} classes")
        return Start(start.on(settle(start, task, critical, training=self.settling).model), critical)

    def extended(self, start: Start, known: Task, new: Task, *, replay: float = 0.0) -> Extended:
        """Teach the other neurons the new classes, at the learning rate that is best on validation images."""
        self.note(f"{1 - start.critical.neuron_retention:.0%} of the neurons learn {len(new.classes)} classes")
        options: dict[str, Any] = {"known": known, "replay": replay, "restart": start.restart}
        tried = []
        for rate in (*self.settings.learning_rates, self.training.learning_rate):
            training = replace(self.training, learning_rate=rate)
            made = extend(start.neurons, new, start.critical, training=training, **options)
            tried.append((accuracy(made.network(), new, "validation").overall, made))
        return max(tried, key=lambda found: found[0])[1]

    def scores(self, extended: Extended, start: Start, known: Task, new: Task) -> dict[str, float]:
        """Score both readings on the test images, and whether the known logits are bit for bit what they were."""
        both, networks = joined(known, new), (extract(start.neurons, start.critical), extended.network(0))
        before, after = (judge.predict(network, known) for network in networks)
        figures = {"known": judge.accuracy_of(after, known.test.labels).overall}
        figures |= {"identical": int(torch.equal(before, after)), "new": accuracy(extended.network(1), new).overall}
        return {**figures, **self.not_given(judge.predict(extended.joined(), both), both.test.labels)}

    def not_given(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Score logits over all classes [n, C + k]."""
        is_known = labels < self.settings.known
        parts = {"all": is_known | True, "all_known": is_known, "all_new": ~is_known}
        return {name: judge.accuracy_of(logits[mask], labels[mask]).overall for name, mask in parts.items()}

    # -- the others -----------------------------------------------------------------------------------------------
    def baselines(self, base: nn.Module, known: Task, new: Task) -> dict[str, dict[str, float]]:
        """Score the other ways, the network for all classes, and that for the new classes alone."""
        both, epochs = joined(known, new), self.network.epochs
        made = learned(base, known, new, settings=self.settings, training=self.training, say=self.note)
        figures: dict[str, dict[str, float]] = {"scratch": {"new": accuracy(self.anew(new, epochs), new).overall}}
        for name, model in {**made, "upper bound: joint": self.anew(both, 2 * epochs)}.items():
            logits, _ = with_bias(model, both, len(known.classes))
            known_given, new_given = by_task(logits, both.test.labels, len(known.classes))
            figures[name] = {"known": known_given, "new": new_given, **self.not_given(logits, both.test.labels)}
        return figures

    def anew(self, task: Task, epochs: int) -> nn.Module:
        """Train a new network, at the learning rate that is best on validation images."""
        rates, training = (*self.settings.learning_rates, self.training.learning_rate), self.training
        return best_fit(
            f"a new network of {len(task.classes)} classes",
            lambda: self.new(task),
            task,
            rates,
            training=replace(training, epochs=epochs),
            score=lambda model: accuracy(model, task, "validation").overall,
            say=self.note,
        )

    def chain(self, restart: bool) -> Iterator[dict[str, Any]]:
        """Learn the classes a few at a time; each task adds a fraction of critical neurons, until none is left."""
        size = self.settings.per_task
        tasks = self.tasks([size] * (len(self.task.classes) // size))
        state = Extended.start(neurons_of(self.trained(tasks[0]), tasks[0]), None)
        critical = state.neurons.none()
        for number, task in enumerate(tasks):
            if number:
                state = extend(state, task, critical, restart=restart, training=self.training)
            network = state.network()
            scores = self.contributions(neurons_of(network, task), task, correct_only=False)
            critical = critical | PerLayer(self.settings.chain_fraction).choose(scores).critical
            state = state.on(settle(state, task, critical, training=self.settling).model)
            answers = replace(state, tasks=(*state.tasks[:-1], replace(state.tasks[-1], slice_=critical)))
            scored = enumerate(zip(answers.networks(), tasks[: number + 1], strict=True), start=1)
            yield {
                "step": number + 1,
                "classes": ", ".join(task.classes),
                "learned": accuracy(network, task).overall,
                "neuron_retention": critical.neuron_retention,
                **{f"task {i}": accuracy(*pair).overall for i, pair in scored},
            }
            if not ~critical:
                return


def served(neurons: Neurons, scores: Contributions) -> dict[str, Tensor]:
    """Return of how many classes the group of each neuron is; equals come by contribution, {layer: [N]}."""
    worth = {layer: of.mean(0).double() / of.mean(0).max().clamp(min=1e-12) / 2 for layer, of in scores[METRIC].items()}
    for group in groups(neurons, scores):
        for layer, mask in group.slice.masks.items():
            worth[layer] += len(group.classes) * mask
    return worth


# -- the page -----------------------------------------------------------------------------------------------------
def write_page(result: dict[str, Any], path: Path) -> str:
    """Write the answer and three tables per network: arms, what the choice of critical neurons does, chain of tasks."""
    settings, runs = result["manifest"]["settings"], result["runs"]
    identical = [arm["identical"] for run in runs for arm in run["arms"] if arm["identical"] is not None]
    text = (
        f"A network learns the first {settings['known']} classes, then the others. Test accuracy in percent, mean ± "
        "standard deviation over the seeds: of known and new classes where it is given which of both an image shows, "
        "then of all classes where it is not, and the two halves of that. *kept* is the known accuracy over that of "
        "the network before, for every arm. All trainings are equally long (settling: "
        f"{settings['settle_epochs']} epochs more), the upper bound twice. Every arm has the best of the same learning "
        "rates on validation images, which also choose the critical neurons, whether the others start anew, and the "
        "weights of EWC and LwF. Where it is not given, *ours, bias* and *ours, replay* have a bias between known and "
        "new logits that was chosen on validation images; the others have none, which is to their disadvantage there.",
        "Through their slice, the known classes' logits on all test images are bit for bit what they were before "
        f"extending in {sum(identical)} of {len(identical)} cases.",
    )
    chains = {name: [list(map(step_point, run["chain"])) for run in own] for name, own in by_network(runs).items()}
    title = "Accuracy on all tasks so far, each through its slice; mean ± deviation over the seeds"
    chart, panels = path.with_suffix(".png"), {"a chain of small tasks": chains}
    picture = draw(chart, panels, x="tasks learned", y="test accuracy, task given, %", title=title)
    choices = {f"critical by {name}": meaning for name, meaning in CHOICES.items()}
    about: dict[str, Any] = {"answer": answer(runs), "picture": picture, "text": text, "arms": ARMS | choices}
    return page("Extending a network by new classes", result, section=section, **about)


def answer(runs: Runs) -> str:
    """Return the first line of the page: ours beside the rivals of equal memory, the best of which is named."""
    parts = []
    for name, own in by_network(runs).items():

        def of(arm: str, key: str, own: Runs = own) -> float:
            return 100 * (mean(found(run["arms"], arm=arm)[0][key] for run in own) or 0.0)

        best = max(NO_MEMORY, key=lambda arm: of(arm, "known") + of(arm, "new"))
        sides = {
            arm: f"{of(arm, 'known'):.1f} / {of(arm, 'new'):.1f}" for arm in ("ours", best, "ours, replay", MEMORY)
        }
        parts.append(
            f"on {name.partition(' on ')[2]} ours {sides['ours']} and the best rival ({best}) {sides[best]}; with 10 % "
            f"of the known images ours {sides['ours, replay']} and replay {sides[MEMORY]}, of all classes where the "
            f"task is not given {of('ours, replay', 'all'):.1f} and {of(MEMORY, 'all'):.1f}"
        )
    return f"Accuracy on known / new classes, task given: {'; '.join(parts)}."


def step_point(step: Run) -> tuple[float, float]:
    """Return how many tasks are learned after a step, and the mean accuracy on them in percent."""
    return step["step"], 100 * (mean(value for key, value in step.items() if key.startswith("task ")) or 0)


def section(runs: Runs, network: Run) -> list[str]:
    """Write the tables of one network."""
    first, longest = runs[0], max((run["chain"] for run in runs), key=len)

    def named(variant: Run) -> str:
        others = "anew" if variant["restart"] else "kept"
        return f"{variant['neuron_fraction']:.0%} by {variant['choice']}, others {others}"

    every = [tuple(row[key] for key in VARIANT) for run in runs for row in run["variants"]]
    choices = [dict(zip(VARIANT, values, strict=True)) for values in dict.fromkeys(every)]
    chain = {"neurons in use": figure("chain", "neuron_retention"), "learned": figure("chain", "learned")}
    chain |= {f"task {step['step']}": figure("chain", f"task {step['step']}") for step in longest}
    about = (
        f"{first['train_images']:,} training images, {first['epochs']} epochs. Known classes before: "
        f"{figure('', 'whole')(runs, {})}. Critical: {'; '.join(named(run['chosen']) for run in runs)}."
    )
    arms, variants = ({heading: figure(rows, key) for heading, key in keys.items()} for rows, keys in FIGURES.items())
    return [
        about,
        table(runs, [(arm, {"arm": arm}) for arm in ARMS], arms),
        table(runs, [(named(choice), choice) for choice in choices], variants, corner="critical neurons"),
        table(runs, [(step["classes"], {"step": step["step"]}) for step in longest], chain, corner="chain: task"),
    ]


BENCHMARK = Benchmark("extend", SETTINGS, Extending, write_page)
