"""Restructuring removes what it says, keeps what it must, and stops when it should."""

from __future__ import annotations

import copy
import json
import re
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.battery.zoo import logits, prepared
from tests.maintain.tasks import noise, quick
from tests.nets import Tiny, assert_equal, lively, state, stripes
from torchslice.cut.extract import extract
from torchslice.errors import TorchsliceError
from torchslice.graph.find import find_neurons
from torchslice.graph.neurons import Neurons
from torchslice.graph.plan import weights_of
from torchslice.inputs import batch_size
from torchslice.judge import repair
from torchslice.maintain.pruning import PRUNING
from torchslice.maintain.restructure import Sparse, removal_of_neurons, restructure, size_of
from torchslice.slices import Slice
from torchslice.training import Accuracy, Outcome, accuracy, finetune

SLICE = Slice({"conv1": torch.arange(8) < 5, "conv2": torch.arange(6) % 2 == 0})
SCORES = {"conv1": torch.tensor([8.0, 1, 7, 2, 6, 3, 5, 4]), "conv2": torch.tensor([1.0, 9, 9, 9, 9, 9])}
TASK = stripes()
TRAINING = quick(learning_rate=0.05)
ANY_LOSS: dict[str, Any] = {"max_accuracy_loss": None, "training": TRAINING}


@pytest.fixture(scope="module")
def neurons() -> Neurons:
    trained = finetune(lively(Tiny()), TASK, quick(epochs=8, learning_rate=0.1)).model
    return find_neurons(trained, TASK.example)


def zeros_of(network: nn.Module, neurons: Neurons) -> dict[str, Tensor]:
    return {name: weight == 0 for name, weight in weights_of(network, neurons).items()}


@pytest.mark.parametrize(
    "settings",
    [{"weight_decay": 0.1}, {"optimizer": "adamw", "weight_decay": 0.1, "learning_rate": 0.01}, {"precision": "bf16"}],
)
def test_removed_weights_stay_exactly_zero_in_training(neurons: Neurons, settings: dict[str, Any]) -> None:
    network, training = extract(neurons, SLICE), replace(TRAINING, epochs=2, **settings)
    for weight in weights_of(network, neurons).values():
        weight[torch.rand(weight.shape) < 0.5] = 0
    before, zeros = state(network), zeros_of(network, neurons)
    assert all(0 < mask.sum() < mask.numel() for mask in zeros.values())
    dense = finetune(network, TASK, training).model
    assert any(not torch.equal(found, zeros[n]) for n, found in zeros_of(dense, neurons).items())  # training moves them
    tuned = finetune(Sparse(network, neurons), TASK, training).model.merged()
    for name, found in zeros_of(tuned, neurons).items():
        assert torch.equal(found, zeros[name])
        assert not torch.equal(tuned.get_submodule(name).weight, network.get_submodule(name).weight)
    assert [type(module) for module in tuned.modules()] == [type(module) for module in network.modules()]
    assert_equal(state(network), before)
    assert list(tuned.state_dict()) == list(before) and all(p.is_leaf and p.requires_grad for p in tuned.parameters())


def test_size_by_hand(neurons: Neurons) -> None:
    # conv1 8x1x9 + 8, norms 2 * 8 + 2 * 6, conv2 6x8x9 + 6, head 3x6 + 3; 64 positions
    size = size_of(neurons.model, neurons)
    assert (size.parameters, size.macs) == (80 + 28 + 438 + 21, 64 * (72 + 432) + 18)
    pruned = copy.deepcopy(neurons.model)
    for name, weight in weights_of(pruned, neurons).items():
        alive = torch.zeros_like(weight, dtype=torch.bool)
        alive[0, 0] = name == "conv2"
        weight[~alive] = 0
    size = size_of(pruned, neurons)
    assert (size.parameters, size.macs) == (45 + 9, 64 * 9)


