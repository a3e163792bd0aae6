"""Replacing and composing: the layer by hand and by its properties, other logits bit for bit, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import torchslice as ts
from tests.maintain.tasks import five_stripes, quick
from tests.nets import Tiny, assert_equal, lively, state, stripes
from torchslice.artefact import load, save
from torchslice.data import Stored, Task, joined
from torchslice.errors import TorchsliceError
from torchslice.graph.find import find_neurons
from torchslice.graph.neurons import Neurons
from torchslice.judge import predict, threshold
from torchslice.maintain import compose
from torchslice.maintain import replace as replace_class
from torchslice.training import accuracy, cost, finetune

TASK = stripes()
FIRST = TASK.classes[0]


def trained(task: Task, epochs: int = 6) -> Neurons:
    start = lively(Tiny(len(task.classes)))
    return find_neurons(
        finetune(start, task, quick(epochs=epochs, learning_rate=0.1)).model, task.example, classes=task.classes
    )


def part(neurons: Neurons, task: Task, **changes: Any) -> SimpleNamespace:
    """A part as `reuse` and `load` return it."""
    given = {"model": neurons.model, "classes": task.classes, "preprocessing": task.preprocessing}
    return SimpleNamespace(**{**given, **changes})


@pytest.fixture(scope="module")
def weak() -> Neurons:
    """A network that has never seen the first class."""
    blind = replace(TASK, train=TASK.train.take(TASK.train.labels > 0))
    return trained(blind)


@pytest.fixture(scope="module")
def strong() -> Neurons:
    return trained(TASK)


# -- replacing ----------------------------------------------------------------------------------------------------
def test_a_class_improves_and_the_other_logits_stay_bit_for_bit(weak: Neurons, strong: Neurons) -> None:
    before = [state(neurons.model) for neurons in (weak, strong)]
    made = replace_class(weak, {FIRST: strong}, TASK)
    was, now = made["before"], made["replaced"]
    assert was["replaced_accuracy"] < 0.2 and now["replaced_accuracy"] > 0.8
    assert now["others_accuracy"] >= was["others_accuracy"]
    assert torch.equal(predict(made.model, TASK)[:, 1:], predict(weak.model, TASK)[:, 1:])
    assert accuracy(made.model, TASK, "validation").overall == now["validation_accuracy"]
    for neurons, old in zip((weak, strong), before, strict=True):
        assert_equal(state(neurons.model), old)
        assert not any(one is other for one in neurons.model.modules() for other in made.model.modules())


def test_it_costs_the_sum_of_its_parts_and_says_so(weak: Neurons, strong: Neurons) -> None:
    made = replace_class(weak, {FIRST: strong}, TASK)
    one, layer = cost(weak.model, TASK.example), 3 * 6
    assert made.costs["together"].macs == 2 * one.macs + layer
    assert made.costs["together"].parameters == 2 * one.parameters + layer + 3
    assert f"none of its classes: max logit below {made.thresholds['max logit']:.3g} or energy below" in str(made)
    assert f"together: {made.costs['together']}" in str(made) and f"part for {FIRST}: {one}" in str(made)


def test_a_part_for_two_classes_is_asked_once(weak: Neurons, strong: Neurons) -> None:
    made = replace_class(weak, dict.fromkeys(TASK.classes[:2], strong), TASK)
    assert [*made.costs] == ["network", f"part for {FIRST}", "together"]
    assert torch.equal(predict(made.model, TASK)[:, 2:], predict(weak.model, TASK)[:, 2:])
    assert made["replaced"]["replaced_accuracy"] > made["before"]["replaced_accuracy"]


def test_other_logits_stay_whatever_the_order_of_the_parts(weak: Neurons, strong: Neurons) -> None:
    made = replace_class(weak, {TASK.classes[1]: strong, FIRST: weak}, TASK)
    assert [*made.costs] == ["network", f"part for {TASK.classes[1]}", "together"]
    assert torch.equal(predict(made.model, TASK)[:, 2:], predict(weak.model, TASK)[:, 2:])


def test_others_keep_their_accuracy_also_if_the_part_is_of_no_use(weak: Neurons) -> None:
    useless = find_neurons(lively(Tiny()), TASK.example, classes=TASK.classes)
    made = replace_class(weak, {FIRST: useless}, TASK)
    assert made["replaced"]["others_accuracy"] >= made["before"]["others_accuracy"]


def test_the_test_split_is_never_read(weak: Neurons, strong: Neurons) -> None:
    broken = replace(TASK, test=Stored(torch.full((3, 1), torch.nan), torch.arange(3)))  # type: ignore[arg-type]
    assert replace_class(weak, {FIRST: strong}, broken).log == replace_class(weak, {FIRST: strong}, TASK).log


def test_save_load_and_export(weak: Neurons, strong: Neurons, tmp_path) -> None:
    made = replace_class(weak, {FIRST: strong}, TASK)
    save(made, tmp_path / "better.safetensors")
    again = load(tmp_path / "better.safetensors", allow_import=True)
    assert torch.equal(predict(again.model, TASK), predict(made.model, TASK)) and again.classes == TASK.classes
    assert again.metrics is not None and again.metrics["thresholds"] == made.thresholds
    samples = next(iter(TASK.batches("validation", 5)))[0]
    assert ts.export(made, tmp_path / "better.onnx", samples=samples).difference < 1e-5


# -- composing ----------------------------------------------------------------------------------------------------
def test_parts_of_different_tasks_answer_together() -> None:
    five = five_stripes()
    sides = [five.restrict(five.classes[:3]), five.restrict(five.classes[3:])]
    parts = [trained(side, epochs=20) for side in sides]
    made = compose(parts, five)
    alone = [row["validation_accuracy"] for row in made.log[:2]]
    assert min(alone) > 0.9 and made["composed"]["validation_accuracy"] > 0.8
    assert accuracy(made.model, five, "validation").overall == made["composed"]["validation_accuracy"]
    assert made.classes == five.classes
    logits = predict(made.model, five, "validation")
    assert made.thresholds == {"max logit": threshold(logits.amax(1)), "energy": threshold(logits.logsumexp(1))}
    turned = compose(parts[::-1], five)
    assert turned.classes == (*sides[1].classes, *sides[0].classes)
    order = [turned.classes.index(name) for name in five.classes]
    assert torch.allclose(predict(turned.model, five)[:, order], predict(made.model, five), atol=0.05)


def test_every_part_normalises_images_as_it_was_trained() -> None:
    five = five_stripes()
    first, second = five.restrict(five.classes[:3]), five.restrict(five.classes[3:])
    other = second.like({"mean": [0.9], "std": [0.1]})
    one, two = trained(first), trained(other)
    with pytest.raises(
        TorchsliceError, match=r"part 2 .* mean is \[0.9\] there .*std is \[0.1\] there.*renormalise=True"
    ):
        compose([part(one, first), part(two, other)], five)
    made = compose([part(one, first), part(two, other)], five, renormalise=True)
    adapted: Any = made.model.networks[1]  # type: ignore[index,union-attr]
    assert torch.allclose(predict(adapted, second), predict(two.model, other), atol=1e-4)
    frozen = [p.requires_grad for p in adapted[0].parameters()]
    assert frozen == [False, False]


# -- refusals -----------------------------------------------------------------------------------------------------
def test_parts_that_do_not_fit(weak: Neurons) -> None:
    five = five_stripes()
    rest = five.restrict(five.classes[3:])
    other = find_neurons(lively(Tiny(2)), rest.example, classes=rest.classes)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(100, 2))
    size = {**(TASK.preprocessing or {}), "input_shape": [1, 9, 9]}
    for parts, text in [
        ([weak], "at least two parts, got 1"),
        ([weak, weak], "more than one part knows 'blue', 'green', 'red'; give every class to one"),
        ([weak, nn.Linear(2, 2)], "unknown class|part 2 must be a network"),
        (
            [weak, part(other, rest, preprocessing=size)],
            r"part 2 .*input_shape is \[1, 9, 9\] there and \[1, 8, 8\] here",
        ),
        ([weak, part(other, rest, model=wide)], "part 2 does not take a tensor float32"),
        ([weak, part(other, rest, classes=rest.classes[:1])], "part 2 returns .* and names 1 classes"),
        ([weak, part(other, rest, output=lambda x: x)], "part 2 has output=, which is not kept in a file"),
    ]:
        with pytest.raises(TorchsliceError, match=text):
            compose(parts, five)
    with pytest.raises(TorchsliceError, match="give its data"):
        compose([weak, part(other, rest, preprocessing=size)], five, renormalise=True)


def test_classes_that_cannot_be_replaced(weak: Neurons, strong: Neurons) -> None:
    alone = part(strong, TASK, classes=(FIRST,))
    for parts, text in [
        ({}, "name at least one class"),
        ({"pink": strong}, "unknown class .*'pink'"),
        (dict.fromkeys(TASK.classes, strong), "none is left; compose"),
        ({FIRST: part(strong, TASK, classes=("a", "b", "c"))}, f"'{FIRST}' must know it.*a, b, c"),
        ({FIRST: alone}, f"another class to tell it from; it knows {FIRST}"),
        ({FIRST: nn.Linear(2, 2)}, "knows no names"),
    ]:
        with pytest.raises(TorchsliceError, match=text):
            replace_class(weak, parts, TASK)


def test_data_of_both_tasks_are_needed(weak: Neurons) -> None:
    with pytest.raises(TorchsliceError, match="unknown class"):
        compose(
            [weak, find_neurons(lively(Tiny(2)), TASK.example, classes=["a", "b"])],
            joined(TASK, five_stripes().restrict(five_stripes().classes[3:])),
        )
