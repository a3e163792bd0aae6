"""Re-adaptation (NeuSemSlice, arXiv 2407.20281, third question): is it enough to train critical neurons?

Networks are adapted to adversarial samples, to corrupted images, and after damage to their weights. Every arm trains
something else in the same way, at the learning rate that is best for it on validation images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..core.find import find_neurons
from ..core.neurons import Neurons
from ..data import Data, Split
from ..semantic import Rule, contributions, slices_from
from ..slices import Slice
from ..use.controls import random_like
from ..use.evaluate import accuracy, device_of
from ..use.partial import Partial
from ..use.pruning import worthiest
from ..use.readapt import Readapted, adapt
from .experiment import BENCHES, Bench, Network, Part
from .readapt_page import page
from .rivals import LowRank, deeparc_part, layer_similarity
from .scenarios import ATTACKS, CORRUPTIONS, damaged, shifted

SHIFTS = (*ATTACKS, *CORRUPTIONS)


@dataclass(frozen=True)
class Attacked(Network):
    """A network, the attacks and corruptions it meets, and by how many grey levels attacks may move pixels."""

    epsilon: int = 0
    shifts: tuple[str, ...] = ("fgsm", "pgd", "noise", "blur", "contrast")


@dataclass(frozen=True)
class Settings:
    """One scale of the bench. Critical neurons have `share` of the parameters; `points` are those that damage costs."""

    networks: tuple[Attacked, ...]
    measured_images: int | None  # None is all; of the validation and of the test split
    new_samples: int
    samples_per_class: int
    seeds: int
    epochs: int
    points: tuple[float, ...] = (0.1, 0.3, 0.5)
    mutants: int = 1  # per seed and number of points
    share: float = 0.2
    replay: float = 1.0
    learning_rates: tuple[float, ...] = (0.005, 0.02)
    metric: str = "taylor"
    learning_rate: float = 0.05
    seed: int = 0


SETTINGS = {
    "smoke": Settings(
        (Attacked("digits", "convnet", 0.25, epochs=4, epsilon=30, shifts=("fgsm", "contrast")),),
        measured_images=None,
        new_samples=100,
        samples_per_class=16,
        seeds=1,
        epochs=1,
        points=(0.3,),
        learning_rates=(0.005,),
    ),
    "cpu": Settings(
        (
            # the toolbox takes too long for the others on two cores
            Attacked("mnist", "lenet", 1.0, epochs=5, train_images=20_000, epsilon=40, shifts=SHIFTS),
            Attacked("fashion-mnist", "convnet", 0.5, epochs=6, train_images=20_000, epsilon=12),
            Attacked("cifar10", "convnet", 0.25, epochs=10, train_images=20_000, epsilon=6),
        ),
        measured_images=1_000,
        new_samples=1_000,
        samples_per_class=128,
        seeds=3,
        epochs=5,
        points=(0.1, 0.3, 0.5),
    ),
    "paper": Settings(
        (
            Attacked("mnist", "lenet", 1.0, epochs=20, epsilon=40, shifts=SHIFTS),
            Attacked("fashion-mnist", "convnet", 1.0, epochs=60, epsilon=12, shifts=SHIFTS),
            Attacked("cifar10", "resnet18", 1.0, epochs=160, epsilon=8, shifts=SHIFTS),
            Attacked("cifar10", "vgg16", 1.0, epochs=160, epsilon=8, shifts=SHIFTS),
        ),
        measured_images=None,
        new_samples=1_000,
        samples_per_class=256,
        seeds=3,
        epochs=20,
        mutants=3,
        learning_rates=(0.0005, 0.002, 0.005, 0.02),
    ),
}


@dataclass(frozen=True)
class Scenario:
    """A network to adapt, training samples to adapt it to beside their originals, and test samples like them."""

    name: str
    model: nn.Module
    original: Split
    new: Split
    held_out: Split


@dataclass(frozen=True)
class Readapting(Part):
    """One trained network, adapted in every scenario by every arm."""

    def result(self) -> dict[str, Any]:
        settings = self.settings
        model = self.trained(self.data, folder=self.folder)
        count = settings.measured_images
        data = self.data.limit(validation=count, test=count, seed=self.seed)
        options: dict[str, Any] = {"samples_per_class": settings.samples_per_class, "seed": self.seed, **self.running}
        scores = contributions(model, data, metric=settings.metric, **options)
        neurons = find_neurons(model, data.example.to(device_of(model)))
        mean = {layer: score.mean(0) for layer, score in scores[settings.metric].items()}
        critical = worthiest(model, neurons, mean, settings.share)
        equal = slices_from(scores, Rule(settings.metric, "global", share=settings.share)).critical
        rows = []
        for scenario in self.scenarios(model, data):
            self.note(scenario.name)
            for arm, found in self.adapted(model, scenario, data, neurons, critical, equal).items():
                rows.append({"scenario": scenario.name, "arm": arm, **found})
        return {"rows": rows}

    def scenarios(self, model: nn.Module, data: Data) -> list[Scenario]:
        """Make all that the network has to be adapted to."""
        settings, seed = self.settings, self.seed
        original = data.train.limit(settings.new_samples, seed=seed)
        made = []
        for name in self.network.shifts:
            new, held_out = (
                shifted(name, model, data, split, epsilon=self.network.epsilon, seed=seed + number)
                for number, split in enumerate((original, data.test))
            )
            made.append(Scenario(name, model, original, new, held_out))
        for points in settings.points:
            for mutant in range(settings.mutants):
                hurt = damaged(model, data, points, seed=1000 * seed + mutant)
                made.append(Scenario(f"damage {points:.0%}", hurt, original, original, data.test))
        return made

    def adapted(
        self, healthy: nn.Module, scenario: Scenario, data: Data, neurons: Neurons, critical: Slice, equal: Slice
    ) -> dict[str, dict[str, Any]]:
        """Adapt a network by every arm and score it on the held-out new samples and on the clean test images."""
        model = scenario.model
        example = data.example.to(device_of(model))
        old, new = (data.normalise(split.images).to(example.device) for split in (scenario.original, scenario.new))
        blocks = deeparc_part(layer_similarity((healthy, old), (model, new), example), neurons.full())
        classes = range(len(data.classes))

        def only(part: Slice, classes: range = range(0)) -> Partial:
            return Partial(model, part, example, classes=classes, batch_statistics=True, neurons=neurons)

        budget = only(critical).param_share
        networks: dict[str, Callable[[], nn.Module]] = {
            "full fine-tuning": lambda: model,
            "last layer": lambda: only(neurons.none(), classes),
            "DeepArc": lambda: only(blocks),
            "low-rank adapters": lambda: LowRank(model, share=budget, seed=self.seed),
            "critical neurons": lambda: only(critical),
            "critical neurons, classifier": lambda: only(critical, classes),
            "critical neurons, equal shares": lambda: only(equal),
            "control: random neurons": lambda: only(random_like(critical, seed=self.seed)),
            "control: random, equal shares": lambda: only(random_like(equal, seed=self.seed)),
        }
        found = {"not adapted": self.scores(model, scenario, data)}
        for arm, make in networks.items():
            network = make()
            tried = {rate: self.tuned(network, scenario.new, data, rate) for rate in self.settings.learning_rates}
            rate, best = max(tried.items(), key=lambda item: item[1].best.mean_accuracy)
            merged = best.model.merged() if isinstance(best.model, Partial | LowRank) else best.model
            trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
            share = trained / sum(p.numel() for p in model.parameters())
            figures = {**best.to_plain(), "param_share": share, "learning_rate": rate}
            found[arm] = {**self.scores(merged, scenario, data), **figures}
        return found

    def tuned(self, network: nn.Module, new: Split, data: Data, rate: float) -> Readapted:
        settings = self.settings
        options: dict[str, Any] = {"replay": settings.replay, "epochs": settings.epochs, "learning_rate": rate}
        return adapt(network, new, data, seed=self.seed, **options, **self.running)

    def scores(self, model: nn.Module, scenario: Scenario, data: Data) -> dict[str, Any]:
        tests = {"new": replace(data, test=scenario.held_out), "clean": data}
        return {f"{name}_accuracy": accuracy(model, test).overall for name, test in tests.items()}


BENCHES.register("readapt")(Bench("readapt", SETTINGS, Readapting, page))
