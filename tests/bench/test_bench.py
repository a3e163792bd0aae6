"""The benches at their smallest scale: they run, resume, and write what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from torchslice.bench import BENCHES, slicing
from torchslice.bench.experiment import Network, spread, table
from torchslice.bench.mwt import ARMS, SETTINGS
from torchslice.errors import TorchsliceError


def test_mwt_runs_writes_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = BENCHES["mwt"]
    result = run("smoke", out=tmp_path, progress=False)
    assert json.loads((tmp_path / "mwt-smoke.json").read_text()) == json.loads(json.dumps(result))
    page = (tmp_path / "mwt-smoke.md").read_text()
    (only,) = result["runs"]
    for task in only["tasks"]:
        assert task["accuracy"].keys() == ARMS.keys()
        assert all(0 <= value <= 1 for value in task["accuracy"].values())
        assert 0 < task["neuron_retention"] <= 1
    assert len(only["tasks"]) == 6  # five pairs and all ten
    assert all(arm in page for arm in ARMS) and f"{100 * only['standard_accuracy']:.2f}" in page

    monkeypatch.setattr("torchslice.bench.mwt.fit", None)  # what is finished is not run again
    assert run("smoke", out=tmp_path, progress=False)["runs"] == result["runs"]
    part = tmp_path / "mwt-smoke-digits-convnet-seed0.json"
    part.write_text(part.read_text().replace('"epochs": 2', '"epochs": 3'))
    with pytest.raises(TorchsliceError, match="made with other settings; remove it or choose another --out"):
        run("smoke", out=tmp_path, progress=False)
    part.write_text("{}")
    with pytest.raises(TorchsliceError, match="is no finished part of this bench"):
        run("smoke", out=tmp_path, progress=False)


def test_the_paper_scale_runs_its_four_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paper = SETTINGS["paper"]
    names = ["simcnn", "rescnn", "vgg16", "resnet18"]
    assert [network.model for network in paper.networks] == names and {n.epochs for n in paper.networks} == {200}
    small = tuple(Network("digits", name, 0.125, epochs=1, train_images=300) for name in names)
    short = {"finetune_epochs": 1, "seeds": 1, "task_sizes": (5,)}
    monkeypatch.setitem(SETTINGS, "paper", replace(paper, networks=small, **short))
    result = BENCHES["mwt"]("paper", out=tmp_path, progress=False)
    assert [run["model"] for run in result["runs"]] == names
    page = (tmp_path / "mwt-paper.md").read_text()
    assert all(f"## {name} on digits" in page for name in names)


def test_slicing_measures_every_slicer_and_metric_beside_random_slices(tmp_path: Path) -> None:
    result = BENCHES["slicing"]("smoke", out=tmp_path, progress=False)
    assert [(run["data"], run["model"]) for run in result["runs"]] == [("digits", "lenet"), ("digits", "convnet")]
    for run in result["runs"]:
        curves = {(point["slicer"], point["metric"]) for point in run["points"]}
        slicers = ("global", "category", "semantic, mass", "semantic, CKA of means", "semantic, CKA of maps")
        expected = {(slicer, metric) for slicer in slicers for metric in ("avg", "var", "ens", "taylor", "deeplift")}
        assert expected < curves and ("control: random", "-") in curves
        keys = ("compression", "neuron_retention", "validation", "test")
        assert all(0 <= point[key] <= 1 for point in (*run["points"], run["whole"]) for key in keys)
        assert run["whole"]["compression"] == 0 and max(point["compression"] for point in run["points"]) > 0.5
        assert run["whole"]["validation"] > 0.3  # it has learned something that can be lost
    assert {(row["slicer"], row["metric"]) for row in result["summary"]} == curves
    page, picture = (tmp_path / "slicing-smoke.md").read_text(), (tmp_path / "slicing-smoke.png").read_bytes()
    assert "## lenet on digits" in page and "(slicing-smoke.png)" in page
    assert picture.startswith(b"\x89PNG") and len(picture) < 300_000


@pytest.mark.parametrize("scale", ["cpu", "paper"])
def test_slicing_asks_the_published_question(scale: str) -> None:
    settings = slicing.SETTINGS[scale]
    assert settings.shares == pytest.approx([n / 10 for n in range(1, 11)]) and settings.seeds == 3
    assert {n / 100 for n in range(90, 100)} <= set(settings.thetas)
    assert len(settings.networks) == {"cpu": 4, "paper": 6}[scale]


def test_speed_measures_every_ratio(tmp_path: Path) -> None:
    result = BENCHES["speed"]("smoke", out=tmp_path, progress=False)
    whats = [row["what"] for row in result["rows"]]
    for what in (
        "find_neurons + extract",
        "MwT step",
        "sub-task step",
        "step of 20 % of the neurons",
        "class slices",
        "exact cohesion",
        "speed-up",
        "peak memory of avg",
        "peak memory of deeplift",
    ):
        assert any(text.startswith(what) for text in whats)
    assert all(row["ratio"] > 0 for row in result["rows"])
    assert [row["against"][:6] for row in result["rows"]].count("captum") == 2
    assert "| what | against |" in (tmp_path / "speed-smoke.md").read_text()


def test_unknown_scale_and_bench() -> None:
    with pytest.raises(TorchsliceError, match="unknown scale 'papr'. Did you mean 'paper'"):
        BENCHES["mwt"]("papr")
    with pytest.raises(TorchsliceError, match="Known: extend, mwt, readapt, restructure, reuse, slicing, speed"):
        BENCHES["restructur"]


def test_means_and_their_spread() -> None:
    assert spread([0.5]) == "50.0"
    assert spread([0.5, 0.7, None]) == "60.0 ± 14.1"
    assert spread([None]) == "-" and spread([-1e-9]) == "0.0"
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
