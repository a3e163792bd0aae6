"""Every benchmark at its smallest scale: it runs, resumes, and writes what it says."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import torchslice as ts
from benchmarks import (
    conformance,
    experiment,
    extend,
    moda,
    readapt,
    readings,
    recipe,
    remove,
    restructure,
    reuse,
    scale,
    semantic,
    slicing,
    speed,
    text,
    tied,
    upkeep,
    vit,
)
from benchmarks import (
    replace as replacing,
)
from benchmarks.experiment import Benchmark
from benchmarks.superclasses import SUPERCLASSES
from torchslice import TorchsliceError, Training, models
from torchslice.data import load
from torchslice.find.semantic import Contributions, contributions


def smoke(benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[list[dict[str, Any]], str]:
    """Run a benchmark in this folder, at the smoke scale with some changes; return its runs and its page."""
    monkeypatch.setitem(benchmark.settings, "smoke", replace(benchmark.settings["smoke"], **changes))
    runs = benchmark("smoke", out=".", device="cpu", progress=False)["runs"]
    page = Path(f"{benchmark.name}-smoke.md").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(benchmark.part, "result", None)  # what is finished is not run again
        assert benchmark("smoke", out=".", device="cpu", progress=False)["runs"] == runs
    again = benchmark("smoke", out=".", page_only=True)["runs"]
    assert again == runs and Path(f"{benchmark.name}-smoke.md").read_text() == page
    return runs, page


def test_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    (run,), page = smoke(recipe.BENCHMARK, monkeypatch)
    rows = {row["arm"]: row for row in run["rows"]}
    assert list(rows) == list(recipe.ARMS)
    for row in rows.values():
        assert row["flops"] == pytest.approx(6 * row["macs"] * 1295 * 2, rel=1e-3) and 0 <= row["test"] <= 1
        assert f"| {row['arm']} | {100 * row['test']:.2f} | {100 * row['validation']:.2f} | 2 | " in page
    assert rows["plain settings"]["macs"] == rows["defaults"]["macs"] < rows["defaults, wider"]["macs"]
    assert rows["plain settings"]["test"] != rows["defaults"]["test"]


def test_reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    (run,), page = smoke(reuse.BENCHMARK, monkeypatch)
    (network,) = reuse.SETTINGS["smoke"].networks
    rows = {(row["arm"], row["size"], row["budget"]): row for row in run["rows"]}
    for size, (budget,) in network.budgets:
        for arm in reuse.ARMS:
            row = rows[arm, size, None if arm in ("whole network", "MwT, as published", *FREE) else budget]
            assert 0 <= row["accuracy"] <= 1 and len(row["classes"]) == size and row["ms_64"] > 0
            assert row["of_whole"] * rows["whole network", size, None]["accuracy"] == pytest.approx(
                row["accuracy"], abs=1e-3
            )
            if row["budget"]:
                assert row["mac_retention"] <= budget + 1e-3
        assert len({rows[arm, size, budget]["parameters"] for arm in (*UNTUNED, *SAME)}) == 1
        assert not any(rows[arm, size, budget]["samples"] for arm in UNTUNED)
        steps = [rows[arm, size, budget]["samples"] for arm in SAME]
        assert 0 < steps[0] == steps[1] == steps[2] == steps[3] / 2
    assert rows["whole network", 10, None]["mac_retention"] == 1 > rows["slice", 2, 0.6]["mac_retention"]
    assert len(run["pairs"]) == 2 and all(
        row["change"] == pytest.approx(row["ours"] - row["whole"], abs=1e-3) for row in run["pairs"]
    )
    names = {"standard", "first", "subtasks", "mwt", "relu", "moda"}
    assert {row["what"] for row in run["training"]} == names
    assert all(f"| {arm}" in page for arm in reuse.ARMS) and "(reuse-smoke.png)" in page
    assert page.count("| 2 pairs |") == 2
    assert "A tuned slice of convnet on digits keeps" in page


def test_tied(monkeypatch: pytest.MonkeyPatch) -> None:
    (run,), page = smoke(tied.BENCHMARK, monkeypatch)
    rows = {row["arm"]: row for row in run["rows"]}
    assert list(rows) == list(tied.ARMS) and all(0.4 < row["macs"] <= row["most"] == 0.5 for row in rows.values())
    for metric in ("random", "taylor"):  # what is tied has more neurons for the same
        assert rows[f"{metric}, tied"]["neurons"] > rows[f"{metric}, untied"]["neurons"]
    assert all(f"| 50% of the MACs, {arm} | {100 * row['accuracy']:.1f} |" in page for arm, row in rows.items())


FREE = ("MwT, folded", "MODA", "MODA's rule")  # arms whose size no budget decides
UNTUNED = ("slice", "control: slice, statistics only", "control: random slice")
SAME = ("slice, tuned", "control: random slice, tuned", "control: from scratch", "control: from scratch, longer")


def test_measured_cells_are_read_again_and_not_for_other_settings(tmp_path: Path) -> None:
    asked: list[int] = []

    def measure() -> dict[str, Any]:
        asked.append(1)
        return {"value": len(asked)}

    path = tmp_path / "cells.jsonl"
    cells = experiment.Cells(path, {"seed": 0})
    assert [cells({"arm": arm}, measure)["value"] for arm in "aab"] == [1, 1, 2]
    assert experiment.Cells(path, {"seed": 0})({"arm": "b"}, measure) == {"value": 2} and len(asked) == 2
    with pytest.raises(TorchsliceError, match="other settings; remove it or choose another --out"):
        experiment.Cells(path, {"seed": 1})


@pytest.mark.parametrize("benchmark", [text.BENCHMARK, vit.BENCHMARK], ids=lambda benchmark: benchmark.name)
def test_transformers(benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,), page = smoke(benchmark, monkeypatch)
    (network,) = benchmark.settings["smoke"].networks
    arms = {(row["arm"], row["size"]): row for row in run["arms"]}
    assert arms.keys() == {(arm, size) for arm in text.ARMS for size in network.sizes}
    for (arm, size), row in arms.items():
        assert 0 <= row["accuracy"] <= 1 and 0 < row["neurons"] <= 1 and len(row["labels"]) == size
        assert row["change"] == pytest.approx(row["accuracy"] - arms["whole, restricted", size]["accuracy"], abs=2e-4)
        if "whole" not in arm and "MwT" not in arm:
            assert row["macs"] <= network.mac_retention + 0.05, arm  # attention is not in the budget
    assert arms["taylor", 2]["macs"] == arms["control: random, tuned", 2]["macs"] > network.mac_retention - 0.1
    assert all(have <= whole for have, whole in run["layers"].values())
    assert all(f"| {arm} |" in page for arm in text.ARMS) and f"## {network.model} on {network.data}" in page


def test_upkeep(monkeypatch: pytest.MonkeyPatch) -> None:
    (run,), page = smoke(upkeep.BENCHMARK, monkeypatch)
    rows = {task: {row["arm"]: row for row in run[task]} for task in upkeep.ARMS}
    assert all([*rows[task]] == [*arms] for task, arms in upkeep.ARMS.items()) and run["added"] == "animals"
    assert all(0 <= row["old"] <= 1 and 0 <= row["new"] <= 1 for row in run["extend"])
    trained = {arm: row["trained"] for arm, row in rows["readapt"].items()}
    assert trained["not adapted"] == 0 < trained["last layer"] < trained["critical neurons"] < trained["all neurons"]
    assert trained["critical neurons"] == trained["control: random neurons"]
    assert rows["readapt"]["not adapted"]["clean"] == run["accuracy"]
    assert all(row["macs"] <= 0.8 for row in run["restructure"])
    assert all(f"| {arm} |" in page for arms in upkeep.ARMS.values() for arm in arms)


def test_sub_tasks_by_hand() -> None:
    pairs, every = reuse.sub_tasks("abcdefg", 2, 9, seed=0), reuse.sub_tasks("abcdefg", 7, 9, seed=0)
    assert every == [tuple(range(7))] and len(pairs) == 3 and len({c for pair in pairs for c in pair}) == 6
    assert all(first < second for first, second in pairs) and pairs != reuse.sub_tasks("abcdefg", 2, 9, seed=1)
    names = sorted(name for names in SUPERCLASSES.values() for name in names.split())
    assert len(set(names)) == 100 and len(SUPERCLASSES) == 20
    natural = reuse.sub_tasks(names, 5, 20, seed=0)
    found = {" ".join(names[label] for label in labels) for labels in natural}
    assert found == {" ".join(sorted(group.split())) for group in SUPERCLASSES.values()}
    assert len(reuse.sub_tasks(names, 5, 3, seed=0)) == 3 and len(reuse.sub_tasks(names, 2, 99, seed=0)) == 50
    assert text.disjoint(5, (2, 5), 10, 0) == [(0, 1), (2, 3), (0, 1, 2, 3, 4)]
    few = text.disjoint(100, (2, 50), 4, 0)
    assert len(few) == 6 and set(few) < set(text.disjoint(100, (2, 50), 50, 0)) != {*few}


def test_moda_by_hand() -> None:
    values = {
        "conv": [torch.tensor([[[[1.0, -3.0]], [[0.0, 0.0]]]])],
        "fc": [torch.tensor([[-2.0, 4.0]])],
    }
    found = moda.sizes(values, {"conv": 1, "fc": -1})
    assert found["conv"].tolist() == [[2.0, 0.0]] and found["fc"].tolist() == [[2.0, 4.0]]
    task = load("digits").limit(train=200)
    torch.manual_seed(0)
    model = models.create("convnet", channels=1, width=0.25)
    neurons = experiment.neurons_of(model, task)
    objective = moda.Moda(neurons)
    loss, correct, parts = objective(model, task.example, torch.tensor([0, 1]))
    assert loss.requires_grad and correct.shape == (2,) and set(parts) == {"affinity", "dispersion", "compactness"}
    slices = moda.class_slices(neurons, task)
    assert list(slices) == list(task.classes) and all(not slice_.empty_layers() for slice_ in slices.values())
    assert not any(isinstance(m, torch.nn.GELU) for m in moda.with_relu(models.create("fast")).modules())


def test_slicing(monkeypatch: pytest.MonkeyPatch) -> None:
    (run,), page = smoke(slicing.BENCHMARK, monkeypatch, compressions=(0.3, 0.5))
    rows = {(row["slicer"], row["metric"], row["allocation"], row["repair"], row["at"]): row for row in run["rows"]}
    assert len(rows) == len(run["rows"]) and {key[0] for key in rows} == {*slicing.SLICERS}
    as_cut = [row for row in run["rows"] if row["repair"] == slicing.AS_CUT]
    assert len(as_cut) == 2 * (5 * 4 + 2 + 4) and {row["allocation"] for row in as_cut} == {*slicing.ALLOCATIONS, "-"}
    assert all(row["at"] - 1e-4 <= row["compression"] < 1 for row in as_cut)
    best = slicing.best_arms(run["rows"])
    for slicer in slicing.SLICERS:
        assert {(*best[slicer], repair, 0.3) for repair in (slicing.STATISTICS, slicing.TUNED)} <= rows.keys()
        assert page.count(f"| {slicer} |") == 2
    assert run["whole"]["validation"] > 0.3  # it has learned something that can be lost
    assert (
        page.startswith("# Slicing precision\n\nSemantic slices lose, of test accuracy, ")
        and "(slicing-smoke.png)" in page
    )


def test_semantic(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(semantic, "minilm", raise_missing)
    networks = (*semantic.SETTINGS["smoke"].networks, semantic.TREC)
    runs, page = smoke(semantic.BENCHMARK, monkeypatch, metrics=("avg", "taylor", "deeplift"), networks=networks)
    assert "on trec-fine is left out: the encoder is missing" in capsys.readouterr().err
    assert (
        "not measured: all-MiniLM-L6-v2 on trec-fine" in page
        and "# Do semantic groups mean something?\n\nOn dig" in page
    )
    for run, (layers, metrics) in zip(runs, ((6, 3), (4, 2)), strict=True):  # of the encoder heads and hidden units
        whole = {row["way"]: row for row in run["ways"] if row["layer"] == semantic.ALL}
        assert list(whole) == [*("avg", "taylor", "deeplift")[:metrics], *semantic.RIVALS]
        assert len(run["ways"]) == metrics * layers + len(whole)
        assert all(-1 <= row[key] <= 1 for row in run["ways"] for key in ("classes", "neurons"))
        assert abs(whole[semantic.CHANCE]["classes"]) < 0.2
        for row in run["groups"]:
            assert 0 < row["one"] + row["few"] + row["all"] <= 1.001 and row["chance"] in (0.4444, 0.3333)
        assert all(f"| {way} |" in page for way in whole) and "(semantic-smoke.png)" in page


def raise_missing() -> None:
    raise TorchsliceError("the encoder is missing")


def test_superclasses_are_known_or_stand_before_the_colon() -> None:
    task = replace(load("digits").restrict(["0", "1", "2"]), classes=("NUM:date", "HUM:ind", "NUM:money"))
    part = semantic.Meaning(semantic.SETTINGS["cpu"], semantic.TREC, task, 0, Path(), "cpu", False)
    assert part.superclasses == [1, 0, 1]


def test_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    (run,), page = smoke(readings.BENCHMARK, monkeypatch)
    arms = {row["arm"] for row in run["rows"]}
    names = {", ".join(way) for way in itertools.product(("avg", "var"), readings.PLACES, readings.READINGS)}
    assert arms == {*names, *(f"{name}, x weights" for name in names), readings.TAYLOR, readings.RANDOM}
    assert len(run["rows"]) == 2 * len(arms) and all(0 <= row["test"] <= 1.5 for row in run["rows"])
    assert page.count("| avg, after, mean |") == 1 and "avg as defined keeps" in page and "(readings-smoke.png)" in page


def test_readings_are_the_metrics_where_they_are_defined_so() -> None:
    settings, task = replace(readings.SETTINGS["smoke"], samples_per_class=1000), load("digits").limit(train=60)
    part = readings.Read(settings, settings.networks[0], task, 0, Path(), "cpu", False)
    neurons = experiment.neurons_of(part.new(task).eval(), task)
    found = dict(part.scores(neurons))
    options = {"samples_per_class": 1000, "correct_only": False, "progress": False}
    ours = contributions(neurons, task, metric=["avg", "var"], **options)
    for metric in ("avg", "var"):
        for layer, of in ours[metric].items():
            torch.testing.assert_close(found[f"{metric}, after, mean"][layer], of.mean(0), rtol=1e-4, atol=1e-6)
    assert all((found["avg, before, size"][layer] > found["avg, after, size"][layer]).any() for layer in neurons.layers)
    norms = readings.weights_that_read(neurons)
    assert norms["features.0.0"][1] == neurons.model.features[1][0].weight[:, 1].double().norm()
    weighted, plain = found["var, before, size, x weights"], found["var, before, size"]
    torch.testing.assert_close(weighted["features.0.0"], plain["features.0.0"] * norms["features.0.0"] ** 2)


def test_families_that_are_the_superclasses_agree_with_them() -> None:
    network = replace(semantic.SETTINGS["smoke"].networks[0], data="cifar10")
    part = semantic.Meaning(semantic.SETTINGS["smoke"], network, load("digits"), 0, Path(), "cpu", False)
    part = replace(
        part,
        task=replace(
            part.task,
            classes=tuple(["bird", "airplane", "cat", "ship", "deer", "truck", "dog", "frog", "horse", "automobile"]),
        ),
    )
    kind = torch.tensor(part.superclasses)
    assert kind.tolist() == [0, 1, 0, 1, 0, 1, 0, 0, 0, 1]
    rows = torch.nn.functional.one_hot(kind).double() + 0.1
    distance = (kind[:, None] != kind).double()
    found = part.agreement(distance, {"x": rows.T})
    assert found == {"classes": 1.0, "neurons": 1.0, "auc": 1.0}
    assert semantic.apart(rows)[0, 2] < 1e-9 < 1 < semantic.apart(rows)[0, 1]


def test_restructure(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = restructure.SETTINGS["smoke"]
    (run,), page = smoke(restructure.BENCHMARK, monkeypatch)
    found = {(row["task"], row["method"], row["arm"]): row for row in run["rows"]}
    theta = ("whole", "theta", f"{restructure.LIKE}theta")
    arms = {restructure.ALL: theta, restructure.HALF: tuple(restructure.ARMS)}
    methods = ("lamp", "structured")
    assert set(found) == {(task, method, arm) for task, of in arms.items() for method in methods for arm in of}
    for (_, method, arm), row in found.items():
        assert 0 <= row["compression"] <= 1 - settings.param_retention + 0.01 and 0 <= row["test_accuracy"] <= 1
        steps = list(zip(row["param_retention"], row["validation_accuracy"], strict=True))
        least = steps[0][1] - settings.max_accuracy_loss - 2e-4
        assert row["compression"] == 0 or any(
            abs(1 - left - row["compression"]) < 2e-4 and accuracy >= least for left, accuracy in steps
        )
        assert ("cut" in row["step"]) == (arm != "whole")
        assert (row["trainings"] is None) == (method == "structured")
        assert f"| {method}, {arm} |" in page
    for arm in ("theta", "groups"):
        sizes = [found[restructure.HALF, "lamp", of]["param_retention"][1] for of in (arm, f"{restructure.LIKE}{arm}")]
        assert sizes[0] == pytest.approx(sizes[1], abs=0.01) and sizes[0] < 1
    (every, half) = run["slices"]
    assert every["groups"] is None and 0 < half["groups"] < 1 > half["theta"] > 0
    assert page.startswith("# Restructuring\n\nBy LAMP to 80% compression") and "half of the classes, groups: " in page


def test_readapt(monkeypatch: pytest.MonkeyPatch) -> None:
    (run,), page = smoke(readapt.BENCHMARK, monkeypatch)
    found = {(row["scenario"], row["arm"]): row for row in run["rows"]}
    scenarios = ("fgsm", "contrast of some", "damage 30%")
    assert set(found) == {(scenario, arm) for scenario in scenarios for arm in readapt.ARMS}
    trained = {arm: found["contrast of some", arm]["param_fraction"] for arm in readapt.ARMS}
    assert trained["not adapted"] is None and trained["full fine-tuning"] == 1
    for arm in ("low-rank adapters", *readapt.OURS, *(arm for arm in readapt.ARMS if "control" in arm)):
        assert 0 < trained[arm] <= (0.25 if arm == "groups, only" else 0.2), arm  # its rows of the logits come on top
    shared = {arm: found["fgsm", arm]["shared"] for arm in readapt.ARMS}
    assert shared["critical"] == 1 > shared["control: as wide as critical"] and shared["full fine-tuning"] is None
    assert trained["control: as wide as critical"] == trained["critical"] > 0.15
    for row in found.values():
        assert 0 <= row["new_accuracy"] <= 1 and 0 <= row["clean_accuracy"] <= 1
        if row["arm"] != "not adapted":
            means = [sum(pair) / 2 for pair in zip(row["validation_new"], row["validation_clean"], strict=True)]
            assert means[row["best_epoch"]] == pytest.approx(max(means), abs=1e-4)
            assert row["seconds"] == sorted(row["seconds"]) and row["steps"] == sorted(row["steps"])
        if row["scenario"].startswith("damage"):
            assert row["new_accuracy"] == row["clean_accuracy"]
    clean = {row["clean_accuracy"] for row in found.values() if row["arm"] == "not adapted"}
    assert len(clean) == 2  # of the network, and of the damaged one
    assert all(page.count(f"| {arm} |") == 2 for arm in readapt.ARMS)
    assert "| new / clean | fgsm | contrast of some | damage 30% |" in page
    assert page.startswith("# Re-adaptation\n\nNew / clean test accuracy, training ")


def test_the_classes_that_fail_are_those_that_were_changed() -> None:
    task = load("digits").limit(train=400)
    model = models.create("lenet", channels=1)
    ts.fit(model, task, Training(epochs=6, learning_rate=0.05, device="cpu", progress=False))
    neurons, images = experiment.neurons_of(model.eval(), task), task.train
    inverted = replace(images, images=255 - images.images)
    new = readapt.only_of([3, 8], images, inverted)
    kept = ~torch.isin(images.labels, torch.tensor([3, 8]))
    assert torch.equal(new.images[kept], images.images[kept]) and torch.equal(new.images[~kept], inverted.images[~kept])
    scenario = readapt.Scenario("x", neurons, images, new, new)
    assert readapt.classes_that_fail(neurons, scenario, task) == [3, 8]
    assert readapt.classes_that_fail(neurons, replace(scenario, new=images), task) == list(range(10))


def test_the_target_is_nine_tenths_of_the_gain_of_full_fine_tuning() -> None:
    def arm(*values: float) -> dict[str, Any]:
        return {"validation_new": list(values), "best_epoch": 2}

    arms: dict[str, Any] = {"not adapted": {"validation_new": None}, "full fine-tuning": arm(0.2, 0.6, 0.8)}
    arms |= {"slow": arm(0.2, 0.5, 0.73), "late": arm(0.2, 0.3), "exact": arm(0.2, 0.3, 0.2 + 0.9 * 0.6, 0.9)}
    expected = {"not adapted": None, "full fine-tuning": 2, "slow": None, "late": None, "exact": 2}
    assert readapt.to_target(arms) == expected
    assert readapt.to_target({"full fine-tuning": arm(0.9, 0.9, 0.905), "other": arm(0.9, 0.9, 0.99)}) == {}


def test_extend(monkeypatch: pytest.MonkeyPatch) -> None:
    (run,), page = smoke(extend.BENCHMARK, monkeypatch)
    arms = {row["arm"]: row for row in run["arms"]}
    assert list(arms) == list(extend.ARMS)
    for name, arm in arms.items():
        figures = ("new",) if name == "scratch" else ("known", "new", "all", "all_known", "all_new")
        assert all(0 <= arm[figure] <= 1 for figure in figures)
        assert arm["kept"] == (None if name == "scratch" else pytest.approx(arm["known"] / run["whole"], abs=1e-3))
    ours = {name for name in arms if name.startswith(("ours", "control"))}
    assert {name: arm["identical"] for name, arm in arms.items() if arm["identical"] is not None} == dict.fromkeys(
        ours, 1
    )
    variants = [(row["choice"], row["restart"]) for row in run["variants"]]
    assert variants[:3] == [(choice, True) for choice in extend.CHOICES] and variants[3:] == [(variants[3][0], False)]
    best = max(run["variants"], key=lambda variant: variant["validation"])
    assert run["chosen"] == {key: best[key] for key in extend.VARIANT} and arms["ours"]["new"] == best["new"]
    first, second = run["chain"]
    assert first["task 2"] is None and second["task 1"] == first["task 1"] and second["task 2"] is not None
    assert second["neuron_retention"] >= first["neuron_retention"]
    assert all(arm in page for arm in extend.ARMS) and "in 5 of 5 cases" in page and "## convnet on digits" in page
    assert page.startswith(
        "# Extending a network by new classes\n\nAccuracy on known / new classes, task given: on digits ours"
    )


def test_critical_first_are_the_neurons_whose_group_has_most_classes() -> None:
    scores = torch.tensor([[4.0, 1.0, 0.0, 9.0, 0.0], [4.0, 1.0, 9.0, 0.0, 0.0], [4.0, 1.0, 0.0, 0.0, 9.0]])
    task = load("digits").restrict(["0", "1", "2"])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    found = Contributions(task.classes, {"taylor": {"1": scores}}, torch.arange(3), torch.ones(3, dtype=torch.int64))
    worth = extend.served(experiment.neurons_of(model, task), found)["1"]
    # of three classes or of one, and half of the contribution as a fraction of the largest mean, 4
    assert worth.tolist() == pytest.approx([3.5, 3.125, 1.375, 1.375, 1.375])


def test_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    (run, pair), page = smoke(replacing.BENCHMARK, monkeypatch)
    found = {(row["weak"], row["arm"]): row for row in run["replaced"]}
    assert set(found) == {(kind, arm) for kind in replacing.WEAK for arm in replacing.ARMS}
    for kind in replacing.WEAK:
        weak, part, ours = (found[kind, arm] for arm in ("weak network", "strong network", "replaced"))
        assert ours["own"] > weak["own"] and weak["macs"] < ours["macs"] < weak["macs"] + 0.6 * part["macs"]
        assert found[kind, "control: ensemble"]["macs"] == weak["macs"] + part["macs"]
    arms = {row["arm"]: row for row in pair["composed"]}
    assert list(arms) == [*replacing.COMPOSED]
    assert arms["composed"]["accuracy"] <= arms["data set known"]["accuracy"] + 0.05
    for arm, row in arms.items():
        known = [row[f"{figure}, {score}"] for figure in ("auroc", "fpr") for score in replacing.SCORES]
        missing = len(known) if arm == "data set known" else 0 if arm == "composed" else 2
        assert known.count(None) == missing and all(0 <= value <= 1 for value in known if value is not None)
    assert page.count("| replaced, 50% of the strong network |") == 3 and "| composed |" in page


def test_remove(monkeypatch: pytest.MonkeyPatch) -> None:
    (run,), page = smoke(remove.BENCHMARK, monkeypatch)
    arms = {row["arm"]: row for row in run["rows"]}
    assert list(arms) == [*remove.ARMS] and all(f"| {arm} |" in page for arm in arms)
    assert arms["control"]["distance"] == 0 < arms["control: another seed"]["distance"]
    assert arms["row removed"]["neurons"] == 1 > arms["row and neurons"]["neurons"]
    assert arms["row removed"]["kept_accuracy"] > 0.5 and 0.5 < arms["row removed"]["probe"] <= 1
    assert all((row["steps"] is None) == (row["never"] == 1) for row in arms.values())


def test_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = speed.peak_memory, []

    def peak_memory(metrics: tuple[str, ...], *rest: Any) -> tuple[float, float]:
        asked.append(metrics)
        return real(metrics, *rest) if metrics == speed.FOUR else (100.0, 200.0)  # a process takes seconds

    monkeypatch.setattr(speed, "peak_memory", peak_memory)
    runs, page = smoke(speed.BENCHMARK, monkeypatch)
    rows = [row for run in runs for row in run["rows"]]
    for what in (
        *("find_neurons + extract", "MwT step", "sub-task step", "step of 20 % of the neurons", "class slices"),
        *(
            "exact cohesion",
            "speed-up",
            "avg, var, ens, taylor",
            "deeplift",
            "peak memory of avg",
            "peak memory of deeplift",
        ),
    ):
        assert any(row["what"].startswith(what) for row in rows), what
    assert all(row["ratio"] > 0 and row["what"] in page for row in rows)
    assert [row["against"][:6] for row in rows].count("captum") == 2
    assert asked == [(), speed.FOUR, ("deeplift",)] and "| what | against |" in page


def test_conformance(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, page = smoke(conformance.BENCHMARK, monkeypatch)
    assert [run["data"] for run in runs] == ["torchvision", "timm", "transformers"]
    for run in runs:
        assert run["outcome"] == "exact" and run["difference"] <= conformance.EXACT < 1e-3 < run["effect"], run
        assert 0 < run["half"] < 1 and 0 < run["sliceable"] <= 1 and run["find_seconds"] > 0 < run["extract_seconds"]
        assert run["model"] in page
    assert {run["tp_outcome"] for run in runs} <= {"exact", "differs", "fails"} and runs[0]["tp_ratio"] > 0


def test_networks_of_a_scale_are_loaded_as_they_say() -> None:
    network = experiment.Network("digits", "lenet", 1.0, 1, train_images=200, validation_images=50)
    task = network.load(None, seed=3)
    assert (len(task.train), len(task.validation), len(task.test)) == (200, 50, 359)


def test_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, page = smoke(scale.BENCHMARK, monkeypatch)
    for run in runs:
        steps = [row["step"] for row in run["rows"]]
        assert {*scale.STEPS} < {*steps} and ("save" in steps) == run["trained"]
        assert all(row["peak_mib"] > 50 and row["seconds"] >= 0 for row in run["rows"])
    assert [run["classes"] for run in scale.along("classes", runs[:-1])] == [4, 8]
    assert "time, 2.0 times the classes" in page and Path("scale-smoke.png").is_file()
