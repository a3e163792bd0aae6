"""torchslice extend: from a run to an artefact that knows more, from that to the next, and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch

import torchslice as ts
from torchslice.runs import Recipe, Run
from torchslice.semantic import Rule, contributions, slices_from
from torchslice.use import Extended, extend, predict_logits, read_record

RUNNING = ("--device", "cpu", "--seed", 2, "--epochs", 1)
SOURCE = """
import torchslice as ts

def load(names="01234"):
    return ts.data.load("digits").restrict(list(names))
"""


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """A finished standard run on five digits; do not write to it."""
    folder = tmp_path_factory.mktemp("five")
    (folder / "five_digits_for_a_test.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr("sys.dont_write_bytecode", True)
        arguments = {"model_arguments": {"width": 0.125}, "epochs": 3, "batch_size": 64, "precision": "fp32"}
        recipe = Recipe("convnet", "five_digits_for_a_test:load", method="standard", **arguments)
        data = recipe.load_data()
        Run.start(folder / "run", recipe, data).train(data, device="cpu", progress=False)
        yield folder / "run"


@pytest.fixture(scope="module")
def digits():
    return ts.data.load("digits", seed=2)


@pytest.fixture
def seven(torchslice, five, tmp_path):
    """An artefact that has learned two digits more."""
    path = tmp_path / "seven.safetensors"
    arguments = ("--classes", "5,6", "--share", 0.5, "--replay", 0.2, "--keep", "--out", path, *RUNNING)
    assert torchslice("extend", five, "digits", *arguments).code == 0
    return path


def test_it_saves_what_python_makes(torchslice, five, digits, tmp_path):
    path = tmp_path / "new" / "seven.safetensors"
    options = ("--classes", "5,6", "--share", 0.5, "--out", path, *RUNNING)
    result = torchslice("extend", five, "digits", *options, "--json").json
    run = Run.open(five)
    data = run.load_data()
    network, running = run.network(data, device="cpu"), {"seed": 2, "device": "cpu", "progress": False}
    critical = slices_from(contributions(network, data, **running), Rule("taylor", "global", share=0.5)).critical
    network.preprocessing = data.preprocessing
    made = extend(network, critical, digits.restrict(["5", "6"]), classes=data.classes, epochs=1, **running)
    loaded = ts.load(path)
    assert torch.equal(predict_logits(loaded, digits), predict_logits(made.model, digits))
    assert loaded.classes == tuple("0123456") and loaded.preprocessing == data.preprocessing
    assert result["known"] == list("01234") and result["new"] == ["5", "6"]
    assert result["neuron_retention"] == critical.neuron_retention
    assert [step["name"] for step in result["steps"]] == ["new classes"]
    again = Extended.of(loaded, digits.example)
    assert torch.equal(
        predict_logits(again.network(0), digits), predict_logits(ts.extract(network, critical, data.example), digits)
    )


def test_evaluate_answers_with_and_without_the_task(torchslice, seven, digits):
    result = torchslice("evaluate", seven, "digits", "--device", "cpu", "--json").json
    known = read_record(seven)["preprocessing"]
    task = replace(digits.restrict(list("0123456")), mean=tuple(known["mean"]), std=tuple(known["std"]))
    made = Extended.of(ts.load(seven), task.example)
    assert result["accuracy"] == ts.accuracy(made.joined(), task).overall
    assert result["task_accuracy"]["5, 6"] == ts.accuracy(made.network(), task.restrict(["5", "6"])).overall
    assert list(result["task_accuracy"]) == ["0, 1, 2, 3, 4", "5, 6"]
    assert set(result["class_accuracy"]) == set("0123456") and 0 <= result["accuracy"] <= 1
    assert result["parameters"] == sum(p.numel() for p in made.model.parameters())
    text = torchslice("evaluate", seven, "digits", "--device", "cpu").out
    assert "of 5, 6 where it is known to be one of them" in text


def test_an_artefact_is_extended_again(torchslice, seven, digits, tmp_path):
    path = tmp_path / "nine.safetensors"
    arguments = ("--classes", "7,8", "--share", 0.3, "--settle", 1, "--widen", 1.25, "--replay", 0.1, "--out", path)
    result = torchslice("extend", seven, "digits", *arguments, *RUNNING, "--json").json
    assert result["known"] == list("0123456") and len(result["steps"]) == 8
    before, after = (Extended.of(ts.load(file), digits.example) for file in (seven, path))
    assert [task.classes for task in after.tasks] == [tuple("01234"), ("5", "6"), ("7", "8")]
    assert torch.equal(predict_logits(after.network(0), digits), predict_logits(before.network(0), digits))
    record = read_record(path)
    assert sum(layer["width"] for layer in record["slice"].values()) > sum(before.tasks[0].part.layers.values())
    assert json.dumps(record["metrics"]["steps"]) == json.dumps(result["steps"])


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--classes", "4,5", "--share", 0.5), ["knows 4 already"]),
        (("--classes", "5", "--share", 0.5), ["a single new class ('5')", "replay"]),
        (("--classes", "5,ten", "--share", 0.5), ["'ten'", "Known: 0, 1"]),
        (("--classes", "5,6"), ["no slices yet", "torchslice slice"]),
        (("--classes", "5,6", "--share", 1), ["every neuron is critical", "widen"]),
        (("--classes", "5,6", "--share", 0.5, "--widen", 0.5), ["factor must be above 1"]),
        (("--classes", "5,6", "--share", 0.5, "--replay", 2), ["--replay"]),
    ],
)
def test_it_refuses_what_cannot_be(torchslice, five, tmp_path, options, parts):
    path = tmp_path / "x.safetensors"
    torchslice("extend", five, "digits", *options, "--out", path, *RUNNING).refused(*parts)
    assert not path.exists()


def test_files_that_do_not_fit(torchslice, tmp_path):
    path, out = tmp_path / "m.safetensors", tmp_path / "x.safetensors"
    common = ("digits", "--classes", "5,6", "--out", out, *RUNNING)
    torchslice("extend", tmp_path / "nowhere", *common).refused("there is no file", "nowhere")
    ts.save(ts.models.create("convnet", num_classes=3, channels=1, width=0.125), path)
    torchslice("extend", path, *common, "--share", 0.5).refused("does not name the classes it knows")
    ts.save(ts.models.create("convnet", num_classes=2, channels=1, width=0.125), path, classes=["0", "1"])
    torchslice("extend", path, *common).refused("has no class slices to keep", "--share 0.5")
    (tmp_path / "file").write_text("")
    torchslice("extend", path, *common[:-6], "--out", tmp_path / "file" / "x").refused("cannot write")
