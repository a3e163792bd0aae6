"""Restructuring (NeuSemSlice, arXiv 2407.20281, second question): does keeping critical neurons help compression?

Four ways to remove weights, and one to remove neurons, each from the whole network, from its semantic slice, and from a
random slice with as many neurons in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.find import find_neurons
from ..semantic import Rule, contributions, prefix_similarity, slices_from
from ..slices import Slice
from ..use.controls import random_like
from ..use.evaluate import accuracy, device_of
from ..use.extract import extract
from ..use.pruning import PRUNING
from ..use.restructure import STRUCTURED, restructure
from ..use.restructured import Restructured, Step
from .experiment import BENCHES, Bench, Network, Part
from .restructure_page import ARMS, page

METRIC = "taylor"


@dataclass(frozen=True)
class Settings:
    """One scale of the bench.

    The slice is that of the smallest of `thetas` that loses at most `slice_loss` validation accuracy, untrained.
    """

    networks: tuple[Network, ...]
    retraining_images: int | None  # in every iteration; None is all
    samples_per_class: int
    seeds: int
    epochs_per_iteration: int = 1
    patience: int = 1
    param_retention: float = 0.05
    max_accuracy_loss: float = 0.01
    rate: float = 0.2
    thetas: tuple[float, ...] = (0.6, 0.75, 0.85, 0.9, 0.92, 0.94, 0.96, 0.98)
    slice_loss: float = 0.05
    learning_rate: float = 0.05
    retraining_rate: float = 0.02
    seed: int = 0


SETTINGS = {
    "smoke": Settings(
        (Network("digits", "lenet", 0.5, epochs=4),),
        retraining_images=400,
        samples_per_class=16,
        seeds=1,
        rate=0.5,
        param_retention=0.2,
    ),
    "cpu": Settings(
        (
            Network("mnist", "lenet", 1.0, epochs=5, train_images=20_000, validation_images=2_000),
            Network("fashion-mnist", "convnet", 0.5, epochs=6, train_images=20_000, validation_images=2_000),
            Network("cifar10", "convnet", 0.25, epochs=10, train_images=20_000, validation_images=2_000),
        ),
        retraining_images=4_000,
        samples_per_class=128,
        seeds=3,
    ),
    "paper": Settings(
        (
            Network("mnist", "lenet", 1.0, epochs=20),
            Network("fashion-mnist", "convnet", 1.0, epochs=60),
            Network("cifar10", "resnet18", 1.0, epochs=160),
            Network("cifar10", "vgg16", 1.0, epochs=160),
        ),
        retraining_images=None,
        samples_per_class=256,
        seeds=3,
        epochs_per_iteration=10,
        patience=2,
    ),
}


@dataclass(frozen=True)
class Restructuring(Part):
    """One trained network, compressed by every method from every start."""

    def result(self) -> dict[str, Any]:
        data, settings = self.data, self.settings
        model = self.trained(data, folder=self.folder)
        scores = contributions(
            model, data, metric=METRIC, samples_per_class=settings.samples_per_class, seed=self.seed, **self.running
        )
        similarity = prefix_similarity(model, data, scores, **self.running)
        candidates = {t: slices_from(scores, Rule(METRIC, theta=t), similarity).critical for t in settings.thetas}
        theta = self.chosen(model, candidates)
        part = candidates[theta]
        starts: dict[str, Slice | None] = {"whole": None, "slice": part, "random": random_like(part, seed=self.seed)}
        mean = {layer: score.mean(0) for layer, score in scores[METRIC].items()}
        rows = []
        for method in (*PRUNING.names(), STRUCTURED):
            for arm, start in starts.items():
                self.note(f"{method}, {ARMS[arm]}")
                given = {"scores": mean} if method == STRUCTURED else {}
                rows.append({"method": method, "arm": arm, **self.compressed(model, start, method, **given)})
        return {
            "test_accuracy": accuracy(model, data).overall,
            "theta": theta,
            "neuron_retention": part.neuron_retention,
            "rows": rows,
        }

    def chosen(self, model: nn.Module, candidates: dict[float, Slice]) -> float:
        """Return the first theta that loses little validation accuracy without training, else the last that cuts."""
        example = self.data.example.to(device_of(model))
        neurons = find_neurons(model, example)
        least = accuracy(model, self.data, split="validation").overall - self.settings.slice_loss
        cutting = [theta for theta, part in candidates.items() if len(part) < len(neurons)]
        for theta in cutting:
            small = extract(model, candidates[theta], example, neurons=neurons)
            if accuracy(small, self.data, split="validation").overall >= least:
                return theta
        return cutting[-1]

    def compressed(self, model: nn.Module, start: Slice | None, method: str, **given: Any) -> dict[str, Any]:
        """Compress within the allowed loss; then, if weights are removed, go on to the target whatever it costs."""
        settings, data = self.settings, self.data.limit(train=self.settings.retraining_images, seed=self.seed)
        options: dict[str, Any] = {
            "method": method,
            "rate": settings.rate,
            "epochs_per_iteration": settings.epochs_per_iteration,
            "learning_rate": settings.retraining_rate,
            "seed": self.seed,
            **self.running,
            **given,
        }
        limit: dict[str, Any] = {"max_accuracy_loss": settings.max_accuracy_loss, "patience": settings.patience}
        target = settings.param_retention
        within = restructure(model, start, data, param_retention=target, **limit, **options)
        path = steps_to_kept(within)
        kept, least = path[-1], path[0].validation_accuracy - settings.max_accuracy_loss - 1e-9
        row = {
            "compression": kept.compression_rate if kept.validation_accuracy >= least else 0.0,
            "test_accuracy": accuracy(within.model, self.data).overall,
            "reached": within.stopped == "target",
            "steps": within.to_plain()["steps"],
        }
        if method == STRUCTURED:
            return row
        last = within.model
        if within.stopped != "target":
            goal = target / kept.param_retention
            rest = restructure(last, None, data, param_retention=goal, max_accuracy_loss=None, **options)
            last, path = rest.model, [*path, *rest.steps[1:]]
        return {
            **row,
            "trainings": sum(step.name not in ("whole", "cut") for step in path),
            "seconds": sum(step.seconds for step in path),
            "target_test_accuracy": accuracy(last, self.data).overall,
        }


def steps_to_kept(result: Restructured) -> list[Step]:
    """Return the rows of a log up to the network that was kept."""
    names = [step.name for step in result.steps]
    return list(result.steps[: names.index(result.kept) + 1])


BENCHES.register("restructure")(Bench("restructure", SETTINGS, Restructuring, page))
