"""Removing a class cuts what only it needs; updating one leaves the logits of the others as they are, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.maintain.tasks import quick
from tests.nets import Tiny, assert_equal, lively, state, stripes
from torchslice.cut.extract import extract
from torchslice.data import Images
from torchslice.errors import TorchsliceError
from torchslice.graph.find import find_neurons
from torchslice.graph.neurons import Neurons
from torchslice.judge import predict
from torchslice.maintain import remove, update
from torchslice.slices import Slice
from torchslice.training import accuracy, finetune

TASK = stripes()
FIRST, *REST = TASK.classes
SLICES = {
    name: Slice({"conv1": torch.arange(8) % 4 >= low, "conv2": torch.arange(6) >= low})
    for low, name in enumerate(TASK.classes)
}  # each holds the next: what only the first needs is neurons 0 and 4, and neuron 0


@pytest.fixture(scope="module")
def neurons() -> Neurons:
    trained = finetune(lively(Tiny()), TASK, quick(epochs=10, learning_rate=0.1)).model
    return find_neurons(trained, TASK.example, classes=TASK.classes)


# -- removing -----------------------------------------------------------------------------------------------------
def test_the_row_and_the_neurons_of_the_class_alone_go(neurons: Neurons) -> None:
    before = state(neurons.model)
    made = remove(neurons, SLICES, classes=[FIRST])
    assert [made.conv1.out_channels, made.conv2.out_channels, made.head.out_features] == [6, 5, 2]
    kept = Slice({"conv1": torch.arange(8) % 4 > 0, "conv2": torch.arange(6) > 0})
    same, rest = extract(neurons, kept, classes=REST), TASK.restrict(REST)
    assert torch.equal(predict(made, rest), predict(same, rest))
    assert_equal(state(neurons.model), before)


def test_nothing_but_the_row_goes_where_all_neurons_are_shared(neurons: Neurons) -> None:
    made = remove(neurons, dict.fromkeys(TASK.classes, neurons.full()), classes=[FIRST])
    assert torch.allclose(predict(made, TASK), predict(neurons.model, TASK)[:, 1:], atol=1e-5)


def test_classes_that_have_names_are_found_by_them(neurons: Neurons) -> None:
    made = [remove(neurons, slices, classes=[FIRST]) for slices in (SLICES, dict(reversed(SLICES.items())))]
    assert torch.equal(*(predict(network, TASK) for network in made))


def test_two_classes_must_be_left(neurons: Neurons) -> None:
    for classes, text in [
        (REST, f"without {', '.join(REST)} there would be 1 of 3 classes left"),
        (list(TASK.classes), "0 of 3 classes left; remove one, and leave two"),
        (["pink"], "unknown class 'pink'"),
        ([], "without nothing"),
    ]:
        with pytest.raises(TorchsliceError, match=text):
            remove(neurons, SLICES, classes=classes)
    with pytest.raises(TorchsliceError, match="unknown class 'pink'"):
        remove(neurons, {"pink": SLICES[FIRST], **{name: SLICES[name] for name in REST}}, classes=REST[:1])
    for slices in ({FIRST: SLICES[FIRST]}, neurons.full()):
        with pytest.raises(TorchsliceError, match="slices of all 3 classes"):
            remove(neurons, slices, classes=[FIRST])  # type: ignore[arg-type]


# -- updating -----------------------------------------------------------------------------------------------------
def samples(name: str, *, dim: int = 2, task=TASK) -> Images:
    of_class = task.train.take(task.train.labels == task.classes.index(name))
    return replace(of_class, images=of_class.images // dim)


def test_a_class_is_learned_anew_and_the_other_logits_stay(neurons: Neurons) -> None:
    name, label = REST[0], 1
    before, new = state(neurons.model), samples(name, dim=3)
    dim = replace(TASK, test=samples(name, dim=3, task=stripes(seed=5)))
    was = accuracy(neurons.model, dim).per_class[label]
    made = update(
        neurons, TASK, neurons.random(0.8), new, training=quick(epochs=8, learning_rate=0.02, optimizer="adamw")
    )
    now = accuracy(made.model, dim).per_class[label]
    assert was is not None and now is not None and was < 0.3 < 0.8 < now
    others = [0, 2]
    for task in (TASK, dim):
        assert torch.equal(predict(made.model, task)[:, others], predict(neurons.model, task)[:, others])
    assert made["replaced"]["others_accuracy"] >= made["before"]["others_accuracy"]
    assert_equal(state(neurons.model), before)
    assert [*made.costs] == ["network", f"part for {name}", "together"]
    assert made.costs[f"part for {name}"].macs < made.costs["network"].macs


def test_new_samples_that_do_not_fit(neurons: Neurons) -> None:
    with pytest.raises(TorchsliceError, match=f"these are of {', '.join(TASK.classes)}; update one after the other"):
        update(neurons, TASK, neurons.full(), TASK.train)
    with pytest.raises(TorchsliceError, match="replay must be above 0, got 0"):
        update(neurons, TASK, neurons.full(), samples(FIRST), replay=0)
    with pytest.raises(TorchsliceError, match="label 4.*For new classes use extend"):
        update(neurons, TASK, neurons.full(), samples(FIRST).relabelled(torch.full((40,), 4)))
