"""torchslice slice, extract and evaluate, from runs, weights and artefacts to figures."""

import json
import re

import pytest
import torch

import torchslice as ts
from torchslice.budget import fit_budget
from torchslice.cli.slice import STRATEGIES
from torchslice.rankings import POWERS, by_best_rank
from torchslice.runs import Run
from torchslice.runs.run import prefixes

from .conftest import neurons_of

CPU = ("--device", "cpu")
SOURCES = ("run", "pt", "safetensors", "artefact")
FEW = ("--samples-per-class", 20)


# -- slice --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_slices_by_contribution_are_those_that_python_finds(torchslice, standard, copy_of, strategy):
    folder, rule = copy_of(standard), {"theta": 0.8, "slope": 0.5}
    if strategy != "reach-theta":
        rule = {"outside": 0.2} if strategy == "by-group" else {"neuron_fraction": 0.3}
    options = [text for name, value in rule.items() for text in (f"--{name.replace('_', '-')}", value)]
    options += ["--strategy", strategy, "--metric", "var", *FEW, "--seed", 1]
    result = torchslice("slice", folder, *options, *CPU, "--json").json
    neurons, task = neurons_of(folder)
    scores = ts.semantic.contributions(neurons, task, metric="var", samples_per_class=20, seed=1, progress=False)
    found = ts.semantic.class_slices(neurons, task, scores, strategy=STRATEGIES[strategy](**rule), progress=False)
    assert result["by"] == "contribution" and {**result, "source": 0, "by": 0} == {
        "source": 0,
        "by": 0,
        **found.summary(),
    }
    assert min(slice_.neuron_retention for slice_ in found.values()) < 1
    stored = json.loads((folder / "slices.json").read_text())
    assert stored["critical"] == found.critical.to_plain() and stored["metric"] == "var"
    assert Run.open(folder).slices() == {**found}


def test_groups_are_those_that_python_finds(torchslice, standard):
    result = torchslice(
        "groups", standard, "--metric", "var", *FEW, "--outside", 0.4, "--count", 4, *CPU, "--json"
    ).json
    neurons, task = neurons_of(standard)
    scores = ts.semantic.contributions(neurons, task, metric="var", samples_per_class=20, progress=False)
    found = ts.semantic.groups(neurons, scores, outside=0.4, count=4)
    assert {**found.to_plain(), "source": str(standard), "metric": "var", "outside": 0.4} == result
    text = torchslice("groups", standard, *FEW, *CPU).out
    assert "semantic groups of" in text and "Next:  torchslice slice" in text and "--strategy by-group" in text


# -- report and plot ----------------------------------------------------------------------------------------------
def test_a_report_of_a_run_holds_everything(torchslice, standard, copy_of, tmp_path):
    pytest.importorskip("matplotlib")
    folder, out = copy_of(standard), tmp_path / "report.html"
    torchslice("slice", folder, "--strategy", "by-group", *FEW, *CPU)
    result = torchslice("report", folder, "--out", out, "--classes", "3,8", *FEW, *CPU, "--json").json
    text = out.read_text()
    assert result["bytes"] == len(text.encode()) < 3_000_000
    sections = ("parts", "sharing", "groups", "stages", "training", "layers")
    assert all(f'id="{section}"' in text for section in sections) and "random slice, repaired" in text
    assert str(folder) in text


def test_a_report_of_an_unfinished_run_shows_what_there_is(torchslice, standard, copy_of, tmp_path):
    pytest.importorskip("matplotlib")
    folder, out = copy_of(standard), tmp_path / "report.html"
    plain = json.loads((folder / "run.json").read_text())
    plain["recipe"]["training"]["epochs"] += 3
    (folder / "run.json").write_text(json.dumps(plain))
    torchslice("report", folder, "--out", out, *CPU)
    text = out.read_text()
    assert "This run is not trained to its end" in text and 'id="layers"' in text and 'id="training"' in text
    assert 'id="groups"' not in text


@pytest.mark.parametrize("what", ["tree", "overlap", "sharing", "training"])
def test_plots(torchslice, standard, tmp_path, what):
    pytest.importorskip("matplotlib")
    out = tmp_path / "x.png"
    options = {"overlap": ("--layer", "features.3.0", *FEW), "training": ()}.get(what, FEW)
    assert "drawn: " in torchslice("plot", standard, "--what", what, *options, "--out", out, *CPU).out
    assert out.read_bytes()[:4] == b"\x89PNG"


