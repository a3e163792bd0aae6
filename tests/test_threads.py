"""Threads: what one does to a model, or to another, is not seen by those that run it meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.battery.zoo import make, prepared
from torchslice.cut.extract import extract, masked, retention
from torchslice.graph.activations import find_activations, reading
from torchslice.graph.find import find_neurons

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
    answer, wrong, stop = unrelated(x).detach(), [], threading.Event()
    finders = 5

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
    where, stop, different, answers = find_activations(neurons), threading.Event(), [], []

    def cut() -> None:
        try:
            for turn in range(6):
                slice_ = slices[turn % 3]
                extract(neurons, slice_)
                retention(neurons, slice_)
                with torch.no_grad():
                    masked(neurons, slice_)(*_arguments(neurons.example))
                    with reading(neurons.model, where):
                        neurons.logits(neurons.example)
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


def _arguments(example):
    return example if isinstance(example, tuple) else (example,)
