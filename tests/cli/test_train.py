"""torchslice train: resumes, refuses what is not its own, leaves nothing behind when it fails early."""

import json
from dataclasses import replace

import pytest

from torchslice.core.hold import masked
from torchslice.runs import Run
from torchslice.slices import union
from torchslice.training.checkpoint import Checkpoint

from .conftest import TINY, TRAIN


def test_train_says_its_plan_and_gives_its_history(torchslice, tmp_path):
    out = tmp_path / "run"
    result = torchslice(*TRAIN, "--out", out, "--epochs", 1, "--train-limit", 100, "--device", "cpu", "--json")
    assert [row["epoch"] for row in result.json["history"]] == [1]
    for part in ("convnet", "parameters", "100 / 143 / 359", "1 epochs of 64", str(out)):
        assert part in result.err
    assert json.loads((out / "run.json").read_text())["recipe"]["train_limit"] == 100
    assert sorted(path.name for path in out.iterdir()) == ["run.json", "training"]


def test_an_interrupted_training_goes_on_to_the_same_weights(torchslice, trained, tmp_path, monkeypatch):
    out = tmp_path / "run"
    save = Checkpoint.save

    def save_then_interrupt(self, *state):
        save(self, *state)
        raise KeyboardInterrupt

    arguments = (*TRAIN, "--out", out, "--epochs", TINY.epochs, "--device", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_then_interrupt)
        result = torchslice(*arguments)
    assert result.code == 130 and "resumes" in result.err.splitlines()[-1] and not result.out
    torchslice("slice", out, "--device", "cpu").refused("1 of 2 epochs", "torchslice train")
    result = torchslice(*arguments)
    assert result.code == 0 and "1 epochs are done; going on" in result.err
    data = TINY.load_data()
    resumed, whole = (Run.open(folder).network(data, device="cpu").state_dict() for folder in (out, trained))
    assert all(tensor.equal(whole[name]) for name, tensor in resumed.items())


def test_a_finished_training_is_left_alone(torchslice, trained):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    result = torchslice(*TRAIN, "--out", trained, "--epochs", 2, "--device", "cpu")
    assert result.code == 0 and "nothing is left to do" in result.err
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}


def test_another_recipe_in_the_same_folder_is_refused(torchslice, trained):
    refusal = torchslice(*TRAIN, "--out", trained, "--epochs", 3, "--seed", 0, "--learning-rate", 0.1)
    refusal.refused("epochs was 2, now 3", "learning_rate was 0.05, now 0.1", "another folder")


def test_a_folder_of_something_else_is_refused(torchslice, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    torchslice(*TRAIN, "--out", tmp_path).refused("no run", "empty folder")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unwritable_folder_is_found_before_the_data_are_loaded(torchslice, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(type(TINY), "load_data", lambda *_: pytest.fail("loaded"))
    torchslice(*TRAIN, "--out", file / "run").refused("cannot write", "folder")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["convnt", "digits"], ["'convnt'", "Did you mean 'convnet'?"]),
        (["convnet", "digist"], ["'digist'", "Did you mean 'digits'?"]),
        (["convnet", "folder:nowhere"], ["nowhere", "one sub-folder"]),
        (["convnet", "cifar10"], ["cifar10", "cifar-10-batches-py", "--data-dir"]),
        (["convnet", "digits", "--model-argument", "channels=3"], ["[2, 1, 8, 8]"]),
        (["convnet", "digits", "--model-argument", "num_classes=3", "--method", "standard"], ["[2, 3]", "[2, 10]"]),
        (["convnet", "digits", "--epochs", "0"], ["epochs", "at least 1"]),
        (["convnet", "digits", "--batch-size", "1"], ["batch_size 1"]),
        (["convnet", "digits", "--learning-rate", "-1"], ["learning_rate", "above 0"]),
        (["convnet", "digits", "--method", "mwt", "--coupling-weight", "-1"], ["coupling_weight"]),
        (["convnet", "digits", "--coupling-weight", "1"], ["--coupling-weight plays no part", "--method mwt"]),
        (["convnet", "digits", "--method", "standard", "--taper", "1"], ["--taper plays no part", "--method modular"]),
        (["convnet", "digits", "--retention", "0"], ["share", "(0, 1]"]),
        (["convnet", "digits", "--epochs", "3", "--standard-epochs", "3"], ["standard_epochs 3 of 3"]),
        (["convnet", "digits", "--data-option", "colour=1"], ["colour"]),
        (["convnet", "digits", "--train-limit", "0"], ["at least 1 sample"]),
    ],
)
def test_train_refuses_and_leaves_nothing(torchslice, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.setattr("urllib.request.urlopen", _no_network)
    monkeypatch.setenv("TORCHSLICE_DATA", str(tmp_path / "data"))
    torchslice("train", *arguments, "--out", tmp_path / "run", "--device", "cpu").refused(*parts)
    assert not (tmp_path / "run").exists()


def _no_network(*args, **kwargs):
    raise OSError("no network")


def test_modular_training_in_two_parts_resumes_and_gives_sub_models_without_gates(torchslice, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "run"
    arguments = [*TRAIN[:-1], "modular", "--epochs", 4, "--retention", 0.3, "--device", "cpu", "--out"]
    history = torchslice(*arguments, whole, "--json").json["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    save, epochs = Checkpoint.save, iter(range(9))

    def save_then_interrupt(self, *state):
        save(self, *state)
        if next(epochs) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_then_interrupt)
        assert torchslice(*arguments, out).code == 130
    torchslice("slice", out).refused("3 of 4 epochs", "torchslice train")
    assert "3 epochs are done; going on" in torchslice(*arguments, out).err
    data = TINY.load_data()
    resumed, straight = (Run.open(folder).network(data, device="cpu").state_dict() for folder in (out, whole))
    assert all(tensor.equal(straight[name]) for name, tensor in resumed.items())

    slices = torchslice("slice", out, "--json").json
    assert slices["by"] == "training" and slices["rule"]["slicer"] == "budget"
    assert all(abs(share - 0.3) < 0.05 for share in slices["neuron_retention"]["classes"].values())
    torchslice("slice", out, "--by", "gates").refused("no gates", "--by training")
    small = torchslice("extract", out, "--classes", "3,8", "--out", tmp_path / "pair.safetensors", "--json").json
    assert small["gates"] is None and small["neuron_retention"] < 0.7


def test_neurons_of_no_class_are_zero_in_the_network_of_a_modular_run(tmp_path):
    recipe = replace(TINY, method="modular", epochs=2, retention=0.05)
    data = recipe.load_data()
    run = Run.start(tmp_path / "run", recipe, data)
    run.train(data, device="cpu", progress=False)
    network = run.network(data, device="cpu")
    used = union(run.slices().values())
    assert used.neuron_retention < 1
    expected = network(data.example)
    with masked(network, used, data.example):
        assert network(data.example).equal(expected)
