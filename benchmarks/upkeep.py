"""Maintenance of a sentence encoder: it learns a kind of question, adapts to changed questions, and is compressed.

The tasks of NeuSemSlice (arXiv 2407.20281) on heads and hidden units, each beside its controls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import torchslice as ts
from torchslice import Slice, accuracy, judge, readapt, restructure
from torchslice.cut.widen import grow, last_wire
from torchslice.data import Task, Texts, joined
from torchslice.find.semantic import PerLayer
from torchslice.graph.neurons import Neurons
from torchslice.maintain import adapt, top_by_score_per_parameter

from .baselines import mixed, with_bias
from .experiment import Benchmark, neurons_of
from .tables import Cell, Run, Runs, figure, page, table
from .text import SIX, TINY, Dividing
from .text import Settings as Scale

ARMS = {
    "extend": {
        "critical neurons kept": "those that contribute most stay; the others learn the new kind",
        "control: random neurons kept": "as many random neurons of every layer stay",
        "all neurons, the same questions": "nothing stays: fine-tuning on the new kind and as many old questions",
        "upper bound: joint": "fine-tuning on all questions",
    },
    "readapt": {
        "not adapted": "the network as it was",
        "all neurons": "full fine-tuning, but for the embeddings",
        "critical neurons": "those that contribute most per parameter",
        "control: random neurons": "as many random neurons of every layer",
        "last layer": "the rows of the logits",
    },
    "restructure": {
        "whole": "neurons with the least contributions leave, step by step",
        "slice": "first all but the critical neurons leave at once",
        "control: random slice": "first as many random neurons leave at once",
    },
}


@dataclass(frozen=True)
class Settings(Scale):
    """One scale of the benchmark: fractions of neurons and parameters, and how long is trained."""

    critical: float = 0.5  # of the neurons of every layer
    replay: float = 0.1  # of the known questions
    param_fraction: float = 0.1  # embeddings are half of all parameters
    new_samples: int = 300
    mac_retention: float = 0.4
    retraining_texts: int | None = 800
    epochs: int = 3
    rates: tuple[float, ...] = (1e-4, 5e-4, 5e-3)  # the best on validation questions counts, for every arm


SETTINGS = {
    "smoke": Settings((TINY,), 1, 8, mac_retention=0.8, epochs=1, rates=(3e-3,)),
    "cpu": Settings((SIX,), samples_per_class=64),
    "paper": Settings((replace(SIX, train_images=None),), retraining_texts=None),
}


@dataclass(frozen=True)
class Upkeep(Dividing):
    """One encoder that knows all kinds of questions but one; the largest, then the second, and so on over the seeds."""

    def result(self) -> dict[str, Any]:
        by_size = self.task.train.labels.bincount().argsort(descending=True, stable=True)
        added = self.task.classes[by_size[self.seed % len(by_size)]]
        known = self.task.restrict([name for name in self.task.classes if name != added])
        five, neurons = replace(self, task=known), neurons_of(self.new(known), known)
        five.train(neurons.model, "standard", epochs=self.network.epochs)
        scores = self.contributions(neurons, known, metric="taylor")
        mean = {layer: of.mean(0) for layer, of in scores["taylor"].items()}
        critical = PerLayer(self.settings.critical).choose(scores).critical
        return {
            "added": added,
            "accuracy": accuracy(neurons.model, known).overall,
            "extend": list(self.extended(neurons, known, self.task.restrict([added]), critical)),
            "readapt": list(self.readapted(neurons, known, mean)),
            "restructure": list(self.restructured(neurons, known, critical, mean)),
        }

    def tuning(self, rate: float, epochs: int) -> ts.Training:
        """Return the settings of a training after the first one."""
        return self.network.training(self.training, rate, epochs=epochs)

    def extended(self, neurons: Neurons, known: Task, new: Task, critical: Slice) -> Iterator[dict[str, Any]]:
        """Teach a network a further kind; score it on all, the task not given."""
        both, first, settings = joined(known, new), len(known.classes), self.settings
        labels = both.test.labels
        grown = grow(neurons, {last_wire(neurons, neurons.head[0]): 1}, seed=self.seed)
        kept = dict(zip(ARMS["extend"], (critical, judge.random_like(critical, seed=self.seed)), strict=False))

        def learned(arm: str, rate: float) -> nn.Module:
            training = self.tuning(rate, settings.epochs)
            if arm in kept:
                options: dict[str, Any] = {"known": known, "replay": settings.replay, "training": training}
                return ts.extend(neurons, new, kept[arm], **options).joined()
            seen = both if "joint" in arm else mixed(known, new, settings.replay, self.seed)
            return ts.finetune(grown, seen, training).model

        for arm in ARMS["extend"]:
            self.note(f"extend: {arm}")
            tried = [with_bias(learned(arm, rate), both, first) for rate in settings.rates]
            logits, _ = max(tried, key=lambda found: found[1])
            old, fresh = (judge.accuracy_of(logits[of], labels[of]).overall for of in (labels < first, labels >= first))
            yield {"arm": arm, "old": old, "new": fresh, "mean": (old + fresh) / 2}

    def readapted(self, neurons: Neurons, task: Task, mean: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
        """Adapt a network to questions without their first word, such as Who or What."""
        settings, all_neurons = self.settings, neurons.full()
        few, held_out = task.limit(train=settings.new_samples, seed=self.seed), beheaded(task, task.test)
        critical = top_by_score_per_parameter(neurons, mean, settings.param_fraction)
        slices = {
            "critical neurons": critical,
            "control: random neurons": judge.random_like(critical, seed=self.seed),
            "last layer": all_neurons - all_neurons,
        }

        def adapted(arm: str, rate: float) -> ts.Outcome:
            training, new = self.tuning(rate, settings.epochs), beheaded(task, few.train)
            if arm == "all neurons":
                return adapt(neurons.model, task, new, training=training)
            return readapt(neurons, task, slices[arm], new, classifier=arm == "last layer", training=training)

        for arm in ARMS["readapt"]:
            self.note(f"readapt: {arm}")
            tried = [adapted(arm, rate) for rate in settings.rates if arm != "not adapted"]
            best = max(tried, key=lambda made: made.best["validation_accuracy"]) if tried else None
            model = best.model if best else neurons.model
            trained = best.about["param_fraction"] if best else 0.0
            scored = {"new": replace(task, test=held_out), "clean": task}
            yield {"arm": arm, "trained": trained, **{name: accuracy(model, of).overall for name, of in scored.items()}}

    def restructured(
        self, neurons: Neurons, task: Task, critical: Slice, mean: dict[str, Tensor]
    ) -> Iterator[dict[str, Any]]:
        """Compress a network to a part of its multiply-accumulates."""
        settings, short = self.settings, task.limit(train=self.settings.retraining_texts, seed=self.seed)
        starts = (None, critical, judge.random_like(critical, seed=self.seed))
        options: dict[str, Any] = {"method": "structured", "scores": mean, "max_accuracy_loss": None}
        for arm, start in zip(ARMS["restructure"], starts, strict=True):
            self.note(f"restructure: {arm}")
            training = self.tuning(self.network.tuning_rate, 1)
            made = restructure(
                neurons, short, start, mac_retention=settings.mac_retention, training=training, **options
            )
            trainings = sum(row["step"] not in ("whole", "cut") for row in made.log)
            figures = {"macs": made.best["mac_retention"], "trainings": trainings}
            yield {"arm": arm, "test": accuracy(made.model, task).overall, **figures}


def beheaded(task: Task, texts: Any) -> Texts:
    """Return texts without their first word, where they have more than one."""
    rest = tuple(text.split(" ", 1)[-1] for text in texts.texts)
    return Texts(rest, texts.labels).like(task.preprocessing or {})


# -- the page -----------------------------------------------------------------------------------------------------
FIGURES: dict[str, dict[str, Cell]] = {
    "extend": {name: figure("extend", name) for name in ("old", "new", "mean")},
    "readapt": {name: figure("readapt", name) for name in ("new", "clean", "trained")},
    "restructure": {
        "accuracy": figure("restructure", "test"),
        "MACs": figure("restructure", "macs"),
        "trainings": figure("restructure", "trainings", percent=False),
    },
}


def write_page(result: dict[str, Any], path: Path) -> str:
    """Write the answer and a table of every task."""
    runs, settings = result["runs"], result["manifest"]["settings"]

    def value(task: str, key: str, arm: str) -> str:
        return figure(task, key)(runs, {"arm": arm})

    ours, chance, everything = (
        "critical neurons kept",
        "control: random neurons kept",
        "all neurons, the same questions",
    )
    text = [
        f"Extended by a kind of question, the network answers {value('extend', 'mean', ours)} % (mean of old and new "
        f"kinds; random neurons kept {value('extend', 'mean', chance)}, none kept "
        f"{value('extend', 'mean', everything)}, joint {value('extend', 'mean', 'upper bound: joint')}). Adapted by "
        f"its critical neurons, changed questions {value('readapt', 'new', 'critical neurons')} % (random "
        f"{value('readapt', 'new', 'control: random neurons')}, all neurons {value('readapt', 'new', 'all neurons')}).",
        "Test accuracy in percent, mean ± standard deviation over the seeds. *Extend*: known are all kinds of "
        "questions but one: the largest for the first seed, then the next. The task is not given. Critical are "
        f"{settings['critical']:.0%} of the neurons of every layer, which answer the known kinds bit for bit as before "
        f"where the task is given; {settings['replay']:.0%} of the known questions are seen again. A bias "
        "between old and new kinds is chosen on validation questions, for every arm. *Readapt*: "
        f"{settings['new_samples']} questions without their first word, beside as many clean ones; at most "
        f"{settings['param_fraction']:.0%} of all parameters, embeddings counted. *Restructure*: to "
        f"{settings['mac_retention']:.0%} of the multiply-accumulates, at one learning rate. The other rates, and all "
        "epochs, are chosen on validation questions, for every arm.",
    ]

    def section(runs: Runs, network: Run) -> list[str]:
        about = f"Before: {figure('', 'accuracy')(runs, {})} % of the known kinds."
        rows = {task: [(arm, {"arm": arm}) for arm in arms] for task, arms in ARMS.items()}
        return [about, *(table(runs, rows[task], FIGURES[task], corner=task) for task in ARMS)]

    arms = {f"{task}, {arm}": meaning for task, of in ARMS.items() for arm, meaning in of.items()}
    return page("Maintenance of a sentence encoder", result, text=text, section=section, arms=arms)


BENCHMARK = Benchmark("upkeep", SETTINGS, Upkeep, write_page)
