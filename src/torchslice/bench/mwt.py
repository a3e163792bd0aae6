"""Modularizing while training, reproduced: accuracy, slices, and what sub-models are worth at every stage.

Beside the published way (gates dropped) stand the variants that need no training of the sub-model, and the controls.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..modular import GatedModel, attach_gates, gate_statistics, objective, report, slices_from
from ..slices import Slice, union
from ..training import fit
from ..use.evaluate import accuracy, accuracy_of, device_of, predict_logits, restrict_logits
from ..use.extract import extract
from ..use.finetune import finetune
from ..use.stages import evaluate_stages
from .experiment import BENCHES, Bench, Network, Part, by_network, machine, spent, spread, table


@dataclass(frozen=True)
class Settings:
    """One scale of the bench."""

    networks: tuple[Network, ...]
    seeds: int
    finetune_epochs: int
    task_sizes: tuple[int, ...] = (2, 5, 10)
    learning_rate: float = 0.05
    finetune_learning_rate: float = 0.01
    cohesion_weight: float = 0.5
    coupling_weight: float = 1.5
    frequency_threshold: float = 0.9
    seed: int = 0


SETTINGS = {
    "smoke": Settings((Network("digits", "convnet", 0.25, epochs=2),), seeds=1, finetune_epochs=1, task_sizes=(2, 10)),
    "cpu": Settings(
        (Network("cifar10", "convnet", 0.5, epochs=12, train_images=20_000, validation_images=2_000),),
        seeds=3,
        finetune_epochs=3,
    ),
    "paper": Settings(
        tuple(Network("cifar10", name, 1.0, epochs=200) for name in ("simcnn", "rescnn", "vgg16", "resnet18")),
        seeds=3,
        finetune_epochs=10,
    ),
}

ARMS = {
    "standard, restricted": "standard training, logits restricted to the sub-task",
    "modular, restricted": "modular training with its gates, logits restricted to the sub-task, nothing cut",
    "gates dropped": "sub-model as published, before fine-tuning",
    "gates folded": "sub-model with its classes' mean gate values multiplied into the weights",
    "gates folded, recalibrated": "the same, batch-norm statistics of the sub-task",
    "gates dropped, fine-tuned": "sub-model as published, after fine-tuning",
    "gates folded, fine-tuned": "folded and recalibrated, after fine-tuning",
    "control: random slice, recalibrated": "a random slice with as many neurons per layer, gates folded",
    "control: random slice, fine-tuned": "the same after equal fine-tuning",
    "control: standard, fine-tuned": "the whole standard network, recalibrated, fine-tuned as long on the sub-task",
    "control: from scratch": "a network of the sub-model's size, trained on the sub-task as long as the parent was",
}


@dataclass(frozen=True)
class Modularizing(Part):
    """One network, trained both ways, and its sub-models."""

    def result(self) -> dict[str, Any]:
        settings, data = self.settings, self.data
        standard = self.new(data)  # both start from the same weights
        self.note(f"standard training, {self.network.epochs} epochs")
        rows = fit(standard, data, folder=self.folder / "standard", **self.training)
        seconds = {"standard": spent(rows)}
        gated = attach_gates(self.new(data), data.example, seed=self.seed)
        losses = objective(cohesion_weight=settings.cohesion_weight, coupling_weight=settings.coupling_weight)
        self.note(f"modular training, {self.network.epochs} epochs")
        rows = fit(gated, data, objective=losses, folder=self.folder / "modular", **self.training)
        seconds["modular"] = spent(rows)
        started = time.perf_counter()
        statistics = gate_statistics(gated, data, progress=self.progress)
        slices = slices_from(gated, statistics, frequency_threshold=settings.frequency_threshold)
        measured = report(gated, slices, data, progress=self.progress)
        seconds["slices and report"] = time.perf_counter() - started
        tasks = []
        for size in settings.task_sizes:
            for first in range(0, len(data.classes) - size + 1, size):
                classes = list(data.classes[first : first + size])
                tasks.append(self.task(standard, gated, slices, statistics.mean, classes))
        return {
            "standard_accuracy": accuracy(standard, data).overall,
            "modular_accuracy": accuracy(gated, data).overall,
            "report": measured.to_plain(),
            "warnings": measured.health.warnings,
            "seconds": seconds,
            "tasks": tasks,
        }

    def task(
        self,
        standard: torch.nn.Module,
        gated: GatedModel,
        slices: dict[str, Slice],
        means: dict[str, torch.Tensor],
        classes: list[str],
    ) -> dict[str, Any]:
        """Evaluate one sub-task at every stage."""
        settings, data = self.settings, self.data
        self.note(f"sub-task {', '.join(classes)}")
        indices, task = data.class_indices(classes), data.restrict(classes)
        example = data.example.to(device_of(gated))
        part = union(slices[name] for name in classes)
        folded = gated.fold({layer: mean[indices].mean(0) for layer, mean in means.items()})
        dropped = extract(gated.fold(), part, example, classes=indices)
        tuning: dict[str, Any] = {"seed": self.seed, **self.running}
        stages = evaluate_stages(
            folded,
            data,
            part=part,
            classes=classes,
            epochs=settings.finetune_epochs,
            learning_rate=settings.finetune_learning_rate,
            scratch_epochs=self.network.epochs,
            scratch_learning_rate=settings.learning_rate,
            rival=standard,
            **tuning,
        )
        tuned = finetune(
            dropped, task, epochs=settings.finetune_epochs, learning_rate=settings.finetune_learning_rate, **tuning
        )

        def restricted(model: torch.nn.Module) -> float:
            return accuracy_of(restrict_logits(predict_logits(model, task), indices), task.test.labels).overall

        arms = {
            "standard, restricted": restricted(standard),
            "modular, restricted": restricted(gated),
            "gates dropped": accuracy(dropped, task).overall,
            "gates folded": stages["extracted"].accuracy,
            "gates folded, recalibrated": stages["recalibrated"].accuracy,
            "gates dropped, fine-tuned": accuracy(tuned.model, task).overall,
            "gates folded, fine-tuned": stages["fine-tuned"].accuracy,
            "control: random slice, recalibrated": stages["random slice, recalibrated"].accuracy,
            "control: random slice, fine-tuned": stages["random slice, fine-tuned"].accuracy,
            "control: standard, fine-tuned": stages["full, fine-tuned"].accuracy,
            "control: from scratch": stages["from scratch"].accuracy,
        }
        kept = sum(int(part[layer].sum()) for layer in gated.layers)
        return {
            "classes": classes,
            "accuracy": arms,
            "neuron_retention": kept / sum(part.layers[layer] for layer in gated.layers),
            "stages": stages.to_plain()["stages"],
        }


def page(result: dict[str, Any], path: Path) -> str:
    """Write the tables of a result: means over sub-tasks of one size, then mean and standard deviation over seeds."""
    about, settings = result["manifest"], result["manifest"]["settings"]
    tuning, slash = settings["finetune_epochs"], " / ".join(str(size) for size in settings["task_sizes"])
    lines = [
        "# Modularizing while training",
        "",
        f"`{about['command']}`: {settings['seeds']} seeds; {machine(about)}.",
        "",
        f"Test accuracy in percent. Sub-tasks of {slash} classes are disjoint and cover all classes where they "
        "can; a figure is "
        f"the mean over the sub-tasks, then mean ± standard deviation over the seeds. Fine-tuning is {tuning} "
        "epochs, its epoch "
        "chosen on validation images; every fine-tuned arm has the same settings.",
    ]
    networks = {f"{network['model']} on {network['data']}": network for network in settings["networks"]}
    for name, runs in by_network(result["runs"]).items():
        images = networks[name]["train_images"]
        about = f"{networks[name]['epochs']} epochs, {f'{images:,}' if images else 'all'} training images."
        lines += ["", f"## {name}", "", about, "", _whole(runs), "", _tasks(runs, settings["task_sizes"])]
        warnings = sorted({text for run in runs for text in run["warnings"]})
        lines += ["", *(f"- Health: {text}" for text in warnings)] if warnings else []
    lines += ["", *(f"- **{arm}**: {meaning}." for arm, meaning in ARMS.items()), ""]
    return "\n".join(lines)


def _accuracy(arm: str, task: dict[str, Any]) -> float:
    return float(task["accuracy"][arm])


def _whole(runs: list[dict[str, Any]]) -> str:
    ratio = [run["seconds"]["modular"] / run["seconds"]["standard"] for run in runs]
    rows = [
        ["accuracy, standard training", spread([run["standard_accuracy"] for run in runs], digits=2)],
        ["accuracy, modular training", spread([run["modular_accuracy"] for run in runs], digits=2)],
        ["neuron retention of a class slice, %", spread([run["report"]["neuron_retention"] for run in runs], digits=2)],
        ["cohesion", spread([run["report"]["cohesion"] for run in runs], percent=False, digits=3)],
        ["coupling", spread([run["report"]["coupling"] for run in runs], percent=False, digits=3)],
        ["training time, standard, s", spread([run["seconds"]["standard"] for run in runs], percent=False)],
        ["training time, modular over standard", spread(ratio, percent=False, digits=2)],
    ]
    return table(["whole network", "value"], rows)


def _tasks(runs: list[dict[str, Any]], sizes: list[int]) -> str:
    def mean(run: dict[str, Any], size: int, read: Any) -> float | None:
        values = [read(task) for task in run["tasks"] if len(task["classes"]) == size]
        return sum(values) / len(values) if values else None

    def cut(task: dict[str, Any]) -> dict[str, Any]:
        return next(stage for stage in task["stages"] if stage["name"] == "extracted")

    figures: dict[str, Callable[[dict[str, Any]], float]] = {
        **{arm: partial(_accuracy, arm) for arm in ARMS},
        "*neuron retention of the union, %*": lambda task: task["neuron_retention"],
        "*parameters of the sub-model, %*": lambda task: cut(task)["param_retention"],
        "*MACs of the sub-model, %*": lambda task: cut(task)["mac_retention"],
    }
    rows = [
        [name, *(spread([mean(run, size, read) for run in runs]) for size in sizes)] for name, read in figures.items()
    ]
    return table(["sub-task of", *(f"{size} classes" for size in sizes)], rows)


BENCHES.register("mwt")(Bench("mwt", SETTINGS, Modularizing, page))
