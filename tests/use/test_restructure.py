import json
import re
import sys

import pytest
import torch
from tests.core.architectures import make
from torch import nn

from torchslice import models
from torchslice.core.find import find_neurons
from torchslice.data import Data, Split
from torchslice.errors import TorchsliceError
from torchslice.slices import Slice
from torchslice.use.artefacts import load, save
from torchslice.use.evaluate import accuracy
from torchslice.use.extract import extract
from torchslice.use.finetune import Tuned, finetune
from torchslice.use.pruning import PRUNING
from torchslice.use.restructure import restructure
from torchslice.use.shrink import finetune_sparse, removal_of_neurons, size_of, weights_of

from .nets import Tied, lively, stripes

PART = Slice({"conv1": torch.arange(8) < 5, "conv2": torch.arange(6) % 2 == 0})
DATA = stripes()
QUIET = {"batch_size": 30, "precision": "fp32", "device": "cpu", "progress": False}
SETTINGS = {**QUIET, "epochs_per_iteration": 1, "learning_rate": 0.05}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return finetune(
        lively(models.create("tests.use.nets:tiny", num_classes=3)), DATA, epochs=8, learning_rate=0.1, **QUIET
    ).model


def neurons_of(model: nn.Module):
    return find_neurons(model, DATA.example)


def zeros_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight == 0 for name, weight in weights_of(model, neurons_of(model)).items()}


@pytest.mark.parametrize("settings", [{"momentum": 0.9, "weight_decay": 0.1}, {"precision": "bf16"}])
def test_removed_weights_stay_exactly_zero_in_training(model, settings):
    sparse = extract(model, PART, DATA.example)
    for weight in weights_of(sparse, neurons_of(model)).values():
        weight[torch.rand(weight.shape) < 0.5] = 0
    before, zeros = {n: t.clone() for n, t in sparse.state_dict().items()}, zeros_of(sparse)
    assert all(0 < mask.sum() < mask.numel() for mask in zeros.values())
    settings = {"epochs": 2, "learning_rate": 0.05, **QUIET, **settings}
    dense = finetune(sparse, DATA, **settings).model
    assert not all(torch.equal(found, zeros[name]) for name, found in zeros_of(dense).items())  # training moves zeros
    tuned = finetune_sparse(sparse, DATA, neurons=neurons_of(model), **settings).model
    for name, found in zeros_of(tuned).items():
        assert torch.equal(found, zeros[name])
        assert not torch.equal(tuned.get_submodule(name).weight, sparse.get_submodule(name).weight)
    assert [type(module) for module in tuned.modules()] == [type(module) for module in model.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in sparse.state_dict().items())
    assert tuned.state_dict().keys() == before.keys() and all(p.is_leaf for p in tuned.parameters())


def test_size_by_hand(model):
    # conv1 8x1x9 + 8, norms 2 * 8 + 2 * 6, conv2 6x8x9 + 6, head 3x6 + 3; 64 positions
    neurons = neurons_of(model)
    size = size_of(model, neurons)
    assert (size.parameters, size.macs) == (80 + 28 + 438 + 21, 64 * (72 + 432) + 18)
    masks = {name: torch.zeros_like(weight) for name, weight in weights_of(model, neurons).items()}
    masks["conv2"][0, 0] = 1
    assert (size_of(model, neurons, masks).parameters, size_of(model, neurons, masks).macs) == (45 + 9, 64 * 9)


