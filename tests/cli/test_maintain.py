"""The commands of maintenance, from every source to an artefact, as Python makes it."""

import dataclasses
import json

import pytest
import torch

import torchslice as ts
from torchslice.artefact import read_record
from torchslice.data import joined
from torchslice.find.semantic import PerLayer, contributions
from torchslice.maintain import Extended, top_by_score_per_parameter
from torchslice.runs import Run

from .conftest import QUICK, TRAINING, neurons_of

SOURCES = ("run", "pt", "safetensors", "artefact")
ONE = dataclasses.replace(TRAINING, epochs=1, device="cpu", progress=False)


def mean_scores(neurons, task):
    return {layer: of.mean(0) for layer, of in contributions(neurons, task, progress=False)["taylor"].items()}


def same(model, other, task):
    return torch.equal(ts.judge.predict(model, task), ts.judge.predict(other, task))


# -- restructure --------------------------------------------------------------------------------------------------
TARGET = {"param_retention": 0.6, "max_accuracy_loss": 1, "prune_fraction": 0.4}


@pytest.fixture(scope="module")
def smaller(standard):
    """What Python makes of the run, and the slice it starts from."""
    neurons, task = neurons_of(standard)
    critical = PerLayer(0.9).choose(contributions(neurons, task, progress=False)).critical
    training = dataclasses.replace(ONE, learning_rate=0.01)
    return ts.restructure(neurons, task, critical, training=training, **TARGET), critical, task


@pytest.mark.parametrize("source", SOURCES)
def test_restructure_saves_what_python_makes(torchslice, sources, source, smaller, tmp_path):
    path = tmp_path / "new" / "small.safetensors"
    options = [text for name, value in TARGET.items() for text in (f"--{name.replace('_', '-')}", value)]
    result = torchslice(
        "restructure", *sources[source], "--neuron-fraction", 0.9, *options, *QUICK, "--out", path, "--json"
    )
    (made, critical, task), found = smaller, ts.load(path)
    assert same(found.model, made.model, task)
    assert found.classes == task.classes and found.preprocessing == task.preprocessing and found.slice == critical
    assert result.json["param_retention"] == made.best["param_retention"] <= 0.6
    assert (result.json["method"], result.json["stopped"]) == ("lamp", "target")
    evaluated = torchslice("evaluate", path, "digits", "--device", "cpu", "--json").json
    assert evaluated["param_retention"] == result.json["param_retention"]


def test_restructure_by_neurons_measures_contributions_once(torchslice, sources, tmp_path, monkeypatch):
    from torchslice.cli import restructure

    computed = []
    monkeypatch.setattr(restructure, "contributions", lambda *a, **k: computed.append(k) or contributions(*a, **k))
    path, common = tmp_path / "small.safetensors", ("--max-accuracy-loss", 1, *QUICK)
    options = ("--method", "structured", "--mac-retention", 0.5, "--neuron-fraction", 0.9, "--metric", "var", *common)
    result = torchslice("restructure", *sources["run"], "--out", path, *options, "--json").json
    assert result["mac_retention"] <= 0.5 and result["log"][-1]["sparsity"] == 0 and len(computed) == 1
    options = ("--no-slice", "--param-retention", 0.9, *common, "--force")
    text = torchslice("restructure", *sources["run"], "--out", path, *options)
    assert "iteration 1" in text.out and "cut" not in text.out and f"torchslice evaluate {path} digits" in text.out
    assert "iteration 1: " in text.err and read_record(path)["slice"] is None and len(computed) == 1


