"""Threads: what one does to a model, or to another, is not seen by those that run it meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import torchslice as ts
from tests.battery.trained import QUICK, learnable
from tests.battery.zoo import TwoInputs, make, prepared
from torchslice.cut.widen import widen
from torchslice.data import Task
from torchslice.graph.activations import find_activations, reading
from torchslice.graph.find import find_neurons
from torchslice.graph.neurons import Neurons
from torchslice.judge import calibrate, evaluate_stages, latency_ms, predict, recalibrate

MODELS = ("reused", "two inputs", "mobilenet")


def at_once(*jobs: Callable[[], None]) -> None:
    """Run jobs in threads that start together; an exception in one of them is raised here."""
    barrier, failed = threading.Barrier(len(jobs)), []

    def run(job: Callable[[], None]) -> None:
        torch.set_num_threads(1)
        barrier.wait()
        try:
            job()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def signature(neurons) -> tuple:
    return str(neurons), neurons.layers, neurons.wires.tolist(), len(neurons.flow.steps)


@pytest.mark.parametrize("shared", [True, False])
def test_eight_threads_find_what_one_finds_while_others_run(shared: bool) -> None:
    expected = {name: signature(prepared(name)) for name in MODELS}
    unrelated, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    answer, wrong, stop, finders = unrelated(x).detach(), [], threading.Event(), 5

    def find(number: int) -> None:
        try:
            for turn in range(8):
                name = MODELS[(number + turn) % len(MODELS)]
                model, example = (prepared(name).model, prepared(name).example) if shared else make(name)
                found = signature(find_neurons(model, example))
                if found != expected[name]:
                    wrong.append((name, found))
        finally:
            done.append(number)
            if len(done) == finders:
                stop.set()

    def infer() -> None:
        while not stop.is_set():
            if not torch.equal(unrelated(x), answer):
                wrong.append("an answer")

    done: list[int] = []
    at_once(*(lambda number=number: find(number) for number in range(finders)), infer, infer, infer)
    assert not wrong, wrong[:3]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_being_cut_answers_as_ever(name: str) -> None:
    neurons = prepared(name)
    with torch.no_grad():
        expected = neurons.logits(neurons.example)
    slices = [neurons.random(0.5, seed=seed) for seed in range(3)]
    stop, different, answers = threading.Event(), [], []

    def cut() -> None:
        try:
            for turn in range(6):
                ts.extract(neurons, slices[turn % 3])
                find_neurons(neurons.model, neurons.example)
        finally:
            stop.set()

    def infer() -> None:
        while not stop.is_set():
            with torch.no_grad():
                answers.append(1)
                if not torch.equal(neurons.logits(neurons.example), expected):
                    different.append(1)

    at_once(cut, *[infer] * 4)
    assert len(answers) > 20 and not different, f"{len(different)} of {len(answers)} answers differ"


class Served(TwoInputs):
    """Whenever it, or a copy of it, runs in the main thread, another thread runs the served network in the middle."""

    ask: Callable[[], None] | None = None

    def forward(self, image: Tensor, attributes: Tensor) -> Tensor:
        logits = super().forward(image, attributes)
        if Served.ask is not None and threading.current_thread() is threading.main_thread():
            asking = threading.Thread(target=Served.ask)
            asking.start()
            asking.join()
        return logits


def verbs(neurons: Neurons, task: Task) -> dict[str, Callable[[], object]]:
    """Every verb that is given a network which others may be running, and leaves it as it is."""
    half, pair, training = neurons.random(0.5), ["ant", "dog"], replace(QUICK, epochs=1)
    slices = {label: neurons.random(0.5, seed=seed) for seed, label in enumerate(task.classes)}
    new = learnable("two inputs", classes=6).restrict(["eel", "fox"])
    scores = {name: torch.rand(layer.count) for name, layer in neurons.layers.items()}
    smaller = {"method": "structured", "scores": scores, "param_retention": 0.3, "training": training}
    wider = {"known": task, "replay": 0.5, "settle": 1, "widen": 1.5, "training": training}

    def read() -> None:
        with reading(neurons.model, find_activations(neurons)):
            neurons.logits(neurons.example)

    return {
        "find_neurons": lambda: find_neurons(neurons.model, task.example),
        "activations": read,
        "extract": lambda: ts.extract(neurons, half, classes=pair),
        "masked": lambda: predict(ts.masked(neurons, half), task, "validation"),
        "widen": lambda: widen(neurons, factor=1.5),
        "accuracy": lambda: ts.accuracy(neurons.model, task, "validation"),
        "latency": lambda: latency_ms({"model": neurons.model}, task.example, batch_sizes=(1,), repeats=1),
        "contributions": lambda: ts.semantic.contributions(neurons, task, samples_per_class=4, progress=False),
        "recalibrate": lambda: recalibrate(neurons.model, task),
        "calibrate": lambda: calibrate(neurons, task),
        "finetune": lambda: ts.finetune(neurons.model, task, training),
        "stages": lambda: evaluate_stages(neurons, task, half, classes=pair, training=training, latency_repeats=1),
        "reuse": lambda: ts.reuse(neurons, task, slices, classes=pair, training=training),
        "restructure": lambda: ts.restructure(neurons, task, half, max_accuracy_loss=None, **smaller),
        "readapt": lambda: ts.readapt(neurons, task, half, task.validation, training=training),
        "extend": lambda: ts.extend(neurons, new, half, **wider),
    }


def test_no_verb_shows_in_the_answers_of_a_network_that_is_being_served(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    task, model = learnable("two inputs"), Served(num_classes=4)
    ts.fit(model, task, replace(QUICK, epochs=2))
    neurons = find_neurons(model, task.example, classes=task.classes)
    with torch.no_grad():
        expected = neurons.logits(neurons.example)
    answers: list[bool] = []

    def ask() -> None:
        with torch.no_grad():
            answers.append(torch.equal(neurons.logits(neurons.example), expected))

    for name, verb in verbs(neurons, task).items():
        answers.clear()
        monkeypatch.setattr(Served, "ask", staticmethod(ask))
        verb()
        monkeypatch.setattr(Served, "ask", None)
        assert answers, f"{name} runs no network, so this shows nothing"
        assert all(answers), f"{name}: {answers.count(False)} of {len(answers)} answers differ"
