"""What networks still know of a class: figures that are known by construction."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.maintain.tasks import quick
from tests.nets import Tiny, assert_equal, lively, state, stripes
from torchslice.cut.extract import extract
from torchslice.errors import TorchsliceError
from torchslice.graph.find import find_neurons
from torchslice.graph.neurons import Neurons
from torchslice.judge import Traces, accuracy, forgetting, predict
from torchslice.training import finetune

TASK = stripes()
GONE, LEFT = "blue", ("red", "green")
REST = TASK.restrict(LEFT)
AGAIN = quick(epochs=6, learning_rate=0.05)


def neurons_of(model: torch.nn.Module) -> Neurons:
    return find_neurons(model, REST.example)


@pytest.fixture(scope="module")
def networks() -> dict[str, Neurons]:
    """One that never knew the class, one that knows it inside, and one that knows nothing."""
    control = finetune(lively(Tiny(2)), REST, quick(epochs=10, learning_rate=0.1)).model
    knowing = finetune(lively(Tiny()), TASK, quick(epochs=10, learning_rate=0.1)).model
    cut = extract(find_neurons(knowing, TASK.example), find_neurons(knowing, TASK.example).full(), classes=[0, 1])
    empty = copy.deepcopy(control)
    for parameter in empty.parameters():
        parameter.data.zero_()
    return {name: neurons_of(net) for name, net in {"control": control, "knowing": cut, "empty": empty}.items()}


@pytest.fixture(scope="module")
def found(networks: dict[str, Neurons]) -> Traces:
    return forgetting(networks, TASK, classes=[GONE], relearning=AGAIN)


def test_accuracy_and_distance_are_those_of_the_definition(networks: dict[str, Neurons], found: Traces) -> None:
    control, knowing = (predict(networks[n].model, TASK.restrict([GONE])).softmax(1) for n in ("control", "knowing"))
    assert found.rows["knowing"]["distance"] == pytest.approx(float((control - knowing).abs().amax(1).mean()), abs=1e-5)
    assert found.rows["control"]["distance"] == 0  # of two classes, total variation is the largest difference
    for name, neurons in networks.items():
        assert found.rows[name]["kept_accuracy"] == accuracy(neurons.model, REST).overall


def test_a_network_that_knew_the_class_gives_itself_away(found: Traces) -> None:
    knowing, empty = found.rows["knowing"], found.rows["empty"]
    assert set(knowing["probe"]) == {"conv1", "conv2"} and all(0 <= p <= 1 for p in knowing["probe"].values())
    assert knowing["probe"]["conv2"] > 0.95 and empty["probe"] == {"conv1": 0.5, "conv2": 0.5}
    assert empty["steps"] is None and knowing["steps"] < found.rows["control"]["steps"]


def test_it_prints_and_is_plain_data(found: Traces) -> None:
    lines = str(found).splitlines()
    assert lines[0].split() == [
        "network",
        "kept",
        "accuracy",
        "distance",
        "from",
        "the",
        "control",
        "probe,",
        "mean",
        "last",
        "layer",
        "steps",
    ]
    assert [line.split()[0] for line in lines[2:]] == ["control", "knowing", "empty"]
    assert found.to_plain()["control"]["distance"] == 0


def test_nothing_is_changed(networks: dict[str, Neurons]) -> None:
    before = {name: copy.deepcopy(state(neurons.model)) for name, neurons in networks.items()}
    forgetting(networks, TASK, classes=[GONE], relearning=quick())
    for name, neurons in networks.items():
        assert_equal(state(neurons.model), before[name])


def test_what_is_refused(networks: dict[str, Neurons]) -> None:
    with pytest.raises(TorchsliceError, match="give at least the control"):
        forgetting({}, TASK, classes=[GONE])
    with pytest.raises(TorchsliceError, match="control has 2 logits; needed are 1, of red"):
        forgetting(networks, TASK, classes=["green", GONE])
    soft = neurons_of(torch.nn.Sequential(networks["control"].model, torch.nn.Softmax(1)).eval())
    with pytest.raises(TorchsliceError, match="soft has 2 logits; needed are 2, .* straight from a layer"):
        forgetting({"soft": soft}, TASK, classes=[GONE])
    with pytest.raises(TorchsliceError, match="unknown class"):
        forgetting(networks, TASK, classes=["pink"])