@pytest.mark.parametrize("method", PRUNING.names())
def test_an_iteration_removes_a_fifth_of_the_survivors(model, method):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = restructure(
        model, PART, DATA, method=method, param_retention=0.2, max_accuracy_loss=None, weight_decay=0.01, **SETTINGS
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    names = [step.name for step in result.steps]
    assert names[:4] == ["whole", "cut", "cut, retrained", "iteration 1"] and len(names) > 4
    assert result.iterations == len(names) - 2 and (result.stopped, result.kept) == ("target", names[-1])
    small = extract(model, PART, DATA.example)
    weights = sum(w.numel() for w in weights_of(small, neurons_of(model)).values())
    assert weights == 5 * 9 + 3 * 5 * 9 + 9
    others, whole = sum(p.numel() for p in small.parameters()) - weights, sum(p.numel() for p in model.parameters())
    for step in result.steps[3:-1]:
        removed = -int(-weights * 0.2 // 1)
        weights_left = round(step.param_retention * whole) - others
        slack = 0 if method in ("lamp", "global") else 3  # these round down in each of the layers
        assert weights - removed - slack <= weights_left <= weights - removed, step
        assert step.sparsity == pytest.approx(1 - weights_left / 189, abs=1e-12)
        weights = weights_left
    last = result[result.kept]
    assert 0.2 - 5 / whole < last.param_retention <= 0.2 and last.compression_rate == 1 - last.param_retention
    alive = sum(int(w.count_nonzero()) for w in weights_of(result.model, neurons_of(model)).values())
    assert round(last.param_retention * whole) == alive + others
    assert accuracy(result.model, DATA, split="validation").overall == last.validation_accuracy
    assert result["whole"].param_retention == 1 == result["whole"].mac_retention and result["whole"].sparsity == 0
    assert not result.model.training and all(step.seconds >= 0 for step in result.steps)


def test_without_a_slice_nothing_is_cut(model):
    result = restructure(model, None, DATA, param_retention=0.85, max_accuracy_loss=None, **SETTINGS)
    assert [step.name for step in result.steps] == ["whole", "iteration 1"]
    masks = PRUNING["lamp"](weights_of(model, neurons_of(model)), int(0.85 * 567) - 45)
    assert all(torch.equal(~zeros, masks[name]) for name, zeros in zeros_of(result.model).items())
    assert result.model.conv1.weight.shape == model.conv1.weight.shape


@pytest.fixture
def scripted(monkeypatch):
    """Replace accuracies: of the whole and the cut network, and after every training."""

    def script(measured: list[float], trained: list[float]) -> None:
        module, values, results = sys.modules[restructure.__module__], iter(measured), iter(trained)
        score = type("Score", (), {"overall": property(lambda _: next(values))})
        for name in ("accuracy", "accuracy_of"):
            monkeypatch.setattr(module, name, lambda *_, **__: score())
        for name in ("finetune", "finetune_sparse"):
            monkeypatch.setattr(module, name, lambda network, *_, **__: Tuned(network, 1, (0.0, next(results))))

    return script


def test_it_stops_before_too_much_accuracy_is_lost(model, scripted):
    scripted([0.9], [0.895, 0.89, 0.8899, 0.99])
    result = restructure(model, None, DATA, param_retention=0.2, **SETTINGS)
    assert [step.name for step in result.steps] == ["whole", "iteration 1", "iteration 2", "iteration 3"]
    assert (result.stopped, result.kept) == ("accuracy", "iteration 2")
    kept = 567 * result["iteration 2"].param_retention
    assert sum(int(p.count_nonzero()) for p in weights_of(result.model, neurons_of(model)).values()) == round(kept) - 45
    scripted([0.9], [0.5])
    result = restructure(model, None, DATA, param_retention=0.2, **SETTINGS)
    assert (result.stopped, result.kept) == ("accuracy", "whole") and result.model is not model
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), model.parameters(), strict=True))


def test_patience_wins_accuracy_back(model, scripted):
    # measured: whole, cut and recalibrated
    scripted([0.9, 0.7], [0.88, 0.9, 0.88, 0.88, 0.895, 0.7, 0.7, 0.7])
    result = restructure(model, PART, DATA, param_retention=0.15, patience=2, **SETTINGS)
    again = ["", ", training 2", ", training 3"]
    cut, first, last = ([name + turn for turn in again] for name in ("cut, retrained", "iteration 1", "iteration 2"))
    assert [step.name for step in result.steps] == ["whole", "cut", *cut[:2], *first, *last]
    assert (result.stopped, result.kept, result.iterations) == ("accuracy", "iteration 1, training 3", 8)
    sizes = [step.param_retention for step in result.steps]
    assert sizes[2] == sizes[3] and len(set(sizes[4:7])) == 1 and sizes[4] < sizes[3]
    assert size_of(result.model, neurons_of(model)).parameters == round(567 * sizes[6])
    assert result["cut"].validation_accuracy == 0.7


def test_target_in_multiply_accumulates(model):
    result = restructure(model, PART, DATA, mac_retention=0.2, max_accuracy_loss=None, **SETTINGS)
    macs = size_of(result.model, neurons_of(model)).macs
    assert 0.2 - 1 / 500 < result[result.kept].mac_retention <= 0.2
    assert result[result.kept].mac_retention == macs / (64 * (72 + 432) + 18)


