"""Long runs: training steps and sub-models without end leave no memory, hooks, threads or open files behind."""

from __future__ import annotations

import gc
import os
import random
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchslice as ts
from torchslice.graph.views import HOOKS
from torchslice.tables import table

STEPS = 5  # of training before every sub-model
LEAST_MIB, MOST_GROWTH = 16.0, 0.05  # of memory that a run may grow by: the larger of this and a part of it
TRAINING = ts.Training(epochs=1, batch_size=12, precision="fp32", device="cpu", progress=False)


def resident_mib() -> float:
    """Return the memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def left(model: nn.Module) -> dict[str, int]:
    """Count what a cycle could leave behind."""
    gc.collect()
    alive: list[Any] = gc.get_objects()
    return {
        "tensors": sum(issubclass(type(thing), Tensor) for thing in alive),
        "modules": sum(issubclass(type(thing), nn.Module) for thing in alive),
        "hooks": sum(len(vars(module)[name]) for module in model.modules() for name in HOOKS),
        "threads": threading.active_count(),
        "open files": len(os.listdir("/proc/self/fd")),
    }


def run(*, count: int = 1000, seed: int = 0) -> tuple[str, list[str]]:
    """Train and make so many sub-models; return a table over time, and what was left behind."""
    task = ts.data.load("digits").limit(train=STEPS * 12, validation=40, test=40, seed=seed)
    torch.manual_seed(seed)
    model = ts.models.create("convnet", channels=1, width=0.125)
    rng, rows = random.Random(seed), []
    figures: list[tuple[float, dict[str, int]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, count + 1):
            ts.fit(model, task, TRAINING)
            neurons = ts.find_neurons(model, task.example, classes=task.classes)
            slices = {name: neurons.random(0.5, seed=number + i) for i, name in enumerate(task.classes)}
            made = ts.reuse(neurons, task, slices, classes=rng.sample(task.classes, 2), tune=False)
            ts.save(made, Path(folder) / "part.safetensors")
            ts.load(Path(folder) / "part.safetensors")
            del neurons, slices, made
            if number % max(1, count // 10) == 0:
                figures.append((resident_mib(), left(model)))
                rows.append([str(number), f"{figures[-1][0]:.0f}", *map(str, figures[-1][1].values())])
        files = os.listdir(folder)
    (early, first), (late, last) = figures[len(figures) // 5], figures[-1]  # the first cycles fill what is remembered
    wrong = [f"{what}: {first[what]} early, {last[what]} at the end" for what in first if last[what] > first[what]]
    if late - early > max(LEAST_MIB, MOST_GROWTH * early):
        wrong.append(f"memory grew from {early:.0f} to {late:.0f} MiB")
    if files != ["part.safetensors"]:
        wrong.append(f"files were left: {files}")
    return table(("sub-models", "MiB", *first), rows), wrong
