"""Kill -9: writing commands die at every file operation; what they leave is whole, and the same command goes on.

Every command runs once without harm, and its file operations are counted. Then it is started again and again, from the
same state, and killed before one of them: the first, the second, and so on. After every kill all files are whole or
absent and nobody is locked out; the same command then gives, bit for bit, the files that it gives without a kill, and
nothing else.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from torchslice import load
from torchslice.cli import main
from torchslice.files import LEFTOVER_SECONDS, digest_of
from torchslice.tables import table
from torchslice.training.checkpoint import read_checkpoint

#: Events of Python that change or make files; fsync is none, and is counted as well.
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.utime"}
SECONDS = 300  # that any command may take
#: What the server imports once, from which every process is forked.
PRELOADED = ["benchmarks.kills", "sklearn.datasets", "torchslice.maintain"]
PRELOADED += [f"torchslice.cli.{name}" for name in ("options", "train", "slice", "extract", "readapt", "restructure")]

TRAIN = ("train convnet digits --model-argument width=0.125 --train-limit 60 --batch-size 30 --precision fp32 "
         "--device cpu --out {here}/run")  # fmt: skip
QUICK = "--batch-size 30 --precision fp32 --device cpu"
#: name -> the commands before, and the one that is killed
COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "train, standard": ((), f"{TRAIN} --method standard --epochs 2"),
    "train, gates": ((), f"{TRAIN} --method gates --epochs 1"),
    "train, subtasks": ((), f"{TRAIN} --epochs 2"),
    "train, more epochs": ((f"{TRAIN} --method standard --epochs 1",), f"{TRAIN} --method standard --epochs 2"),
    "slice": ((f"{TRAIN} --method standard --epochs 1",), "slice {here}/run --samples-per-class 2 --device cpu"),
    "slice, into a file": (
        (f"{TRAIN} --method standard --epochs 1",),
        "slice {here}/run --samples-per-class 2 --device cpu --out {here}/slices.json --force",
    ),
    "extract": (
        (f"{TRAIN} --epochs 2",),
        "extract {here}/run --classes 3,8 --finetune 0 --device cpu --out {here}/a/b.safetensors --force",
    ),
    "readapt": (
        (f"{TRAIN} --epochs 2",),
        f"readapt {{here}}/run --new digits --epochs 1 {QUICK} --out {{here}}/b.safetensors --force",
    ),
    "restructure": (
        (f"{TRAIN} --epochs 2",),
        "restructure {here}/run --param-retention 0.9 --max-accuracy-loss 1 --epochs 1 "
        f"{QUICK} --no-slice --out {{here}}/c.safetensors --force",
    ),
}


def work(line: str, here: str, report: str, kill_at: int) -> None:
    """Be the process that runs a command in a folder: count its file operations there, and die before one of them."""
    torch.set_num_threads(1)
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    count, where = 0, os.path.realpath(here)

    def step() -> None:
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and isinstance(arguments[0], str | bytes | os.PathLike):
            reads = event == "open" and arguments[2] is not None and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if os.path.realpath(os.fsdecode(arguments[0])).startswith(where) and not reads:
                step()

    def synced(handle: int, sync: Callable[[int], None] = os.fsync) -> None:
        step()
        sync(handle)

    sys.addaudithook(hook)
    os.fsync = synced  # type: ignore[assignment]
    code = main(line.format(here=here).split())
    Path(report).write_text(json.dumps([code, count]))


def run_once(line: str, here: Path, kill_at: int = 0) -> tuple[int, int]:
    """Run a command in a process of its own; return its exit code, -9 where it was killed, and its file operations."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    report = here.with_name("report")
    report.unlink(missing_ok=True)
    child = context.Process(target=work, args=(line, str(here), str(report), kill_at))
    child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
        return 1, 0
    if child.exitcode:
        return child.exitcode, 0
    code, count = json.loads(report.read_text())
    return code, count


def fingerprints(here: Path) -> dict[str, str]:
    """Return what stands in every file of a folder, but for how long things took."""
    return {str(path.relative_to(here)): fingerprint(path) for path in sorted(here.rglob("*")) if path.is_file()}


def fingerprint(path: Path) -> str:
    """Hash a file; raise if it is not whole."""
    if path.name == "checkpoint.safetensors":
        state, tensors = read_checkpoint(path)
        return digest_of(tensors, json.dumps(timeless(state)))
    if path.suffix == ".safetensors":
        load(path)
        with safe_open(path, "pt") as file:
            record = json.loads(file.metadata()["torchslice"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return digest_of(tensors, json.dumps(timeless({**record, "sha256": None})))
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    if path.suffix in (".json", ".jsonl"):
        lines = [json.dumps(timeless(json.loads(line))) for line in lines]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def timeless(tree: Any) -> Any:
    """Return plain data without times."""
    if isinstance(tree, dict):
        return {key: timeless(value) for key, value in tree.items() if key != "seconds"}
    return [timeless(item) for item in tree] if isinstance(tree, list) else tree


def leftover(path: Path) -> bool:
    """Whether a file may stay after a kill, until the next command."""
    return path.name == ".lock" or (path.name.startswith(".") and path.suffix == ".tmp")


def killed(line: str, start: Path, here: Path, kill_at: int, expected: dict[str, str]) -> str:
    """Kill a command once and let it go on; return what is wrong, nothing if all is well."""
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(start, here)
    code, _ = run_once(line, here, kill_at)
    if code != -signal.SIGKILL:
        return f"was not killed, but ended with {code}"
    try:
        for path in here.rglob("*"):
            if path.is_file() and not leftover(path):
                fingerprint(path)
            elif path.is_file():  # temporary files beside what others may be writing stay for a while
                os.utime(path, (time.time() - 2 * LEFTOVER_SECONDS,) * 2)
    except Exception as error:
        return f"a file is not whole: {error}"
    code, _ = run_once(line, here)
    if code:
        return f"the same command then ended with {code}"
    found = fingerprints(here)
    odd = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
    return f"other files than without the kill: {', '.join(odd)}" if odd else ""


def run(*, count: int = 1000, seed: int = 0, names: Sequence[str] = tuple(COMMANDS)) -> tuple[str, list[str]]:
    """Kill commands so many times, in turns; return a table of what happened, and what went wrong."""
    wrong: list[str] = []
    done: Counter[str] = Counter()
    states: dict[str, tuple[Path, dict[str, str], int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            before, line = COMMANDS[name]
            start, here = Path(folder, str(number), "start"), Path(folder, str(number), "here")
            here.mkdir(parents=True)
            for other in before:
                assert run_once(other, here)[0] == 0, other
            shutil.copytree(here, start)
            code, operations = run_once(line, here)
            assert code == 0, f"{line} ended with {code}"
            states[name] = start, fingerprints(here), operations
        turns = [(at, name) for name in names for at in range(1, states[name][2] + 1)]
        turns.sort(key=lambda turn: (turn[0] * 7919 + seed) % 997)  # a sample has operations of all kinds
        for turn in range(count):
            at, name = turns[turn % len(turns)]
            start, expected, _ = states[name]
            if problem := killed(COMMANDS[name][1], start, start.with_name("here"), at, expected):
                wrong.append(f"{name}, killed before file operation {at}: {problem}")
            done[name] += 1
    rows = [(name, str(states[name][2]), str(done[name])) for name in names]
    rows.append(("all", str(sum(state[2] for state in states.values())), str(sum(done.values()))))
    return table(("command", "file operations", "kills"), rows), wrong
