"""Re-adaptation (NeuSemSlice, arXiv 2407.20281, third question): is it enough to train critical neurons?

Networks are adapted to adversarial samples, to corrupted images, and after damage to their weights. Every arm trains
something else in the same way, at the learning rate that is best for it on validation images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from ..core.find import find_neurons
from ..core.neurons import Neurons
from ..data import Data, Split, load
from ..semantic import Rule, contributions, slices_from
from ..slices import Slice
from ..training import fit
from ..use.controls import random_like
from ..use.evaluate import accuracy
from ..use.partial import Partial
from ..use.pruning import worthiest
from ..use.readapt import Readapted, adapt
from .experiment import BENCHES, check_scale, finished_or_run, manifest, note, write_result
from .readapt_page import markdown
from .rivals import LowRank, deeparc_part, layer_similarity
from .scenarios import damaged, shifted

ARMS = {
    "not adapted": "the network as it was",
    "full fine-tuning": "all parameters, and batch-norm statistics",
    "last layer": "the rows of the class scores only",
    "DeepArc": "the layers, five or half of all, at which the similarity of old and new images drops most",
    "low-rank adapters": "low-rank additions to all weights, as many parameters as the critical neurons have",
    "critical neurons": "the neurons that contribute most per parameter, up to a share of all parameters",
    "critical neurons, classifier": "the same and the rows of the class scores",
    "critical neurons, equal shares": "the neurons that contribute most in every layer, the same share of each",
    "control: random neurons": "as many random neurons in every layer as the critical ones",
    "control: random, equal shares": "the same share of every layer",
}


@dataclass(frozen=True)
class Network:
    """What is trained before it is adapted; attacks move pixels by `epsilon` grey levels."""

    data: str
    model: str
    width: float
    epochs: int
    epsilon: int


@dataclass(frozen=True)
class Settings:
    """One scale of the bench. Critical neurons have `share` of the parameters; `points` are those that damage costs."""

    networks: tuple[Network, ...]
    train_images: int | None  # None is all
    measured_images: int | None  # of the validation and of the test split
    new_samples: int
    samples_per_class: int
    seeds: int
    epochs: int
    shifts: tuple[str, ...] = ("fgsm", "pgd", "noise", "blur", "contrast")
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
        (Network("digits", "convnet", 0.25, epochs=4, epsilon=30),),
        train_images=None,
        measured_images=None,
        new_samples=100,
        samples_per_class=16,
        seeds=1,
        epochs=1,
        shifts=("fgsm", "contrast"),
        points=(0.3,),
        learning_rates=(0.005,),
    ),
    "cpu": Settings(
        (
            Network("mnist", "lenet", 1.0, epochs=5, epsilon=40),
            Network("fashion-mnist", "convnet", 0.5, epochs=6, epsilon=12),
            Network("cifar10", "convnet", 0.25, epochs=10, epsilon=6),
        ),
        train_images=20_000,
        measured_images=1_000,
        new_samples=1_000,
        samples_per_class=128,
        seeds=3,
        epochs=5,
        shifts=("fgsm", "noise", "contrast"),
        points=(0.1, 0.3, 0.5),
    ),
    "paper": Settings(
        (
            Network("mnist", "lenet", 1.0, epochs=20, epsilon=40),
            Network("fashion-mnist", "convnet", 1.0, epochs=60, epsilon=12),
            Network("cifar10", "resnet18", 1.0, epochs=160, epsilon=8),
            Network("cifar10", "vgg16", 1.0, epochs=160, epsilon=8),
        ),
        train_images=None,
        measured_images=None,
        new_samples=1_000,
        samples_per_class=256,
        seeds=3,
        epochs=20,
        shifts=("fgsm", "pgd", "deepfool", "cw", "noise", "blur", "contrast"),
        mutants=3,
        learning_rates=(0.0005, 0.002, 0.005, 0.02),
    ),
}


@BENCHES.register("readapt")
def bench_readapt(
    scale: str,
    *,
    data_dir: str | Path | None = None,
    out: str | Path = "results",
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Adapt trained networks in every scenario by every arm.

    Finished parts in `out` are reused. Writes readapt-SCALE.json and readapt-SCALE.md there and returns the JSON.
    `seed` is the first of the seeds.
    """
    check_scale(scale)
    settings, folder = replace(SETTINGS[scale], seed=seed), Path(out)
    parts = []
    for network in settings.networks:
        data = load(network.data, data_dir, seed=seed)
        data = data.limit(train=settings.train_images, seed=seed)
        for number in range(seed, seed + settings.seeds):
            name = f"readapt-{scale}-{network.data}-{network.model}-seed{number}"
            used = {**asdict(settings), "networks": asdict(network), "seeds": number, "data_hash": data.fingerprint}
            run = _Run(settings, network, data, number, folder / name, device, progress)
            parts.append(finished_or_run(folder / f"{name}.json", used, run.result))
    command = f"torchslice bench readapt --scale {scale} --seed {seed}"
    result = {"manifest": manifest(command, asdict(settings)), "arms": ARMS, "runs": parts}
    return write_result(folder / f"readapt-{scale}", result, markdown(result))


