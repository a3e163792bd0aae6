"""Small parts of the attacks: hostile files, kills and threads; and each attack notices what it is there to notice."""

from __future__ import annotations

import random

import pytest
import torch

import torchslice as ts
from benchmarks import fuzz, kills, long, ranks, threads
from torchslice import cli


def counts(text: str) -> list[int]:
    """Return the numbers in the last row of a table."""
    return [int(word) for word in text.splitlines()[-1].split() if word.isdigit()]


def test_two_thousand_hostile_files() -> None:
    text, wrong = fuzz.run(count=2000)
    refused, loaded, bad = counts(text)
    assert not wrong, "\n".join(wrong)
    assert refused + loaded == 2000 and loaded > 200 and not bad, text


def test_a_reader_that_believes_everything_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    path = tmp_path / "m.safetensors"
    ts.save(torch.nn.Linear(20, 20), path)
    target, content, rng = fuzz.of_artefact(path), path.read_bytes(), random.Random(0)
    honest, seen = target.use(), set()
    monkeypatch.setattr("torchslice.artefact.file._digest", lambda record, tensors: record.get("sha256"))
    for _ in range(300):
        path.write_bytes(fuzz.damaged(content, rng))
        seen.add(fuzz.verdict(target, "damaged", honest).partition(":")[0])
    assert "changed in silence" in seen and "refused" in seen
    monkeypatch.setattr("torchslice.artefact.load", lambda path: 1 / 0)
    monkeypatch.setattr(ts, "load", lambda path: 1 / 0)
    assert fuzz.verdict(target, "damaged", honest) == "ZeroDivisionError: division by zero"


def test_a_dozen_kills() -> None:
    text, wrong = kills.run(count=12, names=["train, standard", "extract"])
    assert not wrong, "\n".join(wrong)
    operations, done = counts(text)
    assert done == 12 and operations > 40, text


def test_a_kill_that_does_harm_is_found_out(tmp_path) -> None:
    start, here = tmp_path / "start", tmp_path / "here"
    start.mkdir()
    line = kills.COMMANDS["train, standard"][1]
    for kill_at, problem in ((10**6, "was not killed, but ended with 0"), (20, "other files than without the kill")):
        assert kills.killed(line, start, here, kill_at, {}).startswith(problem)


def test_eight_threads_get_what_one_gets() -> None:
    text, wrong = threads.run(count=120)
    assert not wrong, "\n".join(wrong)
    assert sum(counts(text)) == 120, text


def test_a_verb_that_differs_in_threads_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "VERBS", {"infer": lambda neurons, part, folder, number: number})
    assert "another result than alone" in threads.run(count=5)[1][0]


def test_two_processes_of_torchrun_find_what_one_does_and_a_death_ends_both(tmp_path, capsys) -> None:
    alone, done = ranks.everything(tmp_path / "1"), ranks.launch(2, tmp_path / "2", "all")
    parts = [torch.load(path) for path in sorted((tmp_path / "2").glob("*.pt"))]
    assert len(parts) == 2, done.stderr
    assert ranks.compared(parts, alone)[1] == [] and ranks.died(done) == []
    assert cli.main([*ranks.TRAIN.split(), "--out", str(tmp_path / "2/run")]) == 2
    assert "processes was 2, now 1" in capsys.readouterr().err
    done.returncode, parts[1]["chosen"]["rankings"], parts[0]["read"]["report"] = 0, "others", [*range(160)]
    parts[1]["numbers"]["gates"][0]["loss"] += 1e-5
    wrong = [*ranks.compared(parts, alone)[1], *ranks.died(done)]
    names = [
        "gates: a difference of",
        "rankings are others in process 1",
        "report: of 160 samples",
        "a killed process",
    ]
    assert all(line.startswith(name) for line, name in zip(wrong, names, strict=True)), wrong


def test_thirty_sub_models_leave_nothing_behind() -> None:
    text, wrong = long.run(count=30)
    assert not wrong, "\n".join([text, *wrong])


def test_what_is_left_behind_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    load = ts.load
    monkeypatch.setattr(ts, "load", lambda path: kept.append(load(path)))
    assert [line.partition(":")[0] for line in long.run(count=10)[1]] == ["tensors", "modules"]
