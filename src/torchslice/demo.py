"""The whole story on the built-in digits in about a minute: train, slice, cut sub-models out, save and load one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data import Data
from .runs import Recipe, Run
from .slices import Slice
from .submodel import Reused, reuse
from .tables import percent, table
from .use import accuracy, accuracy_of, cost, latency_ms, load, predict_logits, random_like, restrict_logits, save

# Width, epochs and learning rates were chosen on the validation images.
RECIPE = Recipe(
    "convnet", "digits", model_arguments={"width": 0.75}, epochs=40, learning_rate=0.05, batch_size=32, precision="fp32"
)
TASKS = (("3", "8"), ("1", "4", "7"), ("0", "2", "5", "6", "9"))
TUNING_EPOCHS = 10
BATCH = 64  # images per forward pass where latency is measured


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
    folder: Path,
    *,
    seed: int = 0,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the demo, keep all it makes in `folder`, tell the story through `say`, and return its figures."""
    started = time.perf_counter()
    recipe = replace(RECIPE, seed=seed)
    data = recipe.load_data()
    say(f"{data!r}\nEverything is kept in {folder}\n")

    first, rest = recipe.first_epochs, recipe.epochs - recipe.first_epochs
    say(f"1. Train a {recipe.model}: {first} epochs as usual, then choose the neurons of every class, and")
    say(f"   train {rest} epochs of sub-tasks, each on the neurons of its classes alone.")
    run = Run.start(folder / "run", recipe, data)
    run.train(data, device=device)
    network = run.network(data, device=device)
    whole = accuracy(network, data)
    say(f"   Test accuracy on all {len(data.classes)} classes: {whole}\n")

    say("2. The slices of the classes:")
    found = run.find_trained_slices()
    say(_indented(found))

    say(f"3. Cut {len(TASKS)} sub-models out. Test accuracy on their classes, after each step:")
    making: dict[str, Any] = {"epochs": TUNING_EPOCHS, "seed": seed, "device": device, "progress": False}
    slices = run.slices()
    made = [reuse(network, data, slices=slices, classes=task, **making) for task in TASKS]
    scores = [_scores(network, data, one) for one in made]
    for one, score in zip(made, scores, strict=True):
        chance: dict[str, Slice] = dict.fromkeys(one.classes, random_like(one.part, seed=seed))
        control = reuse(network, data, slices=chance, classes=one.classes, **making)
        score["control: random slice"] = _score(control.model, data, one.classes)
    rows = [(_digits(one.classes), *map(percent, score.values())) for one, score in zip(made, scores, strict=True)]
    say(_indented(table(("digits", *scores[0]), rows)))
    say("   The control has as many random neurons in every layer and went the same way, fine-tuning included.\n")

    say("4. Compare their size and speed with the whole network.")
    networks = {"whole": network, **{_digits(one.classes): one.model for one in made}}
    costs = _costs(networks, data)
    say(
        _indented(
            table(("network", "parameters", "MACs", f"ms for {BATCH} images"), [_cost_row(*c) for c in costs.items()])
        )
    )

    say("5. Save them, and load one back.")
    files = [folder / f"digits-{'-'.join(one.classes)}.safetensors" for one in made]
    for one, file in zip(made, files, strict=True):
        save(one.model, file, classes=one.classes, preprocessing=data.preprocessing, slice=one.part)
    equal = torch.equal(predict_logits(load(files[0]), data), predict_logits(made[0].model.cpu(), data))
    say(f"   {files[0]}: the outputs are {'bit-equal' if equal else 'NOT the same'}.\n")

    seconds = time.perf_counter() - started
    say(f"{seconds:.0f} seconds. Next, two other digits:")
    say(f"   torchslice extract {folder / 'run'} --classes 4,9 --finetune 5 --out 4-9.safetensors")
    return {
        "folder": str(folder),
        "seconds": seconds,
        "accuracy": whole.overall,
        "slices": found.summary(),
        "sub_models": [
            {
                "classes": one.classes,
                "neuron_retention": one.part.neuron_retention,
                "accuracy": score,
                "file": str(file),
            }
            for one, score, file in zip(made, scores, files, strict=True)
        ],
        "costs": costs,
        "bit_equal": equal,
    }


def _scores(network: nn.Module, data: Data, one: Reused) -> dict[str, float]:
    """Return the test accuracy on a sub-model's classes: of the whole network, and after each step of the making."""
    task = data.restrict(one.classes)
    whole = restrict_logits(predict_logits(network, task), data.class_indices(one.classes))
    steps = {step: _score(made, data, one.classes) for step, made in one.networks.items()}
    return {"whole network": accuracy_of(whole, task.test.labels).overall, **steps}


def _score(model: nn.Module, data: Data, classes: Sequence[str]) -> float:
    return accuracy(model, data.restrict(classes)).overall


def _costs(networks: dict[str, nn.Module], data: Data) -> dict[str, dict[str, Any]]:
    """Return parameters, multiply-accumulates and latency by network, measured side by side."""
    times = latency_ms(networks, data.example, batch_sizes=(BATCH,))
    return {
        name: {**asdict(cost(model, data.example)), "latency": asdict(times[name][BATCH])}
        for name, model in networks.items()
    }


def _cost_row(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
    time = figures["latency"]
    spread = f"{time['median_ms']:.2f} ({time['lower_quartile_ms']:.2f} to {time['upper_quartile_ms']:.2f})"
    return name, f"{figures['parameters']:,}", f"{figures['macs']:,}", spread


def _digits(classes: Sequence[str]) -> str:
    return " ".join(classes)


def _indented(text: object) -> str:
    return "".join(f"   {line}\n" for line in str(text).splitlines())