def test_slices_by_gates_and_their_report(torchslice, gates, copy_of):
    folder = copy_of(gates)
    result = torchslice("slice", folder, "--frequency-threshold", 0.8, *CPU, "--json").json
    assert result["by"] == "gates" and set(result["report"]["classes"]) == set("0123456789")
    stored = json.loads((folder / "slices.json").read_text())
    assert stored["report"] == result["report"] and stored["frequency_threshold"] == 0.8
    gated, task = neurons_of(folder)
    assert Run.open(folder).slices() == ts.gates.class_slices(gated, task, frequency_threshold=0.8, progress=False)
    assert "mean" in torchslice("slice", folder, *CPU).out


def test_a_run_with_gates_goes_without_them_by_contribution(torchslice, gates, copy_of):
    folder, found = copy_of(gates), {}
    for treatment in ("fold", "drop"):
        options = ("--by", "contribution", "--gates", treatment, "--theta", 0.7, *FEW)
        assert torchslice("slice", folder, *options, *CPU, "--json").json["strategy"]["theta"] == 0.7
        found[treatment] = Run.open(folder).slices()
    assert found["fold"] != found["drop"]


def test_slices_by_training_are_prefixes_of_its_rankings(torchslice, subtasks, copy_of):
    folder = copy_of(subtasks)
    rankings = Run.open(folder).rankings()
    assert Run.open(folder).slices() == prefixes(rankings) and set(rankings) == set("0123456789")
    result = torchslice("slice", folder, "--share", 0.5, *CPU, "--json").json
    assert result["by"] == "training" and result["share"] == 0.5
    assert Run.open(folder).slices() == prefixes(rankings, 0.5)
    kept = {name: slice_.neuron_retention for name, slice_ in prefixes(rankings, 0.5).items()}
    assert result["neuron_retention"]["classes"] == kept
    other = torchslice("slice", folder, "--by", "contribution", "--theta", 0.7, *FEW, *CPU, "--json").json
    assert other["strategy"]["strategy"] == "ReachTheta"
    assert Run.open(folder).slices() != prefixes(rankings, 0.5)


# -- extract ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("source", SOURCES)
def test_from_any_source_to_slices_to_a_sub_model_to_its_accuracy(torchslice, sources, source, standard, tmp_path):
    found, out = tmp_path / "slices.json", tmp_path / "new" / "pair.safetensors"
    result = torchslice("slice", *sources[source], "--out", found, "--theta", 0.8, *FEW, *CPU)
    assert result.code == 0, result.err
    assert f"--slices {found} --classes 0,1 --out part.safetensors" in result.out
    words = (*sources[source], "--classes", "8,3", "--slices", found, "--finetune", 0, "--out", out, *CPU)
    figures = torchslice("extract", *words, "--json").json
    assert figures["classes"] == ["3", "8"] and figures["best_epoch"] is None
    assert list(figures["validation_accuracy"]) == ["whole", "extracted", "compensated", "recalibrated"]
    neurons, task = neurons_of(standard)
    scores = ts.semantic.contributions(neurons, task, samples_per_class=20, progress=False)
    slices = ts.semantic.class_slices(neurons, task, scores, strategy=ts.semantic.ReachTheta(0.8), progress=False)
    made, small = ts.reuse(neurons, task, slices, classes=["3", "8"], tune=False), ts.load(out)
    assert figures["neuron_retention"] == made.slice.neuron_retention < 1 and small.slice == made.slice
    assert figures["whole"]["parameters"] == ts.judge.cost(neurons.model, task.example).parameters
    assert small.classes == ("3", "8") and small.preprocessing == task.preprocessing
    with torch.no_grad():
        assert torch.equal(small.model(task.example), made.model(task.example))
    result = torchslice("evaluate", out, "digits", *CPU, "--json").json
    assert result["accuracy"] == ts.accuracy(small.model, task.restrict(["3", "8"])).overall
    assert result["param_retention"] == figures["param_retention"]
    torchslice("extract", *words).refused(f"{out} exists", "--force")
    assert torchslice("extract", *words, "--force").code == 0