@dataclass(frozen=True)
class Scenario:
    """A network to adapt, training samples to adapt it to beside their originals, and test samples like them."""

    name: str
    model: nn.Module
    original: Split
    new: Split
    held_out: Split


@dataclass(frozen=True)
class _Run:
    """One network and one seed."""

    settings: Settings
    network: Network
    data: Data
    seed: int
    folder: Path
    device: str
    progress: bool

    def result(self) -> dict[str, Any]:
        network, settings = self.network, self.settings
        running: dict[str, Any] = {"device": self.device, "progress": self.progress}
        torch.manual_seed(self.seed)
        arguments = {"channels": self.data.train.images.shape[1], "width": network.width}
        model = models.create(network.model, num_classes=len(self.data.classes), **arguments)
        note(f"{self.title}: training, {network.epochs} epochs", self.progress)
        options: dict[str, Any] = {"epochs": network.epochs, "learning_rate": settings.learning_rate, "seed": self.seed}
        fit(model, self.data, folder=self.folder, **options, **running)
        count = settings.measured_images
        data = self.data.limit(validation=count, test=count, seed=self.seed)
        scores = contributions(
            model, data, metric=settings.metric, samples_per_class=settings.samples_per_class, seed=self.seed, **running
        )
        neurons = find_neurons(model, data.example.to(next(model.parameters()).device))
        mean = {layer: score.mean(0) for layer, score in scores[settings.metric].items()}
        critical = worthiest(model, neurons, mean, settings.share)
        equal = slices_from(scores, Rule(settings.metric, "global", share=settings.share)).critical
        rows = []
        for scenario in self.scenarios(model, data):
            note(f"{self.title}: {scenario.name}", self.progress)
            for arm, found in self.adapted(model, scenario, data, neurons, critical, equal).items():
                rows.append({"scenario": scenario.name, "arm": arm, **found})
        return {"data": network.data, "model": network.model, "seed": self.seed, "rows": rows}

    @property
    def title(self) -> str:
        return f"{self.network.model} on {self.network.data}, seed {self.seed}"

    def scenarios(self, model: nn.Module, data: Data) -> list[Scenario]:
        """Make all that the network has to be adapted to."""
        settings, seed = self.settings, self.seed
        original = data.train.limit(settings.new_samples, seed=seed)
        made = []
        for name in settings.shifts:
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
        example = data.example.to(next(model.parameters()).device)
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
        options: dict[str, Any] = {"seed": self.seed, "device": self.device, "progress": self.progress}
        return adapt(network, new, data, replay=settings.replay, epochs=settings.epochs, learning_rate=rate, **options)

    def scores(self, model: nn.Module, scenario: Scenario, data: Data) -> dict[str, Any]:
        tests = {"new": replace(data, test=scenario.held_out), "clean": data}
        return {f"{name}_accuracy": accuracy(model, test).overall for name, test in tests.items()}
