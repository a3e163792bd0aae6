"""The whole story on the built-in digits in about a minute: train, slice, cut sub-models out, save and load one.

Accuracies are means over three networks that differ in their seed, with the lowest and the highest beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from textwrap import indent
from typing import Any

import torch
from torch import nn

from .artefact import load, save
from .data import Task
from .judge import random_like
from .runs import Recipe, Run
from .slices import Slice
from .submodel import Reused, reuse
from .tables import percent, table
from .training import Training, accuracy, accuracy_of, cost, latency_ms, predict

# Width, epochs and learning rates were chosen on the validation samples.
RECIPE = Recipe(
    "convnet",
    "digits",
    training=Training(epochs=24, learning_rate=0.05, batch_size=32, precision="fp32"),
    model_arguments={"width": 0.5},
)
SEEDS = 3
TASKS = (("3", "8"), ("1", "4", "7"), ("0", "2", "5", "6", "9"))
TUNING = Training(epochs=5, learning_rate=0.01, batch_size=32, progress=False, precision="fp32")
BATCH = 64  # samples per forward pass where latency is measured


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run on one CPU thread: images of 8x8 pixels give several nothing to do but wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def run_demo(
    folder: Path, *, seed: int = 0, device: str = "auto", say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run the demo, keep all it makes in `folder`, tell the story through `say`, and return its figures."""
    started = time.perf_counter()
    first, rest = RECIPE.first_epochs, RECIPE.training.epochs - RECIPE.first_epochs
    say(f"1. Train {SEEDS} convolutional networks on images of digits, each from other weights: {first} epochs as")
    say(f"   usual, then rank the neurons for every class, and {rest} epochs of sub-tasks on the first of them alone.")
    trained = [_train(folder, number, device) for number in range(seed, seed + SEEDS)]
    run, task, network = trained[0]
    whole = [accuracy(net, task).overall for _, task, net in trained]
    say(f"   {task!r}\n   Test accuracy on all {len(task.classes)} classes: {_spread(whole)}\n")

    slices = run.slices()
    say("2. Every class has its neurons in an order now, the best first, so that slices of any size can be cut. In the")
    say(f"   first network: {slices['3']} of class 3, and {slices['3'] & slices['8']} of these of class 8 too.")

    say("3. Cut sub-models out. Test accuracy on their classes after each step; mean of the networks (lowest to")
    say("   highest):")
    made = [[_make(*one, classes, device) for classes in TASKS] for one in trained]
    scores = [{step: [of[step] for _, of in column] for step in column[0][1]} for column in zip(*made, strict=True)]
    rows = [(" ".join(classes), *map(_spread, of.values())) for classes, of in zip(TASKS, scores, strict=True)]
    say(indent(f"{table(('digits', *scores[0]), rows)}\n", "   "))
    say("   The control has as many random neurons in every layer and went the same way, fine-tuning included.\n")

    say("4. Compare size and speed of the first network's sub-models with the whole network.")
    networks = {"whole": network, **{" ".join(one.classes): one.model for one, _ in made[0]}}
    times = latency_ms(networks, task.example, batch_sizes=(BATCH,))
    costs = {name: cost(net, task.example) for name, net in networks.items()}
    rows = [(name, f"{size.parameters:,}", f"{size.macs:,}", str(times[name][BATCH])) for name, size in costs.items()]
    say(indent(f"{table(('network', 'parameters', 'MACs', 'latency'), rows)}\n", "   "))

    say("5. Save them, and load one back.")
    files = [folder / f"digits-{'-'.join(one.classes)}.safetensors" for one, _ in made[0]]
    for (one, _), file in zip(made[0], files, strict=True):
        save(one, file)
    equal = torch.equal(predict(load(files[0]).model, task), predict(made[0][0][0].model.cpu(), task))
    say(f"   {files[0]}: the outputs are {'bit-equal' if equal else 'NOT the same'}.\n")

    seconds = time.perf_counter() - started
    say(f"{seconds:.0f} seconds. Next, two other digits:")
    say(f"   torchslice extract {run.folder} --classes 4,9 --finetune 5 --out 4-9.safetensors")
    return {
        "folder": str(folder),
        "seconds": seconds,
        "accuracy": whole,
        "slices": {name: slice_.neuron_retention for name, slice_ in slices.items()},
        "sub_models": [
            {"classes": classes, "accuracy": score, "file": str(file)}
            for classes, score, file in zip(TASKS, scores, files, strict=True)
        ],
        "costs": {name: {**asdict(size), "latency": asdict(times[name][BATCH])} for name, size in costs.items()},
        "bit_equal": equal,
    }


def _train(folder: Path, seed: int, device: str) -> tuple[Run, Task, nn.Module]:
    """Train one network and return its run, its task and itself."""
    recipe = replace(RECIPE, training=replace(RECIPE.training, seed=seed))
    task = recipe.load_task()
    run = Run.start(folder / f"run-{seed}", recipe, task)
    run.train(task, device=device)
    neurons = run.network(task, device=device)
    return run, task, neurons.model


def _make(
    run: Run, task: Task, model: nn.Module, classes: Sequence[str], device: str
) -> tuple[Reused, dict[str, float]]:
    """Make a sub-model and its control; return it with the test accuracy on its classes after each step."""
    seed = run.recipe.training.seed
    neurons = run.network(task, device=device)
    settings: dict[str, Any] = {"training": replace(TUNING, seed=seed, device=device), "seed": seed, "classes": classes}
    made = reuse(neurons, task, run.slices(), **settings)
    chance: Mapping[str, Slice] = dict.fromkeys(made.classes, random_like(made.slice, seed=seed))
    control, sub_task = reuse(neurons, task, chance, **settings), task.restrict(made.classes)
    logits = predict(model, sub_task)[:, task.class_indices(made.classes)]
    return made, {
        "whole network": accuracy_of(logits, sub_task.test.labels).overall,
        **{step: accuracy(net, sub_task).overall for step, net in made.networks.items()},
        "control: random slice": accuracy(control.model, sub_task).overall,
    }


def _spread(values: Sequence[float]) -> str:
    """Write a mean with the lowest and the highest value."""
    return f"{percent(fmean(values))} ({100 * min(values):.1f} to {100 * max(values):.1f})"
