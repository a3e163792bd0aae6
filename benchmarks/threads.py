"""Threads: eight of them find, cut, mask, save, load and run shared networks and their own, and get what one gets."""

from __future__ import annotations

import copy
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchslice as ts
from torchslice.artefact import read_record
from torchslice.graph.neurons import Neurons
from torchslice.tables import table

THREADS = 8
NETWORKS = {"convnet": 0.125, "resnet20": 0.25, "mobilenet": 0.05}  # and their widths
SLICES = 4  # per network


def logits(network: nn.Module, example: Any) -> Tensor:
    """Run a network without gradients."""
    with torch.no_grad():
        return network(example)


def saved(network: nn.Module, folder: Path, number: int) -> Path:
    """Save a network to a file of this call alone."""
    path = folder / f"{number}.safetensors"
    ts.save(network, path)
    return path


def loaded(neurons: Neurons, folder: Path, number: int) -> Tensor:
    """Return the logits of a network that was saved and loaded."""
    path = saved(neurons.model, folder, number)
    found = logits(ts.load(path).model, neurons.example)
    path.unlink()
    return found


def hash_of_file(neurons: Neurons, folder: Path, number: int) -> str:
    """Return the hash in the file of a network."""
    path = saved(neurons.model, folder, number)
    found = read_record(path)["sha256"]
    path.unlink()
    return found


#: name -> what is done with the neurons of a network, a slice of it, a folder and the number of the call
VERBS: dict[str, Callable[[Neurons, ts.Slice, Path, int], Any]] = {
    "find": lambda neurons, part, folder, number: str(ts.find_neurons(neurons.model, neurons.example)),
    "extract": lambda neurons, part, folder, number: logits(ts.extract(neurons, part), neurons.example),
    "mask": lambda neurons, part, folder, number: logits(ts.masked(neurons, part), neurons.example),
    "save": lambda neurons, part, folder, number: hash_of_file(neurons, folder, number),
    "load": lambda neurons, part, folder, number: loaded(neurons, folder, number),
    "infer": lambda neurons, part, folder, number: logits(neurons.model, neurons.example),
}


def run(*, count: int = 1000, seed: int = 0) -> tuple[str, list[str]]:
    """Make so many calls from eight threads; return a table of them, and which gave another result than alone."""
    torch.manual_seed(seed)
    example = torch.randn(2, 1, 8, 8)
    shared = {
        name: ts.find_neurons(ts.models.create(name, channels=1, width=width).eval(), example)
        for name, width in NETWORKS.items()
    }
    parts = {name: [neurons.random(0.5, seed=i) for i in range(SLICES)] for name, neurons in shared.items()}
    rng = random.Random(seed)
    calls = [
        (number, verb, name, rng.randrange(SLICES), rng.random() < 0.5)
        for number in range(count)
        for verb, name in [(rng.choice([*VERBS]), rng.choice([*NETWORKS]))]
    ]
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)

        @cache
        def alone(verb: str, name: str, which: int) -> Any:
            return VERBS[verb](shared[name], parts[name][which], folder, -1)

        for _, verb, name, which, _ in calls:
            alone(verb, name, which)

        def call(number: int, verb: str, name: str, which: int, own: bool) -> None:
            neurons = shared[name]
            if own:
                neurons = neurons.on(copy.deepcopy(neurons.model))
            what = f"{verb} of {'an own' if own else 'a shared'} {name}, call {number}"
            try:
                found, expected = VERBS[verb](neurons, parts[name][which], folder, number), alone(verb, name, which)
            except Exception as error:
                wrong.append(f"{what}: {type(error).__name__}: {error}")
                return
            if not (torch.equal(found, expected) if isinstance(found, Tensor) else found == expected):
                wrong.append(f"{what}: another result than alone")

        with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(lambda arguments: call(*arguments), calls))
    done = Counter((verb, own) for _, verb, _, _, own in calls)
    rows = [[verb, *(str(done[verb, own]) for own in (False, True))] for verb in VERBS]
    rows.append(["all", *(str(sum(done[verb, own] for verb in VERBS)) for own in (False, True))])
    return table(("verb", "calls on shared networks", "on networks of one thread"), rows), wrong
