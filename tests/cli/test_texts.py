"""The whole way on texts: a folder of transformers and a CSV file, from the command line."""

import pytest

from tests.texts import CLASSES, ROWS, WORDS, config, write_csv, write_folder
from torchslice.imports import import_transformers

from .conftest import QUICK

CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return f"hf:{write_folder(tmp_path_factory.mktemp('encoder'))}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return f"csv:{write_csv(tmp_path_factory.mktemp('data') / 'sentences.csv')}"


@pytest.mark.parametrize("method", ["standard", "gates", "subtasks"])
def test_from_a_folder_of_transformers_to_a_sub_model(torchslice, model, data, tmp_path, method):
    run, part = tmp_path / "run", tmp_path / "part.safetensors"
    options = ["--optimizer", "adamw", "--learning-rate", 0.003, *QUICK, "--epochs", 2, "--method", method]
    trained = torchslice("train", model, data, *options, "--out", run, "--json")
    assert len(trained.json["history"]) == 2 and "texts of 1 to 8 tokens" in trained.err
    options = ["--strategy", "per-layer", "--neuron-fraction", 0.5] if method == "standard" else []
    assert torchslice("slice", run, *options, *CPU, "--json").code == 0
    cut = torchslice("extract", run, "--classes", "animals,weather", "--out", part, *CPU, "--json").json
    assert cut["classes"] == ["animals", "weather"] and 0 < cut["param_retention"] < 1
    found = torchslice("evaluate", part, data, *CPU, "--json").json  # with the tokenizer that is in the file
    assert set(found["class_accuracy"]) == {"animals", "weather"}
    if method == "standard":
        rest = [row for row in ROWS if row[1] != "colours"]
        few = f"csv:{write_csv(tmp_path / 'few.csv', rest)}"
        whole, all_three = tmp_path / "two", tmp_path / "three.safetensors"
        torchslice("train", model, few, *QUICK, "--method", "standard", "--out", whole)
        extend = ["--new", data, "--classes", "colours", "--replay", 0.5, "--neuron-fraction", 0.5, *QUICK]
        assert torchslice("extend", whole, *extend, "--out", all_three).code == 0
        assert set(torchslice("evaluate", all_three, data, *CPU, "--json").json["class_accuracy"]) == set(CLASSES)
        readapt = ["--new", data, "--param-fraction", 0.1, *QUICK, "--out", tmp_path / "adapted.safetensors"]
        assert torchslice("readapt", run, *readapt).code == 0
        smaller = ["--param-retention", 0.95, *QUICK, "--out", tmp_path / "smaller.safetensors"]
        assert torchslice("restructure", run, *smaller).code == 0


def test_neurons_of_a_network_of_texts(torchslice, model):
    found = torchslice("neurons", model, "--num-classes", 3, "--input-shape", 9, "--json").json
    assert found["neurons"] >= 48 and found["input_shape"] == [9]


def test_a_trained_classifier_needs_no_weights_beside_it(torchslice, data, tmp_path):
    path = write_folder(tmp_path / "trained", import_transformers().BertForSequenceClassification(config()))
    assert torchslice("evaluate", f"hf:{path}", data, *CPU, "--json").code == 0
    out = tmp_path / "part.safetensors"
    cut = ("extract", f"hf:{path}", data, "--classes", "animals,weather", "--out", out, *CPU, "--json")
    assert torchslice(*cut).json["classes"] == ["animals", "weather"]
    assert torchslice("evaluate", out, data, *CPU, "--json").code == 0
    untrained = write_folder(tmp_path / "untrained")
    torchslice("evaluate", f"hf:{untrained}", data).refused("comes untrained", "weights")


def test_refusals(torchslice, model, data, tmp_path):
    out = ("--out", tmp_path / "run")
    large = write_folder(tmp_path / "large", vocab_size=len(WORDS) - 1)
    torchslice("train", f"hf:{large}", data, *out).refused(
        f"{len(WORDS)} tokens and its network knows {len(WORDS) - 1}"
    )
    long = write_csv(tmp_path / "long.csv", [*ROWS, ("rain " * 40, "weather")])
    torchslice("train", model, f"csv:{long}", *out).refused("1 of", "longer than the model takes, 16 tokens", "max")
    bare = write_csv(tmp_path / "bare.csv", [*ROWS, ("it rains", "")])
    torchslice("train", model, f"csv:{bare}", *out).refused("line 146: there is no label")
    torchslice("train", "convnet", data, *out).refused("not tokenised yet")
    torchslice("train", "hf:nowhere", data, *out).refused("nowhere")
    assert not (tmp_path / "run").exists()
    options = ("--data-option", "max_length=4", *QUICK)
    assert torchslice("train", model, f"csv:{long}", "--method", "standard", *options, *out).code == 0