def test_slices_are_found_where_there_are_none(torchslice, sources, tmp_path):
    out = tmp_path / "pair.safetensors"
    result = torchslice("extract", *sources["artefact"], "--classes", "3,8", "--finetune", 0, "--out", out, *CPU)
    assert result.code == 0 and "contributions" in result.err
    torchslice("extract", *sources["run"], "--classes", "3,8", "--out", tmp_path / "x").refused(
        "no slices yet", "torchslice slice", "--by contribution"
    )


def test_fine_tuning_and_dropped_gates(torchslice, gates, copy_of, tmp_path):
    folder, folded, dropped = copy_of(gates), tmp_path / "folded.safetensors", tmp_path / "dropped.safetensors"
    assert torchslice("slice", folder, *CPU).code == 0
    common = ("extract", folder, "--classes", "3,8", *CPU, "--json", "--out")
    assert torchslice(*common, folded, "--finetune", 0).json["best_epoch"] is None
    options = ("--gates", "drop", "--finetune", 1, "--learning-rate", 0.02, "--optimizer", "adamw")
    tuned = torchslice(*common, dropped, *options).json
    assert "fine-tuned" in tuned["validation_accuracy"] and tuned["best_epoch"] in (0, 1)
    norms = [ts.load(path).model.state_dict()["features.1.1.weight"] for path in (folded, dropped)]
    assert not torch.equal(*norms)


def test_a_sub_task_run_needs_no_slices_of_its_own(torchslice, subtasks, tmp_path):
    small = torchslice(
        "extract", subtasks, "--classes", "3,8", "--out", tmp_path / "x.safetensors", *CPU, "--json"
    ).json
    assert small["neuron_retention"] < 0.7


def test_a_budget_on_a_sub_task_run_takes_the_neurons_that_training_ranked(torchslice, subtasks, tmp_path):
    out = tmp_path / "pair.safetensors"
    words = ("--classes", "3,8", "--mac-retention", 0.6, "--round-to", 1, "--finetune", 0, "--out", out, *CPU)
    figures = torchslice("extract", subtasks, *words, "--json").json
    neurons, _ = neurons_of(subtasks)
    ranking = by_best_rank(Run.open(subtasks).rankings()[name] for name in ("3", "8"))
    expected = fit_budget(neurons, ranking, classes=["3", "8"], mac_retention=0.6, powers=POWERS, round_to=1)
    assert ts.load(out).slice == expected and 0.4 < figures["mac_retention"] <= 0.6


def test_a_budget_that_no_sub_model_fits_says_the_smallest_one(torchslice, standard, subtasks, tmp_path):
    out = tmp_path / "pair.safetensors"
    for run, budget in ((standard, ("--mac-retention", 0.001)), (subtasks, ("--latency-ms", 1e-6))):
        result = torchslice("extract", run, "--classes", "3,8", *budget, "--out", out, *CPU)
        assert result.code == 2 and not result.out and not out.exists()
        least = re.search(f"no sub-model fits {budget[0]} .*: the smallest, .* Give {budget[0]} ([\\d.]+) ", result.err)
        assert least is not None and "contributions" not in result.err  # nothing is measured in vain
        if run == standard:
            words = ("--classes", "3,8", "--finetune", 0, "--out", tmp_path / "least.safetensors", *CPU)
            assert torchslice("extract", run, "--mac-retention", least[1], *words).code == 0


# -- evaluate -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("source", SOURCES)
def test_evaluate_scores_the_test_samples(torchslice, sources, source, standard):
    neurons, task = neurons_of(standard)
    result = torchslice("evaluate", *sources[source], *CPU, "--json").json
    assert result["accuracy"] == ts.accuracy(neurons.model, task).overall and result["data"] == "digits"
    assert list(result["class_accuracy"]) == list("0123456789") and set(result["latency"]) == {"1", "64"}
    assert result["parameters"] == 4838 and result["macs"] > 0 and 0 <= result["calibration_error"] < 0.5


def test_evaluate_a_run_with_gates_as_a_table(torchslice, gates):
    text = torchslice("evaluate", gates, *CPU).out
    for part in ("accuracy", "at batch 64", "MACs", "calibration error", "all"):
        assert part in text