def test_structured_removes_the_least_critical_neurons(model):
    scores = {"conv1": torch.tensor([8.0, 1, 7, 2, 6, 3, 5, 4]), "conv2": torch.tensor([1.0, 9, 9, 9, 9, 9])}
    options = {"method": "structured", "scores": scores, "max_accuracy_loss": None}
    result = restructure(model, None, DATA, param_retention=0.8, **options, **SETTINGS)
    # in units of the layer's norm: conv2[0] 0.05, conv1[1] 0.07; they take 72 + 1 + 2 + 3 and 9 + 1 + 2 + 5 * 9 along
    assert (result.model.conv1.out_channels, result.model.conv2.out_channels) == (7, 5)
    assert result[result.kept].param_retention == (567 - 78 - 57) / 567
    assert result.iterations == 1 and result["iteration 1"].sparsity == 0
    twice = restructure(model, PART, DATA, param_retention=0.2, **options, **SETTINGS)
    assert twice.iterations > 2 and twice[twice.kept].param_retention <= 0.2
    assert sum(p.numel() for p in twice.model.parameters()) / 567 <= 0.2
    timed = restructure(model, PART, DATA, latency_ms=1e3, latency_batch_size=4, **options, **SETTINGS)
    assert timed.iterations == 1 and 0 < timed[timed.kept].latency_ms < 1e3 and " ms " in str(timed)


def test_scores_follow_their_neurons(model):
    scores = {"conv1": torch.tensor([8.0, 1, 7, 2, 6, 3, 5, 4]), "conv2": torch.tensor([1.0, 9, 9, 9, 9, 9])}
    neurons = neurons_of(model)
    step = removal_of_neurons(model, neurons, DATA.example, scores, rate=0.2)
    for removed, left in ((0, [8, 6]), (1, [8, 5]), (3, [6, 5]), (step.most, [1, 1])):
        small, rest = step.apply(removed)
        assert [small.conv1.out_channels, small.conv2.out_channels] == left
        size = step.size(removed)
        assert size == size_of(small, neurons) and {n: len(s) for n, s in rest.items()} == {
            name: width for name, width in zip(("conv1", "conv2"), left, strict=True) if width > 1
        }
    assert step.apply(3)[1]["conv1"].tolist() == [8, 7, 6, 3, 5, 4]
    assert step.size(step.usual).parameters <= 0.8 * 567 < step.size(step.usual - 1).parameters
    assert removal_of_neurons(small, neurons, DATA.example, {}, rate=0.2).most == 0


def image_data(example: torch.Tensor) -> Data:
    def split(count: int) -> Split:
        return Split(torch.randint(0, 256, (count, *example.shape[1:]), dtype=torch.uint8), torch.arange(count) % 10)

    return Data.build("noise", split(20), split(10), classes=[str(n) for n in range(10)], validation=split(10))


@pytest.mark.parametrize("name", ["reused", "gated", "preactivation", "mobilenet"])
def test_every_kind_of_network(name):
    model, example = make(name)
    data, neurons = image_data(example), find_neurons(model, example)
    part = neurons.random(0.6, seed=1)
    scores = {layer: torch.rand(found.count) for layer, found in neurons.layers.items()}
    options = {"param_retention": 0.3, "rate": 0.5, "max_accuracy_loss": None, **SETTINGS}
    for method, given in (("lamp", None), ("structured", scores)):
        result = restructure(model, part, data, method=method, scores=given, **options)
        assert result[result.kept].param_retention <= 0.3 and result.iterations > 1
        assert [type(m) for m in result.model.modules()] == [type(m) for m in model.modules()]
        assert result.model(example).shape == (len(example), 10) and (result.model(example) != 0).any()


def test_a_sparse_network_is_an_ordinary_artefact(model, tmp_path):
    result = restructure(model, PART, DATA, param_retention=0.2, max_accuracy_loss=None, **SETTINGS)
    save(result.model, tmp_path / "sparse", classes=DATA.classes, metrics=result.to_plain())
    loaded = load(tmp_path / "sparse", allow_import=True)
    assert torch.equal(loaded(DATA.example), result.model(DATA.example))
    assert all(torch.equal(zeros, zeros_of(loaded)[name]) for name, zeros in zeros_of(result.model).items())


def test_shared_weights_are_left_alone():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 4), Tied(4), nn.Linear(4, 3))
    assert list(weights_of(network, neurons_of(network))) == ["1", "3", "5"]
    options = {"param_retention": 0.4, "max_accuracy_loss": None}
    small = restructure(network, None, DATA, **options, **SETTINGS).model
    assert small[4].first.weight is small[4].second.weight and (small[4].first.weight != 0).all()