@pytest.mark.parametrize("method", PRUNING.names())
def test_an_iteration_removes_a_fifth_of_the_survivors(neurons: Neurons, method: str) -> None:
    before, training = state(neurons.model), replace(TRAINING, weight_decay=0.01)
    options = {**ANY_LOSS, "training": training}
    result = restructure(neurons, TASK, SLICE, method=method, param_retention=0.2, **options)
    assert_equal(state(neurons.model), before)
    names = [row["step"] for row in result.log]
    assert names[:4] == ["whole", "cut", "cut, retrained", "iteration 1"] and len(names) > 4
    assert result.kept == len(names) - 1
    assert result.about == {"method": method, "stopped": "target", "iterations": len(names) - 2}
    small = extract(neurons, SLICE)
    weights = sum(w.numel() for w in weights_of(small, neurons).values())
    assert weights == 5 * 9 + 3 * 5 * 9 + 9
    others, whole = sum(p.numel() for p in small.parameters()) - weights, 567
    for row in result.log[3:-1]:
        removed = -int(-weights * 0.2 // 1)
        weights_left = round(row["param_retention"] * whole) - others
        slack = 0 if method in ("lamp", "global") else 3  # these round down in each of the layers
        assert weights - removed - slack <= weights_left <= weights - removed, row
        assert row["sparsity"] == pytest.approx(1 - weights_left / 189, abs=1e-12)
        weights = weights_left
    assert 0.2 - 5 / whole < result.best["param_retention"] <= 0.2
    alive = sum(int(w.count_nonzero()) for w in weights_of(result.model, neurons).values())
    assert round(result.best["param_retention"] * whole) == alive + others
    assert accuracy(result.model, TASK, "validation").overall == result.best["validation_accuracy"]
    assert (result["whole"]["param_retention"], result["whole"]["mac_retention"]) == (1, 1)
    assert not result.model.training and all(row["seconds"] >= 0 for row in result.log)


def test_without_a_slice_nothing_is_cut(neurons: Neurons) -> None:
    result = restructure(neurons, TASK, None, param_retention=0.85, **ANY_LOSS)
    assert [row["step"] for row in result.log] == ["whole", "iteration 1"]
    masks = PRUNING["lamp"](weights_of(neurons.model, neurons), int(0.85 * 567) - 45)
    assert all(torch.equal(~zeros, masks[name]) for name, zeros in zeros_of(result.model, neurons).items())
    assert result.model.conv1.weight.shape == (8, 1, 3, 3)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace accuracies: of the whole network, and after every training."""

    def script(whole: float, trained: list[float]) -> None:
        module, results = sys.modules[restructure.__module__], iter(trained)

        def tuned(network: nn.Module, *_: Any, **__: Any) -> Outcome:
            return Outcome(network, ({"validation_accuracy": next(results)},), 0)

        monkeypatch.setattr(module, "accuracy", lambda *_, **__: Accuracy(whole, ()))
        monkeypatch.setattr(module, "finetune", tuned)

    return script


def test_it_stops_before_too_much_accuracy_is_lost(neurons: Neurons, scripted: Any) -> None:
    scripted(0.9, [0.895, 0.89, 0.8899, 0.99])
    result = restructure(neurons, TASK, None, param_retention=0.2, training=TRAINING)
    assert [row["step"] for row in result.log] == ["whole", "iteration 1", "iteration 2", "iteration 3"]
    assert (result.about["stopped"], result.best["step"]) == ("accuracy", "iteration 2")
    kept = round(567 * result.best["param_retention"])
    assert sum(int(p.count_nonzero()) for p in weights_of(result.model, neurons).values()) == kept - 45
    scripted(0.9, [0.5])
    result = restructure(neurons, TASK, None, param_retention=0.2, training=TRAINING)
    assert (result.about["stopped"], result.best["step"]) == ("accuracy", "whole")
    assert result.model is not neurons.model
    assert_equal(state(result.model), state(neurons.model))


def test_patience_wins_accuracy_back(neurons: Neurons, scripted: Any) -> None:
    scripted(0.9, [0.88, 0.9, 0.88, 0.88, 0.895, 0.7, 0.7, 0.7])
    result = restructure(neurons, TASK, SLICE, param_retention=0.15, patience=2, training=TRAINING)
    again = ["", ", training 2", ", training 3"]
    cut, first, last = ([name + turn for turn in again] for name in ("cut, retrained", "iteration 1", "iteration 2"))
    assert [row["step"] for row in result.log] == ["whole", "cut", *cut[:2], *first, *last]
    assert result.about == {"method": "lamp", "stopped": "accuracy", "iterations": 8}
    assert result.best["step"] == "iteration 1, training 3"
    cut_out = repair(neurons, SLICE, TASK, seed=TRAINING.seed)
    assert result["cut"]["validation_accuracy"] == cut_out.accuracy[cut_out.kept].overall
    sizes = [row["param_retention"] for row in result.log]
    assert sizes[2] == sizes[3] and len(set(sizes[4:7])) == 1 and sizes[4] < sizes[3]
    assert size_of(result.model, neurons).parameters == round(567 * sizes[6])


def test_target_in_multiply_accumulates(neurons: Neurons) -> None:
    result = restructure(neurons, TASK, SLICE, mac_retention=0.2, **ANY_LOSS)
    assert 0.2 - 1 / 500 < result.best["mac_retention"] <= 0.2
    assert result.best["mac_retention"] == size_of(result.model, neurons).macs / (64 * (72 + 432) + 18)


def test_structured_removes_the_least_critical_neurons(neurons: Neurons) -> None:
    options = {"method": "structured", "scores": SCORES, **ANY_LOSS}
    result = restructure(neurons, TASK, None, param_retention=0.8, **options)
    # in units of the layer's norm: conv2[0] 0.05, conv1[1] 0.07; they take 72 + 1 + 2 + 3 and 9 + 1 + 2 + 5 * 9 along
    assert (result.model.conv1.out_channels, result.model.conv2.out_channels) == (7, 5)
    assert result.best["param_retention"] == (567 - 78 - 57) / 567 and result.best["sparsity"] == 0
    twice = restructure(neurons, TASK, SLICE, param_retention=0.2, **options)
    assert twice.about["iterations"] > 2 and twice.best["param_retention"] <= 0.2
    assert sum(p.numel() for p in twice.model.parameters()) / 567 <= 0.2
    timed = restructure(neurons, TASK, SLICE, latency_ms=1e3, latency_batch_size=4, **options)
    assert timed.about["iterations"] == 1 and 0 < timed.best["latency_ms"] < 1e3


def test_scores_follow_their_neurons(neurons: Neurons) -> None:
    most, usual, remove = removal_of_neurons(neurons.model, neurons, SCORES, prune_fraction=0.2)
    for removed, left in ((0, [8, 6]), (1, [8, 5]), (3, [6, 5]), (most, [1, 1])):
        small, rest = remove(removed)
        assert [small.conv1.out_channels, small.conv2.out_channels] == left
        widths = zip(("conv1", "conv2"), left, strict=True)
        assert {name: len(score) for name, score in rest.items()} == {
            name: width for name, width in widths if width > 1
        }
    assert remove(3)[1]["conv1"].tolist() == [8, 7, 6, 3, 5, 4]
    sizes = [sum(p.numel() for p in remove(count)[0].parameters()) for count in (usual, usual - 1)]
    assert sizes[0] <= 0.8 * 567 < sizes[1]
    assert removal_of_neurons(small, neurons, {}, prune_fraction=0.2)[0] == 0


@pytest.mark.parametrize(
    "name", ["two inputs", "dictionary", "tokens", "reused", "gated", "preactivation", "mobilenet"]
)
def test_every_kind_of_network(name: str) -> None:
    neurons = prepared(name)
    task, slice_ = noise(neurons), neurons.random(0.6, seed=1)
    scores = {layer: torch.rand(found.count) for layer, found in neurons.layers.items()}
    options: dict[str, Any] = {"param_retention": 0.3, "prune_fraction": 0.5, **ANY_LOSS}
    for method, given in (("lamp", None), ("structured", scores)):
        result = restructure(neurons, task, slice_, method=method, scores=given, **options)
        assert result.best["param_retention"] <= 0.3 and result.about["iterations"] > 1
        assert [type(m) for m in result.model.modules()] == [type(m) for m in neurons.model.modules()]
        found = logits(result.model, neurons.example)
        assert found.shape == (batch_size(neurons.example), 10) and (found != 0).any()


def test_shared_weights_are_left_alone() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    layers = [nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 4), first, nn.ReLU(), second, nn.Linear(4, 3)]
    neurons = find_neurons(nn.Sequential(*layers), TASK.example)
    assert list(weights_of(neurons.model, neurons)) == ["1", "3", "7"]
    small = restructure(neurons, TASK, None, param_retention=0.4, **ANY_LOSS).model
    assert small[4].weight is small[6].weight and (small[4].weight != 0).all()


def test_it_prints_and_becomes_plain_data(neurons: Neurons, capsys: pytest.CaptureFixture[str]) -> None:
    result = restructure(neurons, TASK, SLICE, param_retention=0.25, **ANY_LOSS)
    assert "cut, retrained" in str(result) and f"{result.best['step']} *" in str(result)
    plain = json.loads(json.dumps(result.to_plain()))
    assert plain["log"][0]["step"] == "whole" and plain["method"] == "lamp"
    assert capsys.readouterr().err == ""
    loud = {**ANY_LOSS, "training": replace(TRAINING, progress=True)}
    restructure(neurons, TASK, None, param_retention=0.9, **loud)
    shown = "\n".join(line for line in capsys.readouterr().err.splitlines() if "of the parameters" in line)
    assert re.search(r"whole: 100.0% of the parameters.*\niteration 1: (89|90).\d% of the parameters", shown)
    with pytest.raises(TorchsliceError, match="unknown step 'iteration 99'"):
        result["iteration 99"]


FULL = SLICE | ~SLICE


@pytest.mark.parametrize(
    ("critical", "options", "message"),
    [
        (FULL, {"param_retention": 0.5}, "keeps every neuron, so there is nothing to cut out; give critical=None"),
        (~FULL, {"param_retention": 0.5}, "the slice is empty"),
        (Slice({"conv1": torch.arange(8) < 5, "conv2": torch.arange(6) < 0}), {"param_retention": 0.5}, "no neuron of"),
        (Slice({"conv1": torch.arange(8) < 5}), {"param_retention": 0.5}, "slice of another model"),
        (SLICE, {}, "give one target of param_retention, mac_retention, latency_ms; got none"),
        (SLICE, {"param_retention": 0.5, "mac_retention": 0.5}, "got param_retention, mac_retention"),
        (SLICE, {"param_retention": 0.08}, "is out of reach: with one neuron per layer, lamp still has 0.085"),
        (SLICE, {"param_retention": 0.12, "method": "uniform+"}, r"uniform\+ still has 0.13"),
        (None, {"param_retention": 0.05, "method": "structured", "scores": SCORES}, "structured still has 0.053"),
        (None, {"mac_retention": 1e-6}, "mac_retention=1e-06 is out of reach"),
        (SLICE, {"latency_ms": 1e-6, "method": "structured", "scores": SCORES}, "latency_ms=1e-06 is out of reach"),
        (SLICE, {"param_retention": 1.0}, r"param_retention must be in \(0, 1\), got 1"),
        (SLICE, {"latency_ms": 0, "method": "structured", "scores": SCORES}, "latency_ms must be above 0"),
        (SLICE, {"latency_ms": 3}, "zeros do not make a network faster, so latency_ms needs method='structured'"),
        (SLICE, {"param_retention": 0.5, "method": "lapm"}, "unknown pruning method 'lapm'. Did you mean 'lamp'"),
        (SLICE, {"param_retention": 0.5, "prune_fraction": 1}, r"prune_fraction must be in \(0, 1\), got 1"),
        (SLICE, {"param_retention": 0.5, "max_accuracy_loss": 2}, "max_accuracy_loss must be in"),
        (SLICE, {"param_retention": 0.5, "latency_batch_size": 0}, "latency_batch_size must be at least 1, got 0"),
        (SLICE, {"param_retention": 0.5, "patience": -1}, "patience must be at least 0, got -1"),
        (SLICE, {"param_retention": 0.5, "method": "structured"}, "needs scores={layer: .N.}, and no other takes them"),
        (SLICE, {"param_retention": 0.5, "scores": SCORES}, "got method 'lamp' with scores"),
        (
            *(None, {"param_retention": 0.5, "method": "structured", "scores": {"conv1": torch.ones(7)}}),
            r"layer 'conv1' needs scores \[8\] of at least 0, one for each neuron; got \[7\]",
        ),
    ],
)
def test_bad_input(neurons: Neurons, critical: Slice | None, options: dict[str, Any], message: str) -> None:
    before = state(neurons.model)
    with pytest.raises(TorchsliceError, match=message):
        restructure(neurons, TASK, critical, **{"training": TRAINING, **options})
    assert_equal(state(neurons.model), before)
