"""torchslice restructure: from a run to a small artefact, and what it refuses."""

import json

import pytest
import torch

import torchslice as ts
from torchslice.cli.restructure import Removal
from torchslice.runs import Run
from torchslice.use import PRUNING, read_record, restructure
from torchslice.use.restructure import STRUCTURED

from .conftest import TINY

RUNNING = ("--device", "cpu", "--seed", 2, "--epochs", 1)


@pytest.fixture
def sliced(torchslice, standard_copy):
    """A standard run with slices."""
    options = ("--by", "contribution", "--samples", 20, "--theta", 0.8, "--device", "cpu")
    assert torchslice("slice", standard_copy, *options).code == 0
    return standard_copy


def test_methods_are_those_of_python():
    assert [method.value for method in Removal] == [*PRUNING.names(), STRUCTURED]


def test_it_saves_what_python_makes(torchslice, sliced, tmp_path):
    path = tmp_path / "new" / "small.safetensors"
    options = ("--method", "erk", "--param-retention", 0.4, "--max-accuracy-loss", 1, "--rate", 0.5, *RUNNING)
    result = torchslice("restructure", sliced, "--out", path, *options, "--json").json
    assert result["steps"][-1]["param_retention"] <= 0.4 and result["stopped"] == "target"
    assert result["param_retention"] == result["steps"][-1]["param_retention"] and result["method"] == "erk"
    run, data = Run.open(sliced), TINY.load_data()
    part = ts.slices.union(run.slices().values())
    settings = {"max_accuracy_loss": 1, "rate": 0.5, "epochs_per_iteration": 1, "seed": 2, "progress": False}
    made = restructure(
        run.network(data, device="cpu"), part, data, method="erk", param_retention=0.4, device="cpu", **settings
    )
    small = ts.load(path)
    with torch.no_grad():
        assert torch.equal(small(data.example), made.model(data.example))
    assert small.classes == data.classes and small.preprocessing == data.preprocessing
    assert read_record(path)["slice"] == json.loads(json.dumps(part.to_plain()))
    evaluated = torchslice("evaluate", path, "digits", "--device", "cpu", "--json").json
    assert evaluated["accuracy"] == ts.accuracy(small, data).overall
    assert evaluated["param_retention"] == result["param_retention"]


def test_structured_by_contribution_and_without_a_slice(torchslice, standard, tmp_path, monkeypatch):
    computed, contributions = [], ts.semantic.contributions
    monkeypatch.setattr(ts.semantic, "contributions", lambda *a, **k: computed.append(k) or contributions(*a, **k))
    path = tmp_path / "small.safetensors"
    options = ("--method", "structured", "--mac-retention", 0.5, "--max-accuracy-loss", 1, *RUNNING)
    result = torchslice("restructure", standard, "--out", path, "--share", 0.8, *options, "--json").json
    assert result["mac_retention"] <= 0.5 and result["steps"][-1]["sparsity"] == 0 and len(computed) == 1
    whole = ts.cost(Run.open(standard).network(TINY.load_data()), TINY.load_data().example).macs
    assert ts.cost(ts.load(path), TINY.load_data().example).macs / whole == pytest.approx(result["mac_retention"])
    text = torchslice("restructure", standard, "--out", path, "--no-slice", "--param-retention", 0.9, *RUNNING)
    assert "iteration 1" in text.out and "cut" not in text.out and f"torchslice evaluate {path} digits" in text.out
    assert "iteration 1: " in text.err and read_record(path)["slice"] is None


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ((), ["give one target", "got none"]),
        (("--param-retention", 0.5, "--latency-ms", 1), ["got param_retention, latency_ms"]),
        (("--latency-ms", 1), ["zeros do not make a network faster", "structured"]),
        (("--param-retention", 0.001), ["param_retention=0.001", "one neuron per layer"]),
        (("--param-retention", 0.5, "--rate", 1.5), ["rate", "(0, 1)", "1.5"]),
        (("--param-retention", 0.5, "--method", "lmap"), ["lmap", "lamp", "uniform+", "structured"]),
        (("--param-retention", 0.5, "--no-slice"), ["--no-slice", "--share"]),
    ],
)
def test_what_is_refused(torchslice, standard, tmp_path, options, parts):
    path = tmp_path / "x.safetensors"
    torchslice("restructure", standard, "--out", path, "--share", 0.9, *options, *RUNNING).refused(*parts)
    assert not path.exists()


def test_a_run_without_slices_and_an_unwritable_file(torchslice, standard, tmp_path):
    path = tmp_path / "x.safetensors"
    torchslice("restructure", standard, "--out", path, "--param-retention", 0.5).refused("no slices yet")
    torchslice("restructure", standard, "--out", tmp_path, "--param-retention", 0.5).refused("cannot write")
    torchslice("restructure", tmp_path, "--out", path, "--param-retention", 0.5).refused("no run")


def test_a_metric_without_contributions_plays_no_part(torchslice, standard, tmp_path):
    out = ("--out", tmp_path / "x.safetensors", "--metric", "var")
    torchslice("restructure", standard, "--param-retention", "0.5", *out).refused("--metric", "--share or --method")
    torchslice("readapt", standard, "digits", *out).refused("--metric plays no part without --param-share")
    torchslice("extend", standard, "digits", "--classes", "1", *out).refused("--metric plays no part without --share")