def test_it_prints_and_becomes_plain_data(model, capsys):
    result = restructure(model, PART, DATA, param_retention=0.25, max_accuracy_loss=None, **SETTINGS)
    text = str(result)
    assert (
        "cut, retrained" in text and f"{result.kept} *" in text and "stopped by target" in text and " ms " not in text
    )
    plain = json.loads(json.dumps(result.to_plain()))
    assert plain["steps"][0]["name"] == "whole" and plain["method"] == "lamp"
    assert capsys.readouterr().err == ""
    restructure(model, None, DATA, param_retention=0.9, max_accuracy_loss=None, **{**SETTINGS, "progress": True})
    assert re.search(r"whole: 100.0% of the parameters.*\niteration 1: (89|90).\d% of the parameters", shown(capsys))
    with pytest.raises(TorchsliceError, match="unknown step 'iteration 99'"):
        result["iteration 99"]


def shown(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    return "\n".join(line for line in lines if "of the parameters" in line)


FULL = Slice({"conv1": torch.ones(8, dtype=torch.bool), "conv2": torch.ones(6, dtype=torch.bool)})
SCORES = {"conv1": torch.ones(8), "conv2": torch.ones(6)}


@pytest.mark.parametrize(
    ("critical", "options", "message"),
    [
        (FULL, {"param_retention": 0.5}, "keeps every neuron, so there is nothing to cut out; give critical=None"),
        (~FULL, {"param_retention": 0.5}, "the slice is empty"),
        (Slice({"conv1": torch.arange(8) < 5, "conv2": torch.arange(6) < 0}), {"param_retention": 0.5}, "no neuron of"),
        (Slice({"conv1": torch.arange(8) < 5}), {"param_retention": 0.5}, "slice of another model"),
        (PART, {}, "give one target of param_retention, mac_retention, latency_ms; got none"),
        (PART, {"param_retention": 0.5, "mac_retention": 0.5}, "got param_retention, mac_retention"),
        (PART, {"param_retention": 0.08}, "is out of reach: with one neuron per layer, lamp still has 0.085"),
        (PART, {"param_retention": 0.12, "method": "uniform+"}, r"uniform\+ still has 0.13"),
        (None, {"param_retention": 0.05, "method": "structured", "scores": SCORES}, "structured still has 0.053"),
        (None, {"mac_retention": 1e-6}, "mac_retention=1e-06 is out of reach"),
        (PART, {"latency_ms": 1e-6, "method": "structured", "scores": SCORES}, "latency_ms=1e-06 is out of reach"),
        (PART, {"param_retention": 1.0}, r"param_retention must be in \(0, 1\), got 1"),
        (PART, {"latency_ms": 0, "method": "structured", "scores": SCORES}, "latency_ms must be above 0"),
        (PART, {"latency_ms": 3}, "zeros do not make a network faster, so latency_ms needs method='structured'"),
        (PART, {"param_retention": 0.5, "method": "lapm"}, "unknown pruning method 'lapm'. Did you mean 'lamp'"),
        (PART, {"param_retention": 0.5, "rate": 1}, r"rate must be in \(0, 1\), got 1"),
        (PART, {"param_retention": 0.5, "max_accuracy_loss": 2}, "max_accuracy_loss must be in"),
        (PART, {"param_retention": 0.5, "epochs_per_iteration": 0}, "at least 1 epoch"),
        (PART, {"param_retention": 0.5, "latency_batch_size": 0}, "latency_batch_size at least 1, got 0 and 0"),
        (PART, {"param_retention": 0.5, "patience": -1}, "patience must be at least 0 .* got -1 and 1"),
        (PART, {"param_retention": 0.5, "method": "structured"}, "needs scores={layer: .N.}, and no other takes them"),
        (PART, {"param_retention": 0.5, "scores": SCORES}, "got method 'lamp' with scores"),
        (
            *(None, {"param_retention": 0.5, "method": "structured", "scores": {"conv1": torch.ones(7)}}),
            r"layer 'conv1' needs scores \[8\] of at least 0, one for each neuron; got \[7\]",
        ),
        (
            *(None, {"param_retention": 0.5, "method": "structured", "scores": {"conv1": torch.ones(8)}}),
            r"layer 'conv2' needs scores \[6\] of at least 0, one for each neuron; got none",
        ),
    ],
)
def test_bad_input(model, critical, options, message):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TorchsliceError, match=message):
        restructure(model, critical, DATA, **{**SETTINGS, **options})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
