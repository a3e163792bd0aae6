"""Extending forgets nothing, learns something, and refuses what cannot be."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.battery.zoo import logits, prepared
from tests.maintain.tasks import five_stripes, noise, quick
from tests.nets import Tiny, assert_equal, lively, state, stripes
from torchslice.cut.extract import extract, masked
from torchslice.data import Images, joined, limit
from torchslice.errors import TorchsliceError
from torchslice.graph.find import find_neurons
from torchslice.graph.neurons import Neurons
from torchslice.judge.baselines import random_like, reinitialised
from torchslice.maintain.extend import extend, settle
from torchslice.maintain.tasks import Extended
from torchslice.slices import Slice
from torchslice.training import accuracy, finetune, predict

TASK = five_stripes()
OLD, NEW = TASK.restrict(TASK.classes[:3]), TASK.restrict(TASK.classes[3:])
OTHERS = replace(NEW, classes=("a", "b"))
SLICE = Slice({"conv1": torch.arange(8) < 5, "conv2": torch.arange(6) % 2 == 0})
FULL = SLICE | ~SLICE


@pytest.fixture(scope="module")
def base() -> Neurons:
    trained = finetune(lively(Tiny()), OLD, quick(epochs=6, learning_rate=0.1)).model
    return find_neurons(trained, OLD.example, classes=OLD.classes)


@pytest.fixture(scope="module")
def extended(base: Neurons) -> Extended:
    training = quick(epochs=12, learning_rate=0.1)
    return extend(base, NEW, SLICE, known=OLD, replay=1.0, training=training)


def validation(network: nn.Module, task: Any) -> float:
    return accuracy(network, task, "validation").overall


def test_the_known_classes_are_answered_bit_for_bit_as_before(base: Neurons, extended: Extended) -> None:
    before, after = extract(base, SLICE), extended.network(0)
    assert_equal(state(after), state(before))
    assert torch.equal(predict(after, OLD), predict(before, OLD))
    assert (predict(extended.model, OLD)[:, :3] - predict(base.model, OLD)).abs().max() > 1e-3
    assert base.model.head.weight.shape == (3, 6) and extended.model.head.weight.shape == (5, 6)


def test_the_new_classes_are_learned(extended: Extended) -> None:
    assert accuracy(extended.network(), NEW).overall > 0.7
    assert extended.classes == TASK.classes == extended.neurons.classes and extended.neurons.model is extended.model
    assert [task.slice_ for task in extended.tasks] == [SLICE, None]
    assert torch.allclose(predict(extended.network(1), NEW), predict(extended.model, NEW)[:, 3:], atol=1e-5)


def test_all_classes_are_told_apart_where_the_task_is_not_given(extended: Extended) -> None:
    answer = extended.joined()
    assert predict(answer, TASK).shape == (len(TASK.test), 5) and accuracy(answer, TASK).overall > 0.5
    unbiased = replace(extended, tasks=(extended.tasks[0], replace(extended.tasks[1], bias=-100.0)))
    assert accuracy(unbiased.joined(), TASK).per_class[3:] == (0.0, 0.0)
    assert validation(answer, TASK) >= validation(unbiased.joined(), TASK)


def test_the_log_says_what_was_done(base: Neurons, extended: Extended) -> None:
    steps = ["known classes, whole network", "known classes, their slice", "new classes", "all classes, task not given"]
    assert [row["step"] for row in extended.log] == steps
    networks = (base.model, extract(base, SLICE), extended.network(), extended.joined())
    for step, network, task in zip(steps, networks, (OLD, OLD, NEW, joined(OLD, NEW)), strict=True):
        assert extended[step]["validation_accuracy"] == validation(network, task), step
    moved = 3 * (9 + 3) + 3 * (8 * 9 + 3) + 2 * 7  # conv1 and conv2 with their norms, and two rows of the classifier
    assert extended["new classes"]["param_fraction"] == moved / sum(p.numel() for p in extended.model.parameters())
    assert extended["new classes"]["seconds"] > 0
    assert "broad green, broad blue: all neurons" in str(extended) and "Slice(8 of 14 neurons" in str(extended)


def test_without_replay_only_the_new_rows_compete(base: Neurons) -> None:
    before = state(base.model)
    made = extend(base, NEW, SLICE, training=quick(epochs=2, learning_rate=0.05))
    assert_equal(state(base.model), before)
    assert [row["step"] for row in made.log] == ["new classes"] and made.tasks[1].bias == 0
    both, balanced = joined(OLD, NEW), []
    for which in (made, made.calibrated(OLD, NEW)):
        found = accuracy(which.joined(), both, "validation").per_class
        balanced.append(sum(found[:3]) / 3 + sum(found[3:]) / 2)
    assert balanced[1] >= balanced[0]


def test_replay_draws_a_fraction_by_the_seed(base: Neurons, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def caught(student: nn.Module, task: Any, training: Any) -> Any:
        given.append(task)
        return finetune(student, task, training)

    monkeypatch.setattr(sys.modules[extend.__module__], "finetune", caught)
    extend(base, NEW, SLICE, known=TASK, replay=0.1, training=quick(seed=3))
    images = given[0].train.images
    assert torch.equal(images, torch.cat([limit(OLD.train, 12, seed=3).images, NEW.train.images]))
    assert len(given[0].validation) == 3 + len(NEW.validation)


@pytest.mark.parametrize("restart", [True, False])
def test_the_others_start_anew_or_go_on(base: Neurons, restart: bool) -> None:
    made = extend(base, NEW, SLICE, restart=restart, training=quick(learning_rate=1e-9))
    weight, rest = made.model.conv2.weight, ~SLICE["conv2"]
    start = reinitialised(made.model, seed=0) if restart else base.model
    assert torch.allclose(weight[rest], start.conv2.weight[rest], atol=1e-6)
    assert torch.equal(weight[~rest], base.model.conv2.weight[~rest])


def test_several_extensions_until_no_neuron_is_left(base: Neurons) -> None:
    first, second = TASK.restrict(TASK.classes[3:4]), TASK.restrict(TASK.classes[4:])
    training, more = quick(learning_rate=0.05), SLICE | random_like(SLICE, seed=3)
    once = extend(base, first, SLICE, known=OLD, replay=1.0, training=training)
    twice = extend(once, second, more, known=TASK, replay=1.0, training=training)
    assert twice.classes == TASK.classes and [len(task.classes) for task in twice.tasks] == [3, 1, 1]
    assert [task.slice_ for task in twice.tasks] == [SLICE, more, None] and len(twice.log) == 8
    assert torch.equal(predict(twice.network(0), OLD), predict(once.network(0), OLD))
    answers = predict(extract(once.neurons, more), first)[:, 3:]
    assert torch.allclose(predict(twice.network(1), first), answers, atol=1e-6)

    with pytest.raises(
        TorchsliceError, match="every neuron is critical, so none is left to train. Add fresh ones with"
    ):
        extend(twice, OTHERS, FULL, training=training)
    last = extend(twice, OTHERS, FULL, widen=1.25, training=training)
    assert len(last.neurons) == 10 + 8 and last.model.head.weight.shape[0] == 7
    assert torch.equal(predict(last.network(0), OLD), predict(once.network(0), OLD))
    assert torch.equal(predict(last.network(1), first), predict(twice.network(1), first))
    assert len(last.network(3).head.weight) == 2


ARCHITECTURES = ("two inputs", "dictionary", "answering", "tokens", "unknown", "gated", "preactivation", "convnet")


@pytest.mark.parametrize("name", [*ARCHITECTURES, "mobilenet", "resnet18", "vit"])
def test_no_architecture_forgets(name: str) -> None:
    neurons = prepared(name)
    known = noise(neurons, count=10)
    new = replace(noise(neurons, classes=2, count=8), classes=("a", "b"))
    critical, training = neurons.random(0.6, seed=1), quick(batch_size=4, learning_rate=0.05)
    made = extend(neurons, new, critical, known=known, replay=0.5, training=training)
    before, after = extract(neurons, critical), made.network(0)
    assert_equal(state(after), state(before))
    assert torch.equal(logits(after, neurons.example), logits(before, neurons.example))
    assert len(predict(made.joined(), known)[0]) == 12
    if made["new classes"]["best_epoch"]:
        whole = logits(made.model, neurons.example)[:, :10]
        assert not torch.equal(whole, logits(neurons.model, neurons.example))


def test_an_output_that_is_picked_by_a_function() -> None:
    class Pair(Tiny):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return x, super().forward(x)

    neurons = find_neurons(lively(Pair()), OLD.example, output=lambda result: result[1])
    made = extend(neurons, NEW, SLICE, known=OLD, replay=0.5, settle=1, training=quick(learning_rate=0.05))
    answers = [predict(network, OLD) for network in (made.network(0), made.network(1), made.joined())]
    assert [found.shape[1] for found in answers] == [3, 2, 5]


def test_it_is_rebuilt_from_its_model_and_plain_data(extended: Extended) -> None:
    plain = json.loads(json.dumps(extended.extension))
    loaded = Tiny(5)
    loaded.load_state_dict(extended.model.state_dict())
    again = Extended.of(find_neurons(loaded.eval(), OLD.example), plain)
    assert again.tasks == extended.tasks and again.rule == extended.rule and again.log == extended.log
    assert again.classes == again.neurons.classes == TASK.classes
    assert torch.equal(predict(again.joined(), TASK), predict(extended.joined(), TASK))
    more = extend(again, OTHERS, SLICE | random_like(SLICE, seed=5), training=quick(learning_rate=0.05))
    assert more.classes == (*TASK.classes, "a", "b") and more.tasks[0].slice_ == SLICE


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": []},
        {"tasks": [{"classes": ["a"]}]},
        {"tasks": [{"classes": [1], "slice": None, "bias": 0.0}]},
        {"tasks": [{"classes": ["a"], "slice": {"x": {"width": 2, "kept": [0]}}, "bias": 0.0}]},
        {"tasks": [{"classes": ["a"], "slice": None, "bias": "x"}]},
        {"tasks": 3},
        {"rule": "none"},
        {"log": None},
        {"log": ["text"]},
        {"log": [[[1, 2]]]},
        {"log": [{}]},
    ],
    ids=str,
)
def test_a_damaged_extension_is_refused(extended: Extended, change: dict[str, Any]) -> None:
    plain = json.loads(json.dumps(extended.extension)) | change
    with pytest.raises(TorchsliceError, match="this is no extension of the network"):
        Extended.of(extended.neurons, plain)


def test_inputs_are_prepared_as_those_of_the_known_classes(base: Neurons) -> None:
    darker = {name: Images(NEW.split(name).images // 2, NEW.split(name).labels) for name in ("train", "validation")}
    new = replace(NEW, **darker)
    assert new.train.mean != OLD.train.mean
    options = {"known": OLD, "training": quick(learning_rate=0.05)}
    made = extend(base, new, SLICE, **options)
    assert_equal(state(made.model), state(extend(base, new.like(OLD.preprocessing), SLICE, **options).model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new": TASK.restrict(["green", "broad blue"])}, "the model knows 'green' already; give data of new classes"),
        (
            {"new": TASK.restrict(["broad blue"])},
            r"a single new class \('broad blue'\) can only be told from the known",
        ),
        ({"critical": FULL}, "every neuron is critical, so none is left to train. Add fresh ones with widen=1.25"),
        ({"critical": ~FULL}, "the slice is empty; every layer needs at least one neuron"),
        ({"critical": Slice({"conv1": SLICE["conv1"]})}, "this is a slice of another model"),
        ({"known": TASK.restrict(["red", "green"]), "replay": 0.5}, "unknown class of stripes.*'blue'"),
        ({"replay": 0.5}, "replay and settle need data of the known classes: known="),
        ({"settle": 3}, "replay and settle need data of the known classes: known="),
        ({"known": OLD, "replay": 2}, r"replay must be in \[0, 1\] and settle at least 0, got 2 and 0"),
        ({"known": OLD, "settle": -1}, r"replay must be in \[0, 1\] and settle at least 0, got 0 and -1"),
        ({"known": OLD, "settle": 5, "widen": 0.5}, r"widen must be above 1 \(and below 100\), got 0.5"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(sys.modules[extend.__module__], "finetune", None)
    model = lively(Tiny())
    before, neurons = state(model), find_neurons(model, OLD.example, classes=OLD.classes)
    arguments = {"new": NEW, "critical": SLICE, "training": quick(), **change}
    with pytest.raises(TorchsliceError, match=message):
        extend(neurons, **arguments)
    assert_equal(state(model), before)


def test_classes_are_named_by_the_neurons_or_by_the_known_data() -> None:
    neurons = find_neurons(lively(Tiny()), OLD.example)
    with pytest.raises(TorchsliceError, match=r"this model does not name its classes; .* find_neurons\(model, example"):
        extend(neurons, NEW, SLICE, training=quick())
    with pytest.raises(TorchsliceError, match="the model has 3 logits, and 2 different classes are named"):
        extend(neurons, NEW, SLICE, known=OLD.restrict(["red", "green"]), training=quick())
    assert extend(neurons, NEW, SLICE, known=OLD, training=quick()).classes == TASK.classes


def test_a_model_that_was_changed_is_refused() -> None:
    model = lively(Tiny())
    neurons = find_neurons(model, OLD.example, classes=OLD.classes)
    model.conv2 = nn.Conv2d(8, 6, 3, padding=1)
    for verb in (lambda: extend(neurons, NEW, SLICE), lambda: settle(neurons, OLD, SLICE)):
        with pytest.raises(TorchsliceError, match="the model was changed after find_neurons: 'conv2'"):
            verb()


def test_what_was_learned_before_cannot_be_given_up(extended: Extended) -> None:
    with pytest.raises(TorchsliceError, match="leaves out 8 neurons through which red, green, blue are answered"):
        extend(extended, OTHERS, ~SLICE, training=quick())


def test_logits_that_do_not_come_from_a_layer_and_models_of_one_class() -> None:
    class Softened(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(1)

    for model, message in ((Softened(), "the logits do not come straight"), (Tiny(1), "the model has a single logit")):
        names = OLD.classes[: model.head.out_features]
        with pytest.raises(TorchsliceError, match=message):
            extend(find_neurons(lively(model), OLD.example, classes=names), NEW, SLICE, training=quick())


STRIPES = stripes()
NARROW = Slice({"conv1": torch.arange(8) < 4, "conv2": torch.arange(6) < 4})


def test_a_slice_settles_to_answer_alone_and_the_others_stay() -> None:
    model = finetune(lively(Tiny()), STRIPES, quick(epochs=6, learning_rate=0.1)).model
    neurons = find_neurons(model, STRIPES.example)
    settled = settle(neurons, STRIPES, NARROW, training=quick(epochs=8, learning_rate=0.1))
    found, after = neurons.on(settled.model), settled.best["validation_accuracy"]
    assert settled.log[0]["validation_accuracy"] == validation(extract(neurons, NARROW), STRIPES) < after - 0.1
    assert validation(extract(found, NARROW), STRIPES) == after
    rows = {"conv1.weight": NARROW["conv1"], "norm2.bias": NARROW["conv2"], "norm2.running_var": NARROW["conv2"]}
    for key, mask in rows.items():
        old, new = model.state_dict()[key], settled.model.state_dict()[key]
        assert torch.equal(old[~mask], new[~mask]) and not torch.equal(old[mask], new[mask])
    assert not torch.equal(model.head.weight, settled.model.head.weight)
    example = STRIPES.example
    assert (logits(settled.model, example) - logits(masked(found, NARROW), example)).abs().max() > 1e-3


def test_an_extended_network_settles_on_its_last_task(base: Neurons) -> None:
    first = NARROW & Slice({"conv1": torch.arange(8) < 2, "conv2": torch.arange(6) < 2})
    extended = extend(base, NEW, first, training=quick(epochs=2, learning_rate=0.05))
    before, known = state(extended.model), predict(extended.network(0), OLD)
    settled = settle(extended, NEW, NARROW, training=quick(epochs=6, learning_rate=0.1))
    assert settled.kept > 0 and torch.equal(predict(extended.on(settled.model).network(0), OLD), known)
    changed = {key for key, tensor in settled.model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert {"conv1.weight", "norm2.running_mean", "head.weight"} <= changed
    assert torch.equal(settled.model.head.weight[:3], extended.model.head.weight[:3])
    with pytest.raises(
        TorchsliceError, match="the last task is broad green, broad blue; give its data alone, not those"
    ):
        settle(extended, OLD, NARROW)
    with pytest.raises(TorchsliceError, match="leaves out 4 neurons through which red, green, blue are answered"):
        settle(extended, NEW, ~NARROW)
    with pytest.raises(TorchsliceError, match="there is a single class, 'red', and nothing to tell it from"):
        settle(find_neurons(lively(Tiny(1)), STRIPES.example), STRIPES.restrict(["red"]), NARROW)


def test_extend_settles_then_widens(base: Neurons) -> None:
    training = quick(epochs=2, learning_rate=0.05)
    made = extend(base, NEW, SLICE, known=OLD, settle=3, widen=1.25, training=training)
    assert [row["step"] for row in made.log] == ["known classes, settled", "new classes"]
    assert made.neurons.layers["conv1"].count == 10
    settled = settle(base, OLD, SLICE, training=replace(training, epochs=3, learning_rate=0.02)).model
    expected = predict(extract(base.on(settled), SLICE), OLD)
    assert torch.equal(predict(made.network(0), OLD), expected)
    assert made["known classes, settled"]["validation_accuracy"] == validation(made.network(0), OLD)
