"""Slicing precision (NeuSemSlice, arXiv 2407.20281, first question): accuracy of networks held to critical neurons.

Three slicers, five metrics and ten operating points each, without any training after the cut, beside random slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from ..core.find import find_neurons
from ..core.neurons import Neurons
from ..data import Data, load
from ..semantic import METRICS, Contributions, Rule, Similarity, contributions, prefix_similarity, slices_from
from ..slices import Slice
from ..training import fit
from ..use.controls import random_like
from ..use.evaluate import accuracy
from ..use.extract import extract, retention
from .experiment import BENCHES, check_scale, finished_or_run, manifest, note, write_result
from .slicing_page import draw, markdown, summarise

POSITIONS = {"mean": "means", "all": "maps"}
SLOPED = "taylor"  # with it a theta that falls with depth is tried
SHARES = tuple(n / 10 for n in range(1, 11))
THETAS = (0.6, 0.75, 0.85, *(n / 100 for n in range(90, 100)))  # the published ten, and three below


@dataclass(frozen=True)
class Network:
    """What is trained before it is sliced."""

    data: str
    model: str
    width: float
    epochs: int
    learning_rate: float = 0.05


@dataclass(frozen=True)
class Settings:
    """One scale of the bench."""

    networks: tuple[Network, ...]
    train_images: int | None  # None is all
    validation_images: int | None  # for every slice
    test_images: int | None
    samples_per_class: int
    seeds: int
    shares: tuple[float, ...] = SHARES
    thetas: tuple[float, ...] = THETAS
    seed: int = 0


SETTINGS = {
    "smoke": Settings(
        (Network("digits", "lenet", 0.5, epochs=2), Network("digits", "convnet", 0.25, epochs=2)),
        train_images=None,
        validation_images=None,
        test_images=None,
        samples_per_class=16,
        seeds=1,
        shares=(0.3, 0.6, 0.9),
        thetas=(0.9, 0.95, 0.99),
    ),
    "cpu": Settings(
        (
            Network("mnist", "lenet", 1.0, epochs=5),
            Network("fashion-mnist", "convnet", 0.5, epochs=6),
            Network("cifar10", "resnet20", 1.0, epochs=8),
            Network("cifar10", "vgg16", 0.5, epochs=8),
        ),
        train_images=20_000,
        validation_images=500,
        test_images=1_000,
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
        train_images=None,
        validation_images=None,
        test_images=None,
        samples_per_class=256,
        seeds=3,
    ),
}


@BENCHES.register("slicing")
def slicing(
    scale: str,
    *,
    data_dir: str | Path | None = None,
    out: str | Path = "results",
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Slice trained networks in every way and measure accuracy over compression.

    Finished parts in `out` are reused. Writes slicing-SCALE.json, slicing-SCALE.md and, with matplotlib,
    slicing-SCALE.png there and returns the JSON.
    """
    check_scale(scale)
    settings, folder = replace(SETTINGS[scale], seed=seed), Path(out)
    parts = []
    for network in settings.networks:
        data = load(network.data, data_dir, seed=seed)
        data = data.limit(train=settings.train_images, seed=seed)
        for number in range(seed, seed + settings.seeds):
            name = f"slicing-{scale}-{network.data}-{network.model}-seed{number}"
            used = {**asdict(settings), "networks": asdict(network), "seeds": number, "data_hash": data.fingerprint}
            run = _Run(settings, network, data, number, folder / name, device, progress)
            parts.append(finished_or_run(folder / f"{name}.json", used, run.result))
    command = f"torchslice bench slicing --scale {scale} --seed {seed}"
    path = folder / f"slicing-{scale}"
    result = {"manifest": manifest(command, asdict(settings)), "summary": summarise(parts), "runs": parts}
    picture = draw(result, path.with_name(f"{path.name}.png"), progress=progress)
    return write_result(path, result, markdown(result, picture))


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
        network, data = self.network, self.data
        torch.manual_seed(self.seed)
        arguments = {"channels": data.train.images.shape[1], "width": network.width}
        model = models.create(network.model, num_classes=len(data.classes), **arguments)
        note(f"{network.model} on {network.data}, seed {self.seed}: training, {network.epochs} epochs", self.progress)
        running: dict[str, Any] = {"device": self.device, "progress": self.progress}
        options: dict[str, Any] = {"epochs": network.epochs, "learning_rate": network.learning_rate, "seed": self.seed}
        fit(model, data, folder=self.folder, **options, **running)
        metrics = METRICS.names()
        count = self.settings.samples_per_class
        scores = contributions(model, data, metric=metrics, samples_per_class=count, seed=self.seed, **running)
        similarity = {name: prefix_similarity(model, data, scores, positions=name, **running) for name in POSITIONS}
        neurons = find_neurons(model, data.example.to(next(model.parameters()).device))
        points = [
            {"slicer": slicer, "metric": metric, "point": point, **self.measure(model, neurons, part)}
            for slicer, metric, point, part in self.slices(scores, similarity, neurons)
        ]
        whole = self.measure(model, neurons, neurons.full())
        return {"data": network.data, "model": network.model, "seed": self.seed, "whole": whole, "points": points}

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
            note(f"{self.network.model} on {self.network.data}, seed {self.seed}: {metric} done", self.progress)
        for point in self.settings.shares:
            yield "control: random", "-", point, neurons.random(point, seed=self.seed)

    def measure(self, model: nn.Module, neurons: Neurons, part: Slice) -> dict[str, float]:
        """Return compression (share of masked parameters), neuron retention and accuracies of a slice."""
        example = self.data.example.to(next(model.parameters()).device)
        small = extract(model, part, example, neurons=neurons)  # computes what the masked network does, faster
        counts = {"validation": self.settings.validation_images, "test": self.settings.test_images}
        scored = self.data.limit(**counts, seed=self.settings.seed)
        return {
            "compression": 1 - retention(model, neurons, part).param,
            "neuron_retention": part.neuron_retention,
            **{split: accuracy(small, scored, split=split).overall for split in ("validation", "test")},
        }
