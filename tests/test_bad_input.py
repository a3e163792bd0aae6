"""Every verb that is given something else than neurons, a task or a model says so, before any work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchslice as ts
from tests.nets import Tiny, lively, stripes

QUICK = ts.Training(epochs=1, batch_size=8, device="cpu", precision="fp32", progress=False)
Given = SimpleNamespace  # of neurons, task, model, part (a slice), slices, gated


@pytest.fixture(scope="module")
def good() -> Given:
    task, model = stripes(), lively(Tiny())
    neurons = ts.find_neurons(model, task.example, classes=task.classes)
    slices = {name: neurons.random(0.5, seed=seed) for seed, name in enumerate(task.classes)}
    gated = ts.gates.attach(ts.find_neurons(lively(Tiny()), task.example))
    rankings = ts.subtasks.rank(neurons, task, progress=False)
    parts = {"part": slices[task.classes[0]], "slices": slices, "rankings": rankings}
    return Given(
        neurons=neurons,
        task=task,
        model=model,
        gated=gated,
        samples=task.train,
        reds=task.train.take(task.train.labels == 0),
        **parts,
    )


def pair(given: Given) -> dict[str, Any]:
    return {"classes": list(given.slices)[:2]}


NEURONS: dict[str, Callable[[Given], object]] = {
    "extract": lambda g: ts.extract(g.neurons, g.part),
    "masked": lambda g: ts.masked(g.neurons, g.part),
    "retention": lambda g: ts.retention(g.neurons, g.part),
    "reuse": lambda g: ts.reuse(g.neurons, g.task, g.slices, **pair(g)),
    "restructure": lambda g: ts.restructure(g.neurons, g.task, g.part, param_retention=0.5, training=QUICK),
    "readapt": lambda g: ts.readapt(g.neurons, g.task, g.part, g.samples, training=QUICK),
    "extend": lambda g: ts.extend(g.neurons, g.task, g.part, training=QUICK),
    "replace": lambda g: ts.replace(g.neurons, {"red": g.neurons}, g.task),
    "remove": lambda g: ts.remove(g.neurons, g.slices, classes=["red"]),
    "update": lambda g: ts.update(g.neurons, g.task, g.part, g.reds, training=QUICK),
    "gates.attach": lambda g: ts.gates.attach(g.neurons),
    "subtasks.rank": lambda g: ts.subtasks.rank(g.neurons, g.task, progress=False),
    "subtasks.objective": lambda g: ts.subtasks.objective(g.neurons, g.rankings),
    "semantic.contributions": lambda g: ts.semantic.contributions(g.neurons, g.task, progress=False),
    "semantic.class_slices": lambda g: ts.semantic.class_slices(g.neurons, g.task, progress=False),
    "judge.calibrate": lambda g: ts.judge.calibrate(g.neurons, g.task),
    "judge.compensate": lambda g: ts.judge.compensate(g.neurons, g.part, g.task),
    "judge.repair": lambda g: ts.judge.repair(g.neurons, g.part, g.task),
    "judge.evaluate_stages": lambda g: ts.judge.evaluate_stages(g.neurons, g.task, g.part, **pair(g)),
}
TASK: dict[str, Callable[[Given], object]] = {
    **{name: verb for name, verb in NEURONS.items() if verb.__code__.co_names.count("task")},
    "fit": lambda g: ts.fit(g.model, g.task, QUICK),
    "finetune": lambda g: ts.finetune(g.model, g.task, QUICK),
    "accuracy": lambda g: ts.accuracy(g.model, g.task),
    "judge.predict": lambda g: ts.judge.predict(g.model, g.task),
    "judge.recalibrate": lambda g: ts.judge.recalibrate(g.model, g.task),
    "gates.class_slices": lambda g: ts.gates.class_slices(g.gated, g.task, progress=False),
}
MODEL: dict[str, Callable[[Given], object]] = {
    "find_neurons": lambda g: ts.find_neurons(g.model, g.task.example),
    "save": lambda g: ts.save(g.model, "nothing.safetensors"),
    **{name: TASK[name] for name in ("fit", "finetune", "accuracy", "judge.predict", "judge.recalibrate")},
}
SLICE = ("extract", "masked", "retention", "readapt", "judge.compensate", "judge.repair", "judge.evaluate_stages")
LOADER = DataLoader(TensorDataset(torch.zeros(9, 1, 8, 8), torch.zeros(9).long()))


@pytest.mark.parametrize("verb", NEURONS)
@pytest.mark.parametrize("wrong", [None, 5, nn.Linear(2, 2), LOADER], ids=lambda wrong: type(wrong).__name__)
def test_something_else_than_neurons(good: Given, verb: str, wrong: object) -> None:
    given = Given(**{**vars(good), "neurons": wrong})
    with pytest.raises(
        ts.TorchsliceError, match=rf"(expected|needed are) neurons.* got {type(wrong).__name__}.*find_neu"
    ):
        NEURONS[verb](given)


@pytest.mark.parametrize("verb", TASK)
@pytest.mark.parametrize("wrong", [None, 5, nn.Linear(2, 2), LOADER], ids=lambda wrong: type(wrong).__name__)
def test_something_else_than_a_task(good: Given, verb: str, wrong: object) -> None:
    given = Given(**{**vars(good), "task": wrong})
    with pytest.raises(ts.TorchsliceError, match=rf"expected a Task, got {type(wrong).__name__}; make one"):
        TASK[verb](given)


@pytest.mark.parametrize("verb", MODEL)
@pytest.mark.parametrize("wrong", [None, "resnet18", {"weight": torch.zeros(2)}, nn.Linear], ids=str)
def test_something_else_than_a_model(good: Given, verb: str, wrong: object) -> None:
    given = Given(**{**vars(good), "model": wrong})
    with pytest.raises(ts.TorchsliceError, match=rf"expected an nn.Module, got {type(wrong).__name__}"):
        MODEL[verb](given)


@pytest.mark.parametrize("verb", SLICE)
@pytest.mark.parametrize("wrong", [None, {"conv1": [0]}, torch.ones(8)], ids=lambda wrong: type(wrong).__name__)
def test_something_else_than_a_slice(good: Given, verb: str, wrong: object) -> None:
    given = Given(**{**vars(good), "part": wrong})
    with pytest.raises(ts.TorchsliceError, match=rf"[Ss]lice.* {type(wrong).__name__}"):
        NEURONS[verb](given)


def test_the_verbs_accept_what_they_ask_for(good: Given) -> None:
    task = good.task.limit(train=24, validation=9, test=9)
    given = Given(**{**vars(good), "task": task})
    for name, verb in {**NEURONS, **TASK, **MODEL}.items():
        if name in ("save", "extend"):  # writes a file; needs new classes
            continue
        verb(replace_model(given))


def replace_model(given: Given) -> Given:
    """A network of its own for a verb that trains in place or attaches gates."""
    model = lively(Tiny())
    return Given(**{**vars(given), "model": model, "neurons": replace(given.neurons).on(model)})


#: What is mistaken easily, and words of the answer.
MISTAKES: list[tuple[Callable[[Given], object], str]] = [
    (lambda g: ts.fit(g.model, g.task, 3), "training must be a Training, such as Training.epochs=3.; got 3"),
    (lambda g: ts.finetune(g.model, g.task, 3), "training must be a Training"),
    (lambda g: ts.fit(g.model, g.task, QUICK, objective="cohesion"), "objective must be a function .* got 'cohesion'"),
    (lambda g: ts.Training(seed=2**64), "seed must be below 2..63, got"),
    (lambda g: ts.Training(device="meta") and ts.fit(g.model, g.task, ts.Training(device="meta")), "device 'meta'"),
    (lambda g: ts.semantic.class_slices(g.neurons, g.task, strategy="reach-theta"), "strategy must be one such as"),
    (lambda g: ts.semantic.class_slices(g.neurons, g.task, "taylor"), "scores must be contributions.* got str"),
    (lambda g: ts.subtasks.rank(g.neurons, g.task, "taylor"), "scores must be contributions.* got str"),
    (lambda g: ts.subtasks.rank(g.neurons, g.task, cost=-1), "cost must be 0 or more, got -1"),
    (lambda g: ts.subtasks.objective(g.neurons, g.slices), "needed are rankings, .* got a Slice"),
    (lambda g: ts.reuse(g.neurons, g.task, g.slices, classes=[0, 1]), "unknown class of .* 0"),
    (lambda g: ts.data.load(3), "unknown data set 3"),
    (lambda g: ts.models.create(3), "unknown model 3"),
    (lambda g: ts.data.task(train=None), "train must be a DataLoader"),
    (lambda g: ts.judge.calibrate(g.neurons, g.task, logits=torch.zeros(2, 3)), r"logits \[n, C\] of .* got \[2, 3\]"),
    (lambda g: ts.judge.calibration_error(torch.zeros(3), torch.zeros(3).long()), r"needed are logits .* got \[3\]"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_what_is_mistaken_easily(good: Given, call: Callable[[Given], object], message: str) -> None:
    with pytest.raises(ts.TorchsliceError, match=message):
        call(good)