def test_a_saved_network_with_all_classes_needs_no_class_names(torchslice, tmp_path):
    path = tmp_path / "all.safetensors"
    ts.save(ts.models.create("convnet", channels=1, width=0.125), path)
    assert 0 <= torchslice("evaluate", path, "digits", *CPU, "--json").json["accuracy"] <= 1
    ts.save(ts.models.create("convnet", num_classes=3, channels=1, width=0.125), path)
    torchslice("evaluate", path, "digits", *CPU).refused("3 logits", "10 different classes")


def test_classes_that_the_data_do_not_have(torchslice, own, sources):
    torchslice("evaluate", sources["artefact"][0], f"{own}:load").refused("'5'", "0, 1, 2, 3, 4")
    torchslice("evaluate", sources["artefact"][0], f"{own}:letters").refused("'0'", "a, b")
    torchslice("evaluate", sources["artefact"][0], f"{own}:wide").refused("1x8x8", "1x8x16")


# -- files that are not what they should be -----------------------------------------------------------------------
def test_runs_that_are_missing_foreign_damaged_or_stale(torchslice, standard, copy_of, tmp_path):
    folder, out = copy_of(standard), tmp_path / "x.safetensors"
    slice_, extract = ("slice", folder, *FEW, *CPU), ("extract", folder, "--classes", "3,8", "--out", out, *CPU)
    assert torchslice(*slice_).code == 0
    (tmp_path / "empty").mkdir()
    torchslice("slice", tmp_path / "empty").refused("no run", "torchslice train")
    checkpoint, found = folder / "training" / "checkpoint.safetensors", folder / "slices.json"
    weights, slices, recipe = checkpoint.read_bytes(), found.read_text(), json.loads((folder / "run.json").read_text())

    found.write_text(slices[:100])
    torchslice(*extract).refused("slices.json", "damaged")
    found.write_text(slices.replace('"weights_sha256": "', '"weights_sha256": "0'))
    torchslice(*extract).refused("other weights", "torchslice slice")
    found.unlink()
    torchslice(*extract).refused("no slices yet", "torchslice slice")

    checkpoint.write_bytes(weights[:1000])
    torchslice(*slice_).refused("checkpoint.safetensors", "damaged")
    checkpoint.unlink()
    torchslice(*slice_).refused("0 of 2 epochs")
    checkpoint.write_bytes(weights)

    recipe["recipe"]["model_arguments"]["width"] = 0.25
    (folder / "run.json").write_text(json.dumps(recipe))
    torchslice(*slice_).refused("does not belong to the network")
    recipe["fingerprint"] = "0" * 16
    (folder / "run.json").write_text(json.dumps(recipe))
    torchslice(*slice_).refused("other samples", "--data-dir")
    for text, part in (("{", "damaged"), ("[]", "damaged"), ("{}", "damaged"), ('{"format_version": 3}', "has no")):
        (folder / "run.json").write_text(text)
        torchslice(*slice_).refused("run.json", part)
    assert not out.exists()


def test_artefacts_that_are_missing_damaged_or_of_another_program(torchslice, sources, tmp_path):
    whole, damaged = sources["artefact"][0], tmp_path / "damaged.safetensors"
    torchslice("evaluate", tmp_path / "nowhere.safetensors", "digits").refused("no file", "nowhere.safetensors")
    damaged.write_bytes(whole.read_bytes()[:-100])
    torchslice("evaluate", damaged, "digits").refused("damaged.safetensors", "whole")
    damaged.write_bytes(whole.read_bytes()[:-4] + b"\1\2\3\4")
    torchslice("evaluate", damaged, "digits").refused("does not match its hash")
    torchslice("evaluate", sources["safetensors"][-1], "digits").refused("another program")


def test_weights_that_do_not_fit(torchslice, sources, tmp_path):
    *model, _, weights = sources["pt"]
    common = ("--weights", weights, *CPU)
    torchslice("evaluate", "convnet", "digits", *common).refused(
        "'features.0.0.weight'", "[4, 1, 3, 3]", "[32, 1, 3, 3]"
    )
    torchslice("evaluate", *model, "--weights", sources["artefact"][0]).refused("whole network that torchslice saved")
    (tmp_path / "text.pt").write_text("no tensors")
    torchslice("evaluate", *model, "--weights", tmp_path / "text.pt").refused("not a file of tensors alone")