# -- readapt ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def adapted(standard):
    """What Python makes of the run, and the slice it trains."""
    neurons, task = neurons_of(standard)
    critical = top_by_score_per_parameter(neurons, mean_scores(neurons, task), 0.3)
    new = dataclasses.replace(task.train, images=task.train.images // 2)
    training = dataclasses.replace(ONE, learning_rate=0.005, optimizer="adamw")
    return ts.readapt(neurons, task, critical, new, replay=(0, 0.5), classifier=True, training=training), critical, task


@pytest.mark.parametrize("source", SOURCES)
def test_readapt_saves_what_python_makes(torchslice, sources, source, adapted, own, tmp_path):
    path = tmp_path / "new" / "adapted.safetensors"
    options = ("--param-fraction", 0.3, "--replay", "0,0.5", "--classifier", *QUICK)
    words = (*sources[source], "--new", f"{own}:dim", "--out", path, *options)
    result = torchslice("readapt", *words, "--json").json
    (made, critical, task), found = adapted, ts.load(path)
    assert same(found.model, made.model, task) and found.classes == task.classes and found.slice == critical
    assert result["replay"] == made.about["replay"] and result["param_fraction"] == made.about["param_fraction"] < 0.35


def test_readapt_takes_new_samples_of_some_classes(torchslice, standard, own, tmp_path):
    path = tmp_path / "adapted.safetensors"
    options = ("--new", f"{own}:dim", "--data-option", "names=8210", "--param-fraction", 0.3, *QUICK)
    result = torchslice("readapt", standard, *options, "--out", path)
    assert f"torchslice evaluate {path} {own}:dim --data-option names=8210" in result.out, result.err
    assert ts.load(path).classes == tuple("0123456789")


def test_readapt_with_class_slices(torchslice, subtasks, own, tmp_path):
    path = tmp_path / "adapted.safetensors"
    result = torchslice("readapt", subtasks, "--new", f"{own}:dim", "--out", path, *QUICK)
    assert f"torchslice evaluate {path} {own}:dim" in result.out, result.err


# -- extend -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def five_sources(five, own, shared):
    """The network of five digits in all the ways that a command can start from it."""
    neurons, task = neurons_of(five)
    torch.save(neurons.model.state_dict(), shared / "five.pt")
    ts.save(neurons.model, shared / "five.safetensors", classes=task.classes, preprocessing=task.preprocessing)
    named = ("convnet", f"{own}:load", "--model-argument", "width=0.125", "--weights", shared / "five.pt")
    return {"run": (five,), "pt": named, "artefact": (shared / "five.safetensors", "digits")}


@pytest.fixture
def seven(torchslice, five, tmp_path):
    """An artefact that has learned two digits more."""
    path = tmp_path / "seven.safetensors"
    options = ("--classes", "5,6", "--neuron-fraction", 0.5, "--replay", 0.2, "--keep", *QUICK)
    assert torchslice("extend", five, "--new", "digits", *options, "--out", path).code == 0
    return path


@pytest.mark.parametrize("source", ["run", "pt", "artefact"])
def test_extend_saves_what_python_makes(torchslice, five, five_sources, source, tmp_path):
    path = tmp_path / "new" / "seven.safetensors"
    new = () if source == "artefact" else ("--new", "digits")
    options = ("--classes", "5,6", "--neuron-fraction", 0.5, *QUICK)
    result = torchslice("extend", *five_sources[source], *new, *options, "--out", path, "--json").json
    (neurons, task), digits = neurons_of(five), ts.data.load("digits")
    critical = PerLayer(0.5).choose(contributions(neurons, task, progress=False)).critical
    training = dataclasses.replace(ONE, learning_rate=ts.Training().learning_rate)
    made = ts.extend(neurons, digits.restrict(["5", "6"]), critical, known=task, training=training)
    found = ts.load(path)
    assert same(found.model, made.model, task)
    assert found.classes == tuple("0123456") and found.preprocessing == task.preprocessing and found.slice == critical
    assert result["known"] == list("01234") and result["new"] == ["5", "6"]
    assert result["neuron_retention"] == critical.neuron_retention
    again = Extended.of(ts.find_neurons(found.model, task.example), found.extension)
    assert same(again.network(0), ts.extract(neurons, critical), task)


def test_evaluate_answers_with_and_without_the_task(torchslice, seven):
    result = torchslice("evaluate", seven, "digits", "--device", "cpu", "--json").json
    found = ts.load(seven)
    task = ts.data.load("digits").like(found.preprocessing).restrict(found.classes)
    made = Extended.of(ts.find_neurons(found.model, task.example), found.extension)
    assert result["accuracy"] == ts.accuracy(made.joined(), task).overall
    assert result["task_accuracy"]["5, 6"] == ts.accuracy(made.network(), task.restrict(["5", "6"])).overall
    assert list(result["task_accuracy"]) == ["0, 1, 2, 3, 4", "5, 6"]
    assert set(result["class_accuracy"]) == set("0123456")
    assert result["parameters"] == sum(p.numel() for p in found.model.parameters())
    text = torchslice("evaluate", seven, "digits", "--device", "cpu").out
    assert "of 5, 6 where it is known to be one of them" in text


def test_an_artefact_is_extended_again(torchslice, seven, tmp_path):
    path = tmp_path / "nine.safetensors"
    options = ("--neuron-fraction", 0.3, "--settle", 1, "--widen", 1.25, "--replay", 0.1, *QUICK)
    result = torchslice("extend", seven, "digits", "--classes", "7,8", *options, "--out", path, "--json").json
    assert result["known"] == list("0123456")
    task = ts.data.load("digits")
    before, after = (ts.load(file) for file in (seven, path))
    before, after = (Extended.of(ts.find_neurons(a.model, task.example), a.extension) for a in (before, after))
    assert [learned.classes for learned in after.tasks] == [tuple("01234"), ("5", "6"), ("7", "8")]
    assert same(after.network(0), before.network(0), task)
    record = read_record(path)
    assert json.dumps(record["metrics"]["log"]) == json.dumps(result["log"])
    assert after.neurons.full().total > before.neurons.full().total
    both = joined(task.restrict(list("0123456")), task.restrict(["7", "8"]))
    assert len(both.classes) == after.neurons.num_classes == 9


def test_a_single_class_is_learned_beside_samples_of_the_known_ones(torchslice, five_sources, tmp_path):
    path, common = tmp_path / "six.safetensors", ("--classes", "5", "--neuron-fraction", 0.5, *QUICK)
    torchslice("extend", *five_sources["artefact"], *common, "--out", path).refused(
        "a single new class ('5')", "--replay"
    )
    assert torchslice("extend", *five_sources["artefact"], *common, "--replay", 0.1, "--out", path).code == 0
    torchslice("extend", path, "digits", "--classes", "6,7", "--neuron-fraction", 0.5, "--out", tmp_path / "x").refused(
        "learned '5' alone"
    )
    torchslice("extend", path, "digits", "--classes", "6,7", "--out", tmp_path / "x").refused("learned '5' alone")


# -- replace and compose ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("source", SOURCES)
def test_replace_saves_what_python_makes(torchslice, sources, source, standard, tmp_path):
    path, part = tmp_path / "new" / "better.safetensors", sources["artefact"][0]
    words = (*sources[source], "--part", f"3={part}", "--part", f"8={part}", "--device", "cpu")
    result = torchslice("replace", *words, "--out", path, "--json").json
    neurons, task = neurons_of(standard)
    strong = ts.load(part)
    made, found = ts.replace(neurons, {"3": strong, "8": strong}, task), ts.load(path)
    assert torch.allclose(ts.judge.predict(found.model, task), ts.judge.predict(made.model, task), atol=1e-3)
    assert found.classes == task.classes and found.preprocessing == task.preprocessing
    assert result["replaced"] == ["3", "8"] and result["costs"] == found.metrics["costs"]
    text = torchslice("replace", *words, "--out", path, "--force")
    assert "together:" in text.out and f"torchslice evaluate {path} digits" in text.out


def test_compose_saves_what_python_makes(torchslice, standard, own, tmp_path):
    neurons, task = neurons_of(standard)
    files = [tmp_path / f"{name}.safetensors" for name in ("low", "high", "both")]
    half = {**task.preprocessing, **{name: [task.preprocessing[name][0] / 2] for name in ("mean", "std")}}  # as dim
    for file, classes, prepared in zip(files, ("012", "78"), (task.preprocessing, half), strict=False):
        part = ts.extract(neurons, neurons.full(), classes=list(classes))
        ts.save(part, file, classes=list(classes), preprocessing=prepared)
    words = ("compose", *files[:2], "--data", "digits", "--data", f"{own}:dim", "--out", files[2])
    torchslice(*words).refused("part 2", "mean is", "--renormalise")
    result = torchslice(*words, "--renormalise", "--json").json
    found = ts.load(files[2])
    assert found.classes == tuple(result["classes"]) == tuple("01278") and found.preprocessing == task.preprocessing
    assert ts.accuracy(found.model, task.restrict(found.classes)).overall > 0.7
    torchslice(*words, "--renormalise").refused("exists", "--force")
    ts.save(found.model, files[0])
    torchslice(*words, "--renormalise", "--force").refused("low.safetensors does not name its classes")


# -- remove and update --------------------------------------------------------------------------------------------
def test_remove_saves_what_python_makes_and_says_what_is_left(torchslice, subtasks, tmp_path):
    path = tmp_path / "eight.safetensors"
    words = ("remove", subtasks, "--classes", "3,8", "--out", path, "--device", "cpu")
    result = torchslice(*words, "--json").json
    (neurons, task), found = neurons_of(subtasks), ts.load(path)
    made = ts.remove(neurons, Run.open(subtasks).slices(), classes=["3", "8"])
    assert same(found.model, made, task.restrict(found.classes)) and found.preprocessing == task.preprocessing
    assert found.classes == tuple(result["classes"]) == tuple("01245679")
    text = torchslice(*words, "--control", *QUICK[:-2], "--force").out
    rows = [line.split("  ")[0] for line in text.splitlines()]
    assert {"control", "row removed", "row and neurons"} <= {*rows} and "distance from the control" in text


def test_update_saves_what_python_makes(torchslice, subtasks, own, tmp_path):
    path = tmp_path / "new.safetensors"
    words = ("update", subtasks, "--class", "3", "--new", f"{own}:dim", "--out", path, *QUICK)
    result = torchslice(*words, "--json").json
    (neurons, task), found = neurons_of(subtasks), ts.load(path)
    predictions = [ts.judge.predict(model, task) for model in (found.model, neurons.model)]
    others = [label for label in range(10) if label != 3]
    assert torch.equal(*(logits[:, others] for logits in predictions)) and not torch.equal(*predictions)
    assert (
        result["class"] == "3" and found.classes == task.classes and result["thresholds"] == found.metrics["thresholds"]
    )
