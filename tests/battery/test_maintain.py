"""Maintenance on inputs of any structure: the model untouched, the test split unread, frozen bits frozen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import torchslice as ts
from tests.battery.trained import KINDS, QUICK, learnable, sealed, trained
from tests.nets import assert_equal, state
from torchslice.graph.plan import plan
from torchslice.judge import predict

NAMES = pytest.mark.parametrize("name", KINDS)


@NAMES
@pytest.mark.parametrize("method", ["lamp", "structured"])
def test_restructure(name: str, method: str) -> None:
    neurons, task = trained(name)
    before, critical = state(neurons.model), neurons.random(0.8)
    scores = {n: torch.rand(layer.count) for n, layer in neurons.layers.items()} if method == "structured" else None
    made = ts.restructure(
        neurons,
        sealed(task),
        critical,
        method=method,
        param_retention=0.6,
        scores=scores,
        max_accuracy_loss=None,
        training=QUICK,
    )
    assert made.best["param_retention"] <= 0.6 and made.about["stopped"] == "target"
    assert [type(m) for m in made.model.modules()] == [type(m) for m in neurons.model.modules()]
    assert ts.accuracy(made.model, task, "validation").overall == made.best["validation_accuracy"] > 0.5
    assert_equal(state(neurons.model), before)


@NAMES
def test_readapt_moves_the_critical_neurons_alone(name: str) -> None:
    neurons, task = trained(name)
    before, critical = state(neurons.model), neurons.random(0.5)
    new = learnable(name, seed=50).train
    made = ts.readapt(
        neurons, sealed(task), critical, new, training=replace(QUICK, learning_rate=0.01, optimizer="adamw")
    )
    assert made.about["param_fraction"] < 1 and made.best["validation_accuracy"] > 0.8
    assert_equal(state(neurons.model), before)
    moved = 0
    for layer, mask in critical.masks.items():
        was, now = neurons.model.get_submodule(layer).weight, made.model.get_submodule(layer).weight
        assert torch.equal(was[~mask], now[~mask])
        moved += int((was[mask] != now[mask]).any())
    assert moved or made.kept == 0
    assert torch.equal(made.model.head.weight, neurons.model.head.weight)


@NAMES
@pytest.mark.parametrize("options", [{}, {"replay": 0.5, "settle": 1, "widen": 1.5}])
def test_extend_forgets_nothing(name: str, options) -> None:
    neurons, task = trained(name)
    six = learnable(name, classes=6)
    new, before, critical = six.restrict(["eel", "fox"]), state(neurons.model), neurons.random(0.6)
    training = replace(QUICK, epochs=6, learning_rate=0.1)
    made = ts.extend(
        neurons, sealed(new), critical, known=sealed(task) if options else None, training=training, **options
    )
    assert made.classes == (*task.classes, "eel", "fox")
    assert_equal(state(neurons.model), before)
    if not options:
        assert torch.equal(predict(made.network(0), task), predict(ts.extract(neurons, critical), task))
    assert ts.accuracy(made.network(), new).overall > 0.7
    if options:  # it has settled
        assert ts.accuracy(made.network(0), task).overall > 0.5
        assert ts.accuracy(made.joined(), six).overall > 0.5
        assert len(made.neurons) > len(neurons)


@NAMES
def test_extending_twice(name: str) -> None:
    neurons, task = trained(name)
    six, critical = learnable(name, classes=6), neurons.random(0.4)
    once = ts.extend(neurons, sealed(six.restrict(["eel"])), critical, known=sealed(task), replay=0.5, training=QUICK)
    known = ts.data.joined(task, six.restrict(["eel"]))
    more = critical | once.neurons.random(0.5, seed=1)
    twice = ts.extend(once, sealed(six.restrict(["fox"])), more, known=sealed(known), replay=0.5, training=QUICK)
    assert twice.classes == (*task.classes, "eel", "fox")
    assert torch.equal(predict(twice.network(0), task), predict(once.network(0), task))
    assert not plan(twice.neurons, twice.neurons.full()).held


@NAMES
def test_replacing_leaves_the_other_logits_alone(name: str, tmp_path) -> None:
    neurons, task = trained(name)
    before = state(neurons.model)
    made = ts.replace(neurons, {"bee": neurons}, sealed(task))
    logits, was = predict(made.model, task), predict(neurons.model, task)
    assert torch.equal(logits[:, [0, 2, 3]], was[:, [0, 2, 3]]) and not torch.equal(logits, was)
    ts.save(made, tmp_path / "better.safetensors")
    again = ts.load(tmp_path / "better.safetensors", allow_import=True)
    assert torch.equal(predict(again.model, task), logits) and again.classes == task.classes
    assert ts.export(made, tmp_path / "better.onnx", samples=next(iter(task.batches("test", 5)))[0]).difference < 1e-4
    assert_equal(state(neurons.model), before)


@NAMES
def test_composing_parts_of_one_parent(name: str) -> None:
    neurons, task = trained(name)
    sides = [task.classes[:2], task.classes[2:]]
    parts = [ts.extract(neurons, neurons.full(), classes=side) for side in sides]
    made = ts.compose(
        [ts.find_neurons(part, task.example, classes=side) for part, side in zip(parts, sides, strict=True)],
        sealed(task),
    )
    assert made["composed"]["validation_accuracy"] > 0.8 and made.classes == task.classes
    macs = {part: of.macs for part, of in made.costs.items()}
    assert macs["together"] == macs["part 1"] + macs["part 2"] + 4 * 4
