"""Readapting learns new samples by critical neurons only, and leaves all others as they were."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.battery.zoo import prepared
from tests.maintain.tasks import noise, quick
from tests.nets import Tiny, assert_equal, lively, state, stripes
from torchslice.data import Images, Stored
from torchslice.errors import TorchsliceError
from torchslice.graph.find import find_neurons
from torchslice.graph.neurons import Neurons
from torchslice.maintain.partial import moving_rows
from torchslice.maintain.readapt import TRAINING, adapt, readapt
from torchslice.slices import Slice
from torchslice.training import accuracy, finetune

TASK = stripes()
SLICE = Slice({"conv1": torch.arange(8) < 5, "conv2": torch.arange(6) % 2 == 0})
DIMMED = Images(TASK.train.images // 2, TASK.train.labels)  # new samples: half as bright
ADAMW = quick(epochs=2, learning_rate=0.02, optimizer="adamw")


@pytest.fixture(scope="module")
def neurons() -> Neurons:
    trained = finetune(lively(Tiny()), TASK, quick(epochs=10, learning_rate=0.1)).model
    return find_neurons(trained, TASK.example)


def test_it_learns_new_samples_and_keeps_the_old(neurons: Neurons) -> None:
    result = readapt(neurons, TASK, SLICE, DIMMED, training=replace(ADAMW, epochs=4))
    before, after = result.log[0], result.best
    assert before["clean_accuracy"] > 0.9 and before["new_accuracy"] < 0.5 < 0.8 < after["new_accuracy"]
    assert after["clean_accuracy"] > 0.9 and len(result.log) == 5
    assert [row["steps"] for row in result.log[:3]] == [0, 7, 14]  # 96 new and 96 old
    assert accuracy(result.model, TASK, "validation").overall == after["clean_accuracy"]
    # conv1 5 x (9 + 1 + 2), conv2 3 x (72 + 1 + 2), of 567
    assert result.about == {"replay": 1.0, "param_fraction": (60 + 225) / 567} and not result.model.training
    assert json.loads(json.dumps(result.to_plain()))["log"][0]["steps"] == 0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("classifier", "precision"), [(False, "fp32"), (True, "bf16")])
def test_all_else_stays_bit_for_bit(neurons: Neurons, classifier: bool, precision: str, optimizer: str) -> None:
    before = state(neurons.model)
    training = replace(ADAMW, precision=precision, weight_decay=0.1, optimizer=optimizer)
    adapted = readapt(neurons, TASK, SLICE, DIMMED, classifier=classifier, training=training)
    assert_equal(state(neurons.model), before)
    frozen = {"conv1": ~SLICE["conv1"], "norm1": ~SLICE["conv1"], "conv2": ~SLICE["conv2"], "norm2": ~SLICE["conv2"]}
    frozen["head"] = torch.full((3,), not classifier)
    for name, tensor in adapted.model.state_dict().items():
        where = frozen[name.split(".")[0]]
        if tensor.dim():
            assert torch.equal(tensor[where], before[name][where]), name
        if name.endswith("weight") and not where.all():
            assert not torch.equal(tensor[~where], before[name][~where]), name


@pytest.mark.parametrize("name", ["two inputs", "dictionary", "tokens", "answering", "mlp", "gated", "preactivation"])
def test_only_critical_neurons_move_in_every_kind_of_network(name: str) -> None:
    neurons = prepared(name)
    task, slice_ = noise(neurons, count=40), neurons.random(0.3, seed=1)
    training = quick(learning_rate=0.01, optimizer="adamw", weight_decay=0.1)
    result = readapt(neurons, task, slice_, task.train, training=training)
    rows, before, moved = moving_rows(neurons, slice_), state(neurons.model), 0
    for key, tensor in result.model.state_dict().items():
        frozen, layer = torch.ones(len(tensor) if tensor.dim() else 1, dtype=torch.bool), key.rpartition(".")[0]
        if layer in rows and tensor.dim():
            frozen[rows[layer]] = False
        tensor, old = tensor.reshape(len(frozen), -1), before[key].reshape(len(frozen), -1)
        assert torch.equal(tensor[frozen], old[frozen]), key
        moved += int((tensor != old).sum())
    assert moved or result.kept == 0


def test_the_best_mean_is_kept(neurons: Neurons, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.1, 0.9, 0.5, 0.7, 0.8, 0.4, 0.3, 0.2])  # new, clean, new, clean, ...
    score = type("Score", (), {"overall": property(lambda _: next(values))})
    monkeypatch.setattr(sys.modules[readapt.__module__], "accuracy", lambda *_, **__: score())
    result = adapt(neurons.model, TASK, DIMMED, training=replace(ADAMW, epochs=3))
    assert result.kept == 2 and result.best["validation_accuracy"] == pytest.approx(0.6)


def test_several_replays_are_tried(neurons: Neurons) -> None:
    def run(replay: Any) -> Any:
        return readapt(neurons, TASK, SLICE, DIMMED, replay=replay, training=ADAMW)

    single, both = {value: run(value) for value in (0, 0.5)}, run((0, 0.5))
    best = max(single.values(), key=lambda result: result.best["validation_accuracy"])
    assert both.about == best.about and both.kept == best.kept
    assert_equal(state(both.model), state(best.model))
    assert single[0].log[1]["steps"] == 4 and single[0.5].log[1]["steps"] == 5  # 96 new samples, with 48 old ones
    assert not torch.equal(single[0].model.conv1.weight, single[0.5].model.conv1.weight)


def test_what_is_held_out_is_not_trained_on_and_all_is_prepared_as_the_task(
    neurons: Neurons, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, original = [], Tiny.forward

    def forward(self: Tiny, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen.append(x.detach())
        return original(self, x)

    monkeypatch.setattr(Tiny, "forward", forward)
    adapt(neurons.model, TASK, DIMMED, replay=0, validation_fraction=0.5, training=replace(ADAMW, epochs=1))
    trained = {tuple(image.flatten().tolist()) for image in torch.cat(seen)}
    assert DIMMED.mean != TASK.train.mean
    given = {tuple(image.flatten().tolist()) for image in TASK.train.normalise(DIMMED.images)}
    assert len(trained) == 60 and trained < given


def test_adapt_trains_what_requires_a_gradient(neurons: Neurons) -> None:
    network = Tiny()
    network.load_state_dict(neurons.model.state_dict())
    network.conv1.requires_grad_(False)
    result = adapt(network.eval(), TASK, DIMMED, training=ADAMW)
    assert result.kept and torch.equal(result.model.conv1.weight, network.conv1.weight)
    assert not torch.equal(result.model.conv2.weight, network.conv2.weight)
    assert result.about["param_fraction"] == (567 - 80) / 567


IMAGES = torch.zeros(8, 1, 8, 8, dtype=torch.uint8)
LABELS = torch.arange(8) % 3


@pytest.mark.parametrize(
    ("critical", "samples", "options", "message"),
    [
        (SLICE | ~SLICE, DIMMED, {}, "covers every neuron, so nothing would be spared; choose a smaller one, or use"),
        (SLICE - SLICE, DIMMED, {}, "nothing would move: no neuron of the slice"),
        (Slice({"conv1": torch.arange(8) < 5}), DIMMED, {}, "slices of different models: layer 'conv2'"),
        (SLICE, Images(IMAGES, torch.arange(8) % 4), {}, r"has label 3, and stripes has 3 classes \(labels 0 to 2\)"),
        (SLICE, Images(IMAGES[:, :, :6], LABELS), {}, "takes images of 1x8x8, and these are 1x6x8"),
        (
            SLICE,
            Stored(IMAGES.float(), LABELS),
            {},
            "new samples are a Stored, and those of stripes are Images; give a split of a task that is made alike",
        ),
        (SLICE, Images(IMAGES[:3], torch.arange(3)), {}, "3 new samples are too few"),
        (SLICE, DIMMED, {"validation_fraction": 1.5}, "between 0 and 1, got 1.5"),
        (SLICE, DIMMED, {"replay": -1}, "replay must be 0 or more, or several such numbers; got -1"),
        (SLICE, DIMMED, {"replay": (1, -1)}, r"replay must be 0 or more, or several such numbers; got \(1, -1\)"),
    ],
)
def test_bad_input(neurons: Neurons, critical: Slice, samples: Any, options: dict[str, Any], message: str) -> None:
    before = state(neurons.model)
    with pytest.raises(TorchsliceError, match=message):
        readapt(neurons, TASK, critical, samples, **{"training": ADAMW, **options})
    assert_equal(state(neurons.model), before)
    assert (TRAINING.optimizer, TRAINING.learning_rate, TRAINING.batch_size) == ("adamw", 0.005, 64)
