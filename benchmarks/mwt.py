"""Modularizing while training (arXiv 2306.09376): accuracy, slices, and what sub-models are worth at every stage.

Beside the published way (gates dropped) stand the variants that need no training of the sub-model, and the controls.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchslice import Slice, accuracy, extract, finetune, fit, gates, judge
from torchslice.data import Task
from torchslice.slices import union

from .experiment import Benchmark, Network, Part, Scale, neurons_of, spent
from .tables import Run, Runs, about_training, figure, markdown, page, table


@dataclass(frozen=True)
class Settings(Scale):
    """One scale of the benchmark."""

    finetune_epochs: int = 3
    task_sizes: tuple[int, ...] = (2, 5, 10)
    finetune_learning_rate: float = 0.01


CIFAR = Network("cifar10", "convnet", 0.5, epochs=12, train_images=20_000, validation_images=2_000)
PAPER = tuple(Network("cifar10", name, 1.0, epochs=200) for name in ("simcnn", "rescnn", "vgg16", "resnet18"))
SETTINGS = {
    "smoke": Settings((Network("digits", "convnet", 0.25, epochs=2),), 1, finetune_epochs=1, task_sizes=(2, 10)),
    "cpu": Settings((CIFAR,)),
    "paper": Settings(PAPER, finetune_epochs=10),
}

ARMS = {
    "standard, restricted": "standard training, logits restricted to the sub-task",
    "MwT, restricted": "trained with gates and run with them, logits restricted to the sub-task, nothing cut",
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
STAGE_OF = {
    "gates folded": "extracted",
    "gates folded, recalibrated": "recalibrated",
    "gates folded, fine-tuned": "fine-tuned",
    "control: random slice, recalibrated": "random slice, recalibrated",
    "control: random slice, fine-tuned": "random slice, fine-tuned",
    "control: standard, fine-tuned": "full, fine-tuned",
    "control: from scratch": "from scratch",
}


@dataclass(frozen=True)
class Modularizing(Part):
    """One network, trained both ways, and its sub-models."""

    def result(self) -> dict[str, Any]:
        task = self.task
        standard = self.new(task)  # both start from the same weights
        self.note(f"standard training, {self.network.epochs} epochs")
        seconds = {"standard": spent(fit(standard, task, self.training, folder=self.folder / "standard"))}
        gated = gates.attach(neurons_of(self.new(task), task), seed=self.seed)
        self.note(f"MwT, {self.network.epochs} epochs")
        seconds["MwT"] = spent(fit(gated, task, self.training, objective=gates.objective(), folder=self.folder / "mwt"))
        started = time.perf_counter()
        statistics = gates.statistics(gated, task, progress=self.progress)
        slices = gates.slices_from(gated, statistics)
        report = gates.report(gated, task, slices, progress=self.progress)
        seconds["slices and report"] = time.perf_counter() - started
        groups = [
            task.classes[first : first + size]
            for size in self.settings.task_sizes
            for first in range(0, len(task.classes) - size + 1, size)
        ]
        tasks = [row for names in groups for row in self.sub_task(standard, gated, slices, statistics.mean, names)]
        return {
            "standard_accuracy": accuracy(standard, task).overall,
            "mwt_accuracy": accuracy(gated, task).overall,
            **{key: getattr(report, key) for key in ("neuron_retention", "cohesion", "coupling")},
            "standard_seconds": seconds["standard"],
            "mwt_over_standard": seconds["MwT"] / seconds["standard"],
            "report_seconds": seconds["slices and report"],
            "warnings": report.health.warnings,
            "tasks": tasks,
        }

    def sub_task(
        self,
        standard: nn.Module,
        gated: gates.GatedModel,
        slices: Mapping[str, Slice],
        means: Mapping[str, Tensor],
        classes: tuple[str, ...],
    ) -> list[dict[str, Any]]:
        """Return the figures of every arm on one sub-task, and what is left of the network."""
        self.note(f"sub-task {', '.join(classes)}")
        indices, only = self.task.class_indices(classes), self.task.restrict(classes)
        slice_ = union(slices[name] for name in classes)
        folded = gated.fold({layer: mean[indices].mean(0) for layer, mean in means.items()})
        dropped = extract(gated.neurons.on(gated.fold()), slice_, classes=indices)
        epochs, rate = self.settings.finetune_epochs, self.settings.finetune_learning_rate
        tuning = replace(self.training, epochs=epochs, learning_rate=rate)
        stages = judge.evaluate_stages(
            *(gated.neurons.on(folded), self.task, slice_),
            classes=classes,
            training=tuning,
            scratch=self.training,
            baseline=neurons_of(standard, self.task),
            latency_repeats=1,
        )
        cut, kept = stages["extracted"], sum(int(slice_[layer].sum()) for layer in gated.layers)
        figures = {
            "standard, restricted": restricted(standard, only, indices),
            "MwT, restricted": restricted(gated, only, indices),
            "gates dropped": accuracy(dropped, only).overall,
            "gates dropped, fine-tuned": accuracy(finetune(dropped, only, tuning).model, only).overall,
            **{arm: stages[stage].accuracy for arm, stage in STAGE_OF.items()},
            "*neuron retention of the union, %*": kept / sum(slice_.layers[layer] for layer in gated.layers),
            "*parameters of the sub-model, %*": cut.param_retention,
            "*MACs of the sub-model, %*": cut.mac_retention,
        }
        about = {"size": len(classes), "classes": ", ".join(classes)}
        return [{**about, "figure": name, "value": value} for name, value in figures.items()]


def restricted(model: nn.Module, only: Task, indices: list[int]) -> float:
    """Score a whole network that knows which classes are asked for."""
    return judge.accuracy_of(judge.predict(model, only)[:, indices], only.test.labels).overall


# -- the page -----------------------------------------------------------------------------------------------------
WHOLE = {
    "accuracy, standard training": figure("", "standard_accuracy", digits=2),
    "accuracy, MwT": figure("", "mwt_accuracy", digits=2),
    "neuron retention of a class slice, %": figure("", "neuron_retention", digits=2),
    "cohesion": figure("", "cohesion", percent=False, digits=3),
    "coupling": figure("", "coupling", percent=False, digits=3),
    "training time, standard, s": figure("", "standard_seconds", percent=False),
    "training time, MwT over standard": figure("", "mwt_over_standard", percent=False, digits=2),
}


def write_page(result: dict[str, Any], path: Path) -> str:
    """Write two tables per network: of the whole network, and of the sub-tasks of every size."""
    settings = result["manifest"]["settings"]
    sizes = settings["task_sizes"]

    def section(runs: Runs, network: Run) -> list[str]:
        names = [*ARMS, *dict.fromkeys(row["figure"] for row in runs[0]["tasks"] if row["figure"] not in ARMS)]
        rows = [(name, {"figure": name}) for name in names]
        whole = markdown(["whole network", "value"], [[title, cell(runs, {})] for title, cell in WHOLE.items()])
        tasks = table(
            runs, rows, {f"{n} classes": figure("tasks", "value", size=n) for n in sizes}, corner="sub-task of"
        )
        warnings = sorted({f"- Health: {text}" for run in runs for text in run["warnings"]})
        return [f"{about_training(network)}.", whole, tasks, *(["\n".join(warnings)] if warnings else [])]

    text = (
        f"Test accuracy in percent. Sub-tasks of {' / '.join(map(str, sizes))} classes are disjoint and cover all "
        "classes where they can; a figure is the mean over the sub-tasks, then mean ± standard deviation over the "
        f"seeds. Fine-tuning is {settings['finetune_epochs']} epochs, its epoch chosen on validation images; every "
        "fine-tuned arm has the same settings."
    )
    return page("Modularizing while training", result, text=[text], section=section, arms=ARMS)


BENCHMARK = Benchmark("mwt", SETTINGS, Modularizing, write_page)
