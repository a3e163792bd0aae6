"""Modularizing while training, reproduced: accuracy, slices, and what sub-models are worth at every stage.

Beside the published way (gates dropped) stand the variants that need no training of the sub-model, and the controls.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import models
from ..data import Data, load
from ..modular import GatedModel, attach_gates, gate_statistics, objective, report, slices_from
from ..slices import Slice, union
from ..training import fit
from ..use.evaluate import accuracy, accuracy_of, predict_logits, restrict_logits
from ..use.extract import extract
from ..use.finetune import finetune
from ..use.stages import evaluate_stages
from .experiment import BENCHES, check_scale, finished_or_run, manifest, note, spread, table, write_result


@dataclass(frozen=True)
class Settings:
    """One scale of the bench."""

    data: str
    networks: tuple[tuple[str, float], ...]  # built-in name, width
    train_images: int | None  # None is all
    epochs: int
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
    "smoke": Settings("digits", (("convnet", 0.25),), None, epochs=2, seeds=1, finetune_epochs=1, task_sizes=(2, 10)),
    "cpu": Settings("cifar10", (("convnet", 0.5),), 20_000, epochs=12, seeds=3, finetune_epochs=3),
    "paper": Settings(
        "cifar10",
        (("simcnn", 1.0), ("rescnn", 1.0), ("vgg16", 1.0), ("resnet18", 1.0)),
        None,
        epochs=200,
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


@BENCHES.register("mwt")
def mwt(
    scale: str,
    *,
    data_dir: str | Path | None = None,
    out: str | Path = "results",
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Train every network the standard and the modular way, slice it, and evaluate sub-models of disjoint sub-tasks.

    Finished parts in `out` are reused, so that an interrupted run goes on where it stopped. Writes mwt-SCALE.json and
    mwt-SCALE.md there and returns the JSON. `seed` is the first of the seeds.
    """
    check_scale(scale)
    settings, folder = replace(SETTINGS[scale], seed=seed), Path(out)
    data = load(settings.data, data_dir, seed=seed)
    if settings.train_images is not None:
        data = data.limit(train=settings.train_images, validation=settings.train_images // 10, seed=seed)
    parts = []
    for network, width in settings.networks:
        for number in range(seed, seed + settings.seeds):
            name = f"mwt-{scale}-{network}-seed{number}"
            used = {**asdict(settings), "networks": [network, width], "seeds": number, "data_hash": data.fingerprint}
            run = _Run(settings, data, network, width, number, folder / name, device, progress)
            parts.append(finished_or_run(folder / f"{name}.json", used, run.result))
    command = f"torchslice bench mwt --scale {scale} --seed {seed}"
    result = {"manifest": manifest(command, asdict(settings), data), "arms": ARMS, "runs": parts}
    return write_result(folder / f"mwt-{scale}", result, markdown(result))


@dataclass(frozen=True)
class _Run:
    """One network and one seed."""

    settings: Settings
    data: Data
    network: str
    width: float
    seed: int
    folder: Path
    device: str
    progress: bool

    def result(self) -> dict[str, Any]:
        settings, data = self.settings, self.data
        channels = data.train.images.shape[1]

        def new() -> torch.nn.Module:
            torch.manual_seed(self.seed)  # standard and modular training start from the same weights
            return models.create(self.network, num_classes=len(data.classes), channels=channels, width=self.width)

        common: dict[str, Any] = {
            "epochs": settings.epochs,
            "learning_rate": settings.learning_rate,
            "seed": self.seed,
            "device": self.device,
            "progress": self.progress,
        }
        standard = new()
        note(f"{self.network}, seed {self.seed}: standard training, {settings.epochs} epochs", self.progress)
        rows = fit(standard, data, folder=self.folder / "standard", **common)
        seconds = {"standard": sum(row["seconds"] for row in rows)}
        gated = attach_gates(new(), data.example, seed=self.seed)
        losses = objective(cohesion_weight=settings.cohesion_weight, coupling_weight=settings.coupling_weight)
        note(f"{self.network}, seed {self.seed}: modular training, {settings.epochs} epochs", self.progress)
        rows = fit(gated, data, objective=losses, folder=self.folder / "modular", **common)
        seconds["modular"] = sum(row["seconds"] for row in rows)
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
            "network": self.network,
            "seed": self.seed,
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
        note(f"{self.network}, seed {self.seed}: sub-task {', '.join(classes)}", self.progress)
        indices, task = data.class_indices(classes), data.restrict(classes)
        example = data.example.to(next(gated.parameters()).device)
        part = union(slices[name] for name in classes)
        folded = gated.fold({layer: mean[indices].mean(0) for layer, mean in means.items()})
        dropped = extract(gated.fold(), part, example, classes=indices)
        tuning: dict[str, Any] = {"seed": self.seed, "device": self.device, "progress": self.progress}
        stages = evaluate_stages(
            folded,
            data,
            part=part,
            classes=classes,
            epochs=settings.finetune_epochs,
            learning_rate=settings.finetune_learning_rate,
            scratch_epochs=settings.epochs,
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


def markdown(result: dict[str, Any]) -> str:
    """Write the tables of a result: means over sub-tasks of one size, then mean and standard deviation over seeds."""
    about, settings = result["manifest"], result["manifest"]["settings"]
    tuning, slash = settings["finetune_epochs"], " / ".join(str(size) for size in settings["task_sizes"])
    lines = [
        "# Modularizing while training",
        "",
        f"`{about['command']}`: {settings['epochs']} epochs, {settings['seeds']} seeds, {about['data']}; "
        f"{about['processor']}, "
        f"accelerator {about['accelerator'] or 'none'}, torch {about['torch']}, Python {about['python']}.",
        "",
        f"Test accuracy in percent. Sub-tasks of {slash} classes are disjoint and cover all classes where they "
        "can; a figure is "
        f"the mean over the sub-tasks, then mean ± standard deviation over the seeds. Fine-tuning is {tuning} "
        "epochs, its epoch "
        "chosen on validation images; every fine-tuned arm has the same settings.",
    ]
    for network in dict.fromkeys(run["network"] for run in result["runs"]):
        runs = [run for run in result["runs"] if run["network"] == network]
        lines += ["", f"## {network}", "", _whole(runs), "", _tasks(runs, settings["task_sizes"], result["arms"])]
        warnings = sorted({text for run in runs for text in run["warnings"]})
        lines += ["", *(f"- Health: {text}" for text in warnings)] if warnings else []
    lines += ["", *(f"- **{arm}**: {meaning}." for arm, meaning in result["arms"].items()), ""]
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


def _tasks(runs: list[dict[str, Any]], sizes: list[int], arms: dict[str, str]) -> str:
    def mean(run: dict[str, Any], size: int, read: Any) -> float | None:
        values = [read(task) for task in run["tasks"] if len(task["classes"]) == size]
        return sum(values) / len(values) if values else None

    def cut(task: dict[str, Any]) -> dict[str, Any]:
        return next(stage for stage in task["stages"] if stage["name"] == "extracted")

    figures: dict[str, Callable[[dict[str, Any]], float]] = {
        **{arm: partial(_accuracy, arm) for arm in arms},
        "*neuron retention of the union, %*": lambda task: task["neuron_retention"],
        "*parameters of the sub-model, %*": lambda task: cut(task)["param_retention"],
        "*MACs of the sub-model, %*": lambda task: cut(task)["mac_retention"],
    }
    rows = [
        [name, *(spread([mean(run, size, read) for run in runs]) for size in sizes)] for name, read in figures.items()
    ]
    return table(["sub-task of", *(f"{size} classes" for size in sizes)], rows)
