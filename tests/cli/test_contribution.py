"""torchslice slice --by contribution, for networks with and without gates, and extract on what it finds."""

import inspect
import json
from dataclasses import fields

import pytest
import torch

import torchslice as ts
from torchslice.runs import Run
from torchslice.submodel import without_gates

from .conftest import TINY

FINDERS = ("find_slices", "find_semantic_slices")
BY = ("--by", "contribution", "--samples", 20, "--device", "cpu")


@pytest.mark.parametrize("slicer", ts.semantic.SLICERS)
def test_slices_are_those_that_python_finds(torchslice, standard_copy, slicer):
    rule = {"theta": 0.8, "positions": "all"} if slicer == "semantic" else {"share": 0.3}
    options = [text for name, value in {"slicer": slicer, **rule}.items() for text in (f"--{name}", value)]
    result = torchslice("slice", standard_copy, *BY, "--metric", "var", *options, "--seed", 1, "--json").json
    run, data = Run.open(standard_copy), TINY.load_data()
    network, running = run.network(data, device="cpu"), {"device": "cpu", "progress": False}
    scores = ts.semantic.contributions(network, data, metric="var", samples_per_class=20, seed=1, **running)
    found = ts.semantic.slice_model(network, data, scores, slicer=slicer, **rule, **running)
    assert result["rule"] == found.rule.to_plain() and result["rule"]["slicer"] == slicer
    assert result["neuron_retention"]["critical"] == found.critical.neuron_retention < 1
    stored = json.loads((standard_copy / "slices.json").read_text())
    assert (stored["by"], stored["gates"], stored["samples_per_class"], stored["seed"]) == ("contribution", None, 20, 1)
    assert ts.semantic.SemanticSlices.from_plain(stored).to_plain() == found.to_plain()
    assert run.slices() == found.by_class


def test_from_a_standard_run_to_a_sub_model(torchslice, standard_copy, tmp_path):
    assert "class slices keep" in torchslice("slice", standard_copy, *BY, "--theta", 0.9).out
    path = tmp_path / "pair.safetensors"
    arguments = ("extract", standard_copy, "--classes", "8,3", "--out", path, "--finetune", 1, "--device", "cpu")
    result = torchslice(*arguments, "--json").json
    assert result["gates"] is None and result["neuron_retention"] < 1 and result["param_retention"] < 1
    assert list(result["validation_accuracy"]) == ["whole, restricted", "extracted", "recalibrated", "fine-tuned"]
    run, data = Run.open(standard_copy), TINY.load_data()
    network = run.network(data, device="cpu")
    part = run.slices()["3"] | run.slices()["8"]
    assert result["neuron_retention"] == part.neuron_retention
    assert result["full"]["parameters"] == ts.cost(network, data.example).parameters
    made = ts.reuse(network, data, slices=run.slices(), classes=["3", "8"], epochs=1, progress=False, device="cpu")
    with torch.no_grad():
        assert torch.equal(ts.load(path)(data.example), made.model(data.example))
    assert torchslice("evaluate", path, "digits", "--device", "cpu").code == 0


def test_a_modular_run_goes_without_its_gates(torchslice, run_copy, tmp_path):
    found = {}
    for gates in ("fold", "drop"):
        result = torchslice("slice", run_copy, *BY, "--gates", gates, "--theta", 0.7, "--json")
        assert result.json["rule"]["theta"] == 0.7
        stored = json.loads((run_copy / "slices.json").read_text())
        assert stored["gates"] == gates
        found[gates] = Run.open(run_copy).slices()
    assert found["fold"] != found["drop"]
    path = tmp_path / "pair.safetensors"
    arguments = ("extract", run_copy, "--classes", "3,8", "--gates", "drop", "--out", path, "--device", "cpu")
    assert torchslice(*arguments, "--json").json["gates"] == "drop"
    assert ts.load(path).classes == ("3", "8")


def test_a_network_without_gates_is_what_it_is():
    data, model = TINY.load_data(), ts.models.create("convnet", channels=1, width=0.125)
    assert without_gates(model, data) is model
    with pytest.raises(ts.TorchsliceError, match="gates must be one of fold, drop, got 'keep'"):
        without_gates(model, data, gates="keep")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--theta", 0), ["theta", "(0, 1]"]),
        (("--slicer", "category", "--share", 1.5), ["share", "(0, 1]", "1.5"]),
        (("--metric", "tailor"), ["'tailor'", "Did you mean 'taylor'?"]),
        (("--slicer", "some"), ["some", "semantic", "category", "global"]),
        (("--samples", 0), ["samples_per_class"]),
    ],
)
def test_what_is_refused(torchslice, standard, options, parts):
    torchslice("slice", standard, *BY, *options).refused(*parts)
    assert not (standard / "slices.json").exists()


@pytest.mark.parametrize(
    ("options", "option", "played_by"),
    [
        (("--by", "contribution", "--threshold", 0.8), "--threshold", "--by gates"),
        (("--by", "gates", "--metric", "var"), "--metric", "--by contribution"),
        (("--theta", 0.9), "--theta", "--by contribution"),  # by gates is the default
        (("--by", "gates", "--slicer", "semantic"), "--slicer", "--by contribution"),
        (("--by", "gates", "--criterion", "cka"), "--criterion", "--by contribution"),
        (("--by", "gates", "--positions", "mean"), "--positions", "--by contribution"),
        (("--by", "gates", "--samples", 5), "--samples", "--by contribution"),
        (("--by", "gates", "--gates", "fold"), "--gates", "--by contribution"),
        (("--by", "contribution", "--share", 0.5), "--share", "--slicer category or global or budget"),
        (("--by", "contribution", "--slicer", "global", "--theta", 0.9), "--theta", "--slicer semantic"),
        (("--by", "contribution", "--slicer", "category", "--positions", "all"), "--positions", "--slicer semantic"),
        (("--by", "contribution", "--criterion", "mass", "--positions", "all"), "--positions", "--criterion cka"),
    ],
)
def test_an_option_that_would_play_no_part_is_refused(torchslice, run_copy, options, option, played_by):
    before = (run_copy / "slices.json").read_bytes()
    result = torchslice("slice", run_copy, *options)
    result.refused(f"{option} plays no part with --", f"leave it out, or give {played_by}.")
    assert len(result.err.splitlines()) == 1 and (run_copy / "slices.json").read_bytes() == before


def test_defaults_are_those_of_python():
    from torchslice.cli.slice import DEFAULTS, NEEDS

    gates, contribution = (inspect.signature(getattr(Run, name)).parameters for name in FINDERS)
    rule = {entry.name: entry.default for entry in fields(ts.semantic.Rule) if entry.name != "metric"}
    named = {"metric": "metric", "samples": "samples_per_class", "gates": "gates"}
    known = {"threshold": gates["threshold"].default, **rule}
    assert known | {ours: contribution[name].default for ours, name in named.items()} == DEFAULTS
    assert NEEDS.keys() == DEFAULTS.keys()
