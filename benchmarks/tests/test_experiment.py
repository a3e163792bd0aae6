"""Finished parts, compact results, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import reuse
from benchmarks.__main__ import ATTACKS, NAMES, main
from benchmarks.experiment import compact, expand, finished_or_run, read_result, write_result
from torchslice import TorchsliceError


def test_results_are_columns_of_four_digits_and_come_back() -> None:
    rows = [{"arm": "a", "value": 0.123456, "of": [1.23456, 2]}, {"arm": "b", "count": 123456}]
    written = compact({"rows": rows, "one": [{"a": 1}], "none": [], "pair": (1, 2.0)})
    assert written["rows"] == {
        "columns": ["arm", "value", "of", "count"],
        "rows": [["a", 0.1235, [1.235, 2], None], ["b", None, None, 123456]],
    }
    assert expand(written) == {
        "rows": [
            {"arm": "a", "value": 0.1235, "of": [1.235, 2], "count": None},
            {"arm": "b", "value": None, "of": None, "count": 123456},
        ],
        "one": [{"a": 1}],
        "none": [],
        "pair": [1, 2.0],
    }
    assert compact(expand(written)) == written


def test_a_file_has_one_run_a_line(tmp_path: Path) -> None:
    result = {"manifest": {"command": "x"}, "runs": [{"seed": 0, "a": [1, 2]}, {"seed": 1, "a": [3]}]}
    write_result(tmp_path / "x.json", result)
    assert (tmp_path / "x.json").read_text().count("\n") == 4
    assert json.loads((tmp_path / "x.json").read_text()) == read_result(tmp_path / "x.json") == result


def test_a_finished_part_is_read_and_one_of_other_settings_refused(tmp_path: Path) -> None:
    path, calls = tmp_path / "part.json", []

    def run() -> dict[str, float]:
        calls.append(1)
        return {"value": 1 / 3}

    first = finished_or_run(path, {"epochs": 2, "sizes": (2, 5)}, run)
    assert first == finished_or_run(path, {"epochs": 2, "sizes": (2, 5)}, run) == {"value": 0.3333} and len(calls) == 1
    with pytest.raises(TorchsliceError, match="made with other settings; remove it or choose another --out"):
        finished_or_run(path, {"epochs": 3, "sizes": (2, 5)}, run)
    path.write_text("{}")
    with pytest.raises(TorchsliceError, match="is no result of a benchmark; remove it"):
        finished_or_run(path, {"epochs": 2}, run)


def test_the_command_lists_and_says_in_one_line_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*NAMES, *ATTACKS]
    (tmp_path / "file").write_text("")
    for arguments, text in (
        (["restructur"], "unknown benchmark 'restructur'. Did you mean 'restructure'? Known: recipe, reuse"),
        (["recipe", "--scale", "papr"], "argument --scale: invalid choice: 'papr'"),
        (
            ["recipe", "--scale", "smoke", "--page-only"],
            "there is no result results/recipe-smoke.json; run",
        ),
        (["recipe", "--scale", "smoke", "--out", "file/x"], "cannot write into file/x: Not a directory"),
        (["speed", "--scale", "smoke", "--device", "cuda"], "device 'cuda' cannot be used here"),
        (["fuzz", "--count", "0"], "--count must be at least 1"),
        (["recipe", "--seed", "x"], "argument --seed: invalid int value: 'x'. See: python -m benchmarks --help"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"benchmarks: {text}") and error.count("\n") == 1


def test_the_paper_scale_runs_its_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paper = reuse.SETTINGS["paper"]
    names = ["resnet18", "vgg16"]
    assert [network.model for network in paper.networks] == names and {n.epochs for n in paper.networks} == {20}
    measured = []

    def result(part: reuse.Reusing) -> dict[str, int]:
        measured.append((part.network.model, part.seed, part.training.epochs))
        return {"value": 1}

    monkeypatch.setattr(reuse.Reusing, "result", result)
    networks = tuple(replace(network, data="digits", epochs=1) for network in paper.networks)
    monkeypatch.setitem(reuse.SETTINGS, "paper", replace(paper, networks=networks, seeds=2))
    benchmark = replace(reuse.BENCHMARK, page=lambda result, path: "page")
    runs = benchmark("paper", out=tmp_path, seed=3, progress=False)["runs"]
    assert [(run["model"], run["seed"]) for run in runs] == [(name, seed) for name in names for seed in (3, 4)]
    assert measured == [(name, seed, 1) for name in names for seed in (3, 4)]
    benchmark("paper", out=tmp_path, seed=3, progress=False)
    assert len(measured) == 4  # what is finished is not run again
