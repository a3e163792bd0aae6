"""Incremental development (NeuSemSlice, arXiv 2407.20281, fourth question): a network learns more classes.

Ours stands beside naive retraining, replay, EWC, LwF, DeepArc, a random slice, a network of its own for the new
classes, and training on everything at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Data
from ..semantic import Rule, contributions, slices_from
from ..slices import Slice
from ..use.controls import random_like
from ..use.evaluate import accuracy, accuracy_of, device_of, predict_logits
from ..use.extend import extend
from ..use.extended import Extended, joint_data, remembered
from ..use.extract import extract
from ..use.settle import settle
from .continual import by_task, learned
from .experiment import BENCHES, Bench, Network, Part
from .extend_page import page


@dataclass(frozen=True)
class Settings:
    """One scale of the bench."""

    networks: tuple[Network, ...]
    seeds: int
    settle_epochs: int
    samples_per_class: int  # for the contributions
    metrics: tuple[str, ...] = ("taylor",)
    shares: tuple[float, ...] = (0.3, 0.5, 0.7)  # critical neurons of every layer
    restarts: tuple[bool, ...] = (True,)  # whether the others start anew; the best of all is used, on validation
    replay: float = 0.1
    known: int = 5  # classes
    per_task: int = 2  # classes of each step of the chain
    chain_share: float = 0.3
    learning_rate: float = 0.05
    settle_learning_rate: float = 0.02
    rates: tuple[float, ...] = (0.01,)  # of the rivals, beside the first; the best on validation is used
    ewc_weights: tuple[float, ...] = (100.0, 1000.0)  # likewise
    lwf_weights: tuple[float, ...] = (0.5, 2.0)
    fisher_images: int = 500
    similarity_images: int = 512
    seed: int = 0


SETTINGS = {
    "smoke": Settings(
        (Network("digits", "convnet", 0.25, epochs=2),),
        seeds=1,
        settle_epochs=1,
        samples_per_class=16,
        shares=(0.5,),
        rates=(),
        ewc_weights=(100.0,),
        lwf_weights=(1.0,),
        fisher_images=20,
        similarity_images=64,
        per_task=5,
    ),
    "cpu": Settings(
        (
            Network("mnist", "lenet", 1.0, epochs=5, train_images=10_000, validation_images=1_000),
            Network("fashion-mnist", "convnet", 0.5, epochs=6, train_images=6_000, validation_images=1_000),
            Network("cifar10", "convnet", 0.5, epochs=6, train_images=8_000, validation_images=1_000),
        ),
        seeds=3,
        settle_epochs=3,
        samples_per_class=128,
    ),
    "paper": Settings(
        (
            Network("mnist", "lenet", 1.0, epochs=20),
            Network("fashion-mnist", "convnet", 1.0, epochs=40),
            Network("cifar10", "resnet20", 1.0, epochs=100),
            Network("cifar10", "resnet18", 1.0, epochs=100),
            Network("cifar10", "vgg16", 1.0, epochs=100),
        ),
        seeds=3,
        settle_epochs=20,
        samples_per_class=256,
        metrics=("avg", "var", "ens", "taylor"),
        restarts=(True, False),
    ),
}


@dataclass(frozen=True)
class _Start:
    """A network of the known classes, the neurons it will answer with them through, and whether others start anew."""

    model: nn.Module
    critical: Slice
    restart: bool = True


@dataclass(frozen=True)
class _Variant:
    """A choice of critical neurons and what came of it; `validation` is the mean accuracy on known and new classes."""

    metric: str
    share: float
    start: _Start
    extended: Extended
    validation: float


@dataclass(frozen=True)
class Extending(Part):
    """One network that learns more classes in every way."""

    def result(self) -> dict[str, Any]:
        started = time.perf_counter()
        known, new = self.tasks((self.settings.known, len(self.data.classes) - self.settings.known))
        base = self.trained(known)
        variants = self.variants(base, known, new)
        best = max(variants, key=lambda found: found.validation)
        random = self.settled(base, random_like(best.start.critical, seed=self.seed), known)
        random = replace(random, restart=best.start.restart)
        as_found = replace(best.start, model=base)
        arms = {
            "ours": self.scores(best.extended, best.start, known, new),
            "ours, bias": self.scores(best.extended.calibrated(known, new), best.start, known, new),
            "ours, replay": self.extended_scores(best.start, known, new, replay=True),
            "control: random slice": self.extended_scores(random, known, new),
            "control: random slice, replay": self.extended_scores(random, known, new, replay=True),
            "ours, slice as found": self.extended_scores(as_found, known, new),
            **self.rivals(base, known, new),
        }
        self.note("a chain of small tasks")
        return {
            "train_images": len(self.data.train),
            "epochs": self.network.epochs,
            "whole": accuracy(base, known).overall,
            "variants": [self.variant_scores(base, found, known, new) for found in variants],
            "chosen": {"metric": best.metric, "share": best.share, "restart": best.start.restart},
            "arms": arms,
            "chain": list(self.chain(best.start.restart)),
            "seconds": time.perf_counter() - started,
        }

    # -- data and first training --------------------------------------------------------------------------------
    def tasks(self, sizes: Iterable[int]) -> list[Data]:
        """Divide the classes, in their order, into tasks of these sizes."""
        names, found = iter(self.data.classes), []
        for size in sizes:
            found.append(self.data.restrict([next(names) for _ in range(size)]))
        return found

    # -- ours ---------------------------------------------------------------------------------------------------
    def variants(self, base: nn.Module, known: Data, new: Data) -> list[_Variant]:
        """Settle and extend with every metric and share."""
        settings, made = self.settings, []
        options: dict[str, Any] = {"samples_per_class": settings.samples_per_class, "seed": self.seed}
        scores = contributions(base, known, metric=settings.metrics, **options, **self.running)
        for metric in settings.metrics:
            for share in settings.shares:
                critical = slices_from(scores, Rule(metric, "global", share=share)).critical
                start = self.settled(base, critical, known)
                for restart in settings.restarts:
                    start = replace(start, restart=restart)
                    extended = self.extended(start, known, new)
                    right = [
                        accuracy(extended.network(number), task, split="validation").overall
                        for number, task in enumerate((known, new))
                    ]
                    made.append(_Variant(metric, share, start, extended, sum(right) / 2))
        return made

    def variant_scores(self, base: nn.Module, found: _Variant, known: Data, new: Data) -> dict[str, Any]:
        """Score a choice of critical neurons on test images, step by step."""
        return {
            **{"metric": found.metric, "share": found.share, "restart": found.start.restart},
            "validation": found.validation,
            "found": accuracy(self.cut(_Start(base, found.start.critical)), known).overall,
            "settled": accuracy(self.cut(found.start), known).overall,
            "known": accuracy(found.extended.network(0), known).overall,
            "new": accuracy(found.extended.network(1), new).overall,
        }

    def cut(self, start: _Start) -> nn.Module:
        """Return the network that answers with the known classes before extending."""
        return extract(start.model, start.critical, self.data.example.to(device_of(start.model)))

    def settled(self, model: nn.Module | Extended, critical: Slice, task: Data) -> _Start:
        """Train the critical neurons to answer alone."""
        self.note(f"{critical.neuron_retention:.0%} of the neurons settle on {len(task.classes)} classes")
        rates = {"epochs": self.settings.settle_epochs, "learning_rate": self.settings.settle_learning_rate}
        return _Start(settle(model, critical, task, **{**self.training, **rates}).model, critical)

    def extended(self, start: _Start, known: Data, new: Data, *, replay: bool = False) -> Extended:
        self.note(f"{1 - start.critical.neuron_retention:.0%} of the neurons learn {len(new.classes)} classes")
        memory = remembered(known, self.settings.replay, seed=self.seed) if replay else None
        names, how = known.classes, {"restart": start.restart, "replay": memory, **self.training}
        return extend(start.model, start.critical, new, classes=names, **how)

    def extended_scores(self, start: _Start, known: Data, new: Data, *, replay: bool = False) -> dict[str, float]:
        return self.scores(self.extended(start, known, new, replay=replay), start, known, new)

    def scores(self, extended: Extended, start: _Start, known: Data, new: Data) -> dict[str, float]:
        """Score both readings on the test images, and whether the known scores are bit for bit what they were."""
        joint = joint_data(known, new)
        before, after = (predict_logits(network, known) for network in (self.cut(start), extended.network(0)))
        right = [accuracy_of(logits, known.test.labels).overall for logits in (before, after)]
        return {
            "known": right[1],
            "kept": right[1] / right[0],
            "identical": float(torch.equal(before, after)),
            "new": accuracy(extended.network(1), new).overall,
            **self.not_given(predict_logits(extended.joined(), joint), joint.test.labels),
        }

    def not_given(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Score logits over all classes [n, C + k]."""
        is_known = labels < self.settings.known
        parts = {"all": is_known | True, "all_known": is_known, "all_new": ~is_known}
        return {name: accuracy_of(logits[mask], labels[mask]).overall for name, mask in parts.items()}

    def rivals(self, base: nn.Module, known: Data, new: Data) -> dict[str, dict[str, float]]:
        """Score the other ways, the network for all classes, and that for the new classes alone."""
        settings, joint = self.settings, joint_data(known, new)
        made = learned(
            base,
            known,
            new,
            ewc_weights=settings.ewc_weights,
            lwf_weights=settings.lwf_weights,
            fisher_images=settings.fisher_images,
            similarity_images=settings.similarity_images,
            rates=settings.rates,
            say=self.note,
            **self.training,
        )
        made["upper bound: joint"] = self.trained(joint)
        first, before, figures = len(known.classes), accuracy(base, known).overall, {}
        for name, model in made.items():
            logits = predict_logits(model, joint)
            known_given, new_given = by_task(logits, joint.test.labels, first)
            figures[name] = {"known": known_given, "new": new_given, **self.not_given(logits, joint.test.labels)}
            if not name.startswith("upper"):
                figures[name]["kept"] = known_given / before
        return {**figures, "scratch": {"new": accuracy(self.trained(new), new).overall}}

    def chain(self, restart: bool) -> Iterator[dict[str, Any]]:
        """Learn the classes a few at a time; each task adds a share of critical neurons, until none is left."""
        settings, size = self.settings, self.settings.per_task
        tasks = self.tasks([size] * (len(self.data.classes) // size))
        model, critical = self.trained(tasks[0]), None
        state = Extended.start(model, tasks[0].classes, tasks[0].example.to(device_of(model)))
        for number, task in enumerate(tasks):
            if number:
                assert critical is not None
                state = extend(state, critical, task, restart=restart, **self.training)
            options: dict[str, Any] = {
                "samples_per_class": settings.samples_per_class,
                "seed": self.seed,
                "correct_only": False,
            }
            network = state.network()
            found = contributions(network, task, **options, **self.running)
            added = slices_from(found, Rule("taylor", "global", share=settings.chain_share)).critical
            critical = added if critical is None else critical | added
            state = state.on(self.settled(state, critical, task).model)
            answers = replace(state, tasks=(*state.tasks[:-1], replace(state.tasks[-1], part=critical)))
            yield {
                "classes": list(task.classes),
                "learned": accuracy(network, task).overall,
                "neuron_retention": critical.neuron_retention,
                "tasks": [accuracy(answers.network(i), t).overall for i, t in enumerate(tasks[: number + 1])],
            }
            if not ~critical:
                return


BENCHES.register("extend")(Bench("extend", SETTINGS, Extending, page))
