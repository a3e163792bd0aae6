"""Slicing precision (NeuSemSlice, arXiv 2407.20281, first question): accuracy of networks held to critical neurons.

Three slicers, five metrics and ten operating points each, without any training after the cut, beside random slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.find import find_neurons
from ..core.neurons import Neurons
from ..data import Data
from ..semantic import METRICS, Contributions, Rule, Similarity, contributions, prefix_similarity, slices_from
from ..slices import Slice
from ..use.controls import random_like
from ..use.evaluate import accuracy, device_of
from ..use.extract import extract, retention
from .experiment import BENCHES, Bench, Network, Part
from .slicing_page import page

POSITIONS = {"mean": "means", "all": "maps"}
SLOPED = "taylor"  # with it a theta that falls with depth is tried
SHARES = tuple(n / 10 for n in range(1, 11))
THETAS = (0.6, 0.75, 0.85, *(n / 100 for n in range(90, 100)))  # the published ten, and three below


@dataclass(frozen=True)
class Settings:
    """One scale of the bench."""

    networks: tuple[Network, ...]
    scored_validation_images: int | None  # for every slice; None is all
    scored_test_images: int | None
    samples_per_class: int
    seeds: int
    learning_rate: float = 0.05
    shares: tuple[float, ...] = SHARES
    thetas: tuple[float, ...] = THETAS
    seed: int = 0


SETTINGS = {
    "smoke": Settings(
        (Network("digits", "lenet", 0.5, epochs=2), Network("digits", "convnet", 0.25, epochs=2)),
        scored_validation_images=None,
        scored_test_images=None,
        samples_per_class=16,
        seeds=1,
        shares=(0.3, 0.6, 0.9),
        thetas=(0.9, 0.95, 0.99),
    ),
    "cpu": Settings(
        (
            Network("mnist", "lenet", 1.0, epochs=5, train_images=20_000),
            Network("fashion-mnist", "convnet", 0.5, epochs=6, train_images=20_000),
            Network("cifar10", "resnet20", 1.0, epochs=8, train_images=20_000),
            Network("cifar10", "vgg16", 0.5, epochs=8, train_images=20_000),
        ),
        scored_validation_images=500,
        scored_test_images=1_000,
        samples_per_class=128,
        seeds=3,
    ),
    "paper": Settings(
        (
            Network("mnist", "lenet", 1.0, epochs=20),
            Network("fashion-mnist", "convnet", 1.0, epochs=60),
            Network("cifar10", "resnet20", 1.0, epochs=160),
            Network("cifar10", "resnet18", 1.0, epochs=160),
            Network("cifar10", "vgg16", 1.0, epochs=160),
            Network("cifar100", "resnet18", 1.0, epochs=160),
        ),
        scored_validation_images=None,
        scored_test_images=None,
        samples_per_class=256,
        seeds=3,
    ),
}


@dataclass(frozen=True)
class Slicing(Part):
    """One trained network, held to slices of every kind and size."""

    def result(self) -> dict[str, Any]:
        data, count = self.data, self.settings.samples_per_class
        model = self.trained(data, folder=self.folder)
        scores = contributions(
            model, data, metric=METRICS.names(), samples_per_class=count, seed=self.seed, **self.running
        )
        similarity = {p: prefix_similarity(model, data, scores, positions=p, **self.running) for p in POSITIONS}
        neurons = find_neurons(model, data.example.to(device_of(model)))
        counts = {"validation": self.settings.scored_validation_images, "test": self.settings.scored_test_images}
        scored = data.limit(**counts, seed=self.settings.seed)
        points = [
            {"slicer": slicer, "metric": metric, "point": point, **measure(model, neurons, part, scored)}
            for slicer, metric, point, part in self.slices(scores, similarity, neurons)
        ]
        return {"whole": measure(model, neurons, neurons.full(), scored), "points": points}

    def slices(
        self, scores: Contributions, similarity: dict[str, Similarity], neurons: Neurons
    ) -> Iterator[tuple[str, str, float, Slice]]:
        """Yield slicer, metric, operating point and slice."""
        for metric in scores.metrics:
            for point in self.settings.shares:
                for slicer in ("global", "category"):
                    yield slicer, metric, point, slices_from(scores, Rule(metric, slicer, share=point)).critical
                rule = Rule(metric, "semantic", criterion="mass", theta=point, slope=0.0)
                yield "semantic, mass", metric, point, slices_from(scores, rule).critical
            for point in self.settings.thetas:
                for name, found in similarity.items():
                    rule = Rule(metric, "semantic", theta=point, slope=0.0, positions=name)
                    critical = slices_from(scores, rule, found).critical
                    yield f"semantic, CKA of {POSITIONS[name]}", metric, point, critical
                yield "control: random, widths of the last", metric, point, random_like(critical, seed=self.seed)
                if metric == SLOPED:
                    sloped = slices_from(scores, Rule(metric, theta=point), similarity["all"]).critical
                    yield "semantic, CKA of maps, sloped", metric, point, sloped
            self.note(f"{metric} done")
        for point in self.settings.shares:
            yield "control: random", "-", point, neurons.random(point, seed=self.seed)


def measure(model: nn.Module, neurons: Neurons, part: Slice, data: Data) -> dict[str, float]:
    """Return compression (share of masked parameters), neuron retention and accuracies of a slice."""
    example = data.example.to(device_of(model))
    small = extract(model, part, example, neurons=neurons)  # computes what the masked network does, faster
    return {
        "compression": 1 - retention(model, neurons, part).param,
        "neuron_retention": part.neuron_retention,
        **{split: accuracy(small, data, split=split).overall for split in ("validation", "test")},
    }


BENCHES.register("slicing")(Bench("slicing", SETTINGS, Slicing, page))
