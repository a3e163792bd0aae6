"""Ranks: torchrun with two and four processes trains, finds and judges what one process does; a death ends them all.

All verbs run in one process, and again in the processes of the real launcher. Slices and rankings must be equal, losses
and scores close, every sample on the disk read by one process only. Then a run is killed in one process, resumed, and
refused to another number of processes.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import torchslice as ts
from torchslice import cli
from torchslice.tables import table
from torchslice.training.checkpoint import read_checkpoint
from torchslice.training.ranks import current_ranks

CLOSE, NEAR = 1e-6, 1e-5  # differences allowed of losses and of all other numbers, relative to those above 1
SECONDS = 300  # that any launch may take
SAMPLES, CLASSES = 160, 4
TRAINING = ts.Training(epochs=2, batch_size=16, learning_rate=0.05, precision="fp32", device="cpu", progress=False)
TRAIN = "train benchmarks.ranks:network benchmarks.ranks:task --epochs 4 --batch-size 16 --precision fp32 --device cpu"
FATAL, FATAL_AT = (
    "",
    120,
)  # how the second process ends where it reads its 121st sample, in the second epoch: kill, raise


class Disk(Dataset[tuple[Tensor, int]]):
    """Samples that are made when they are read, and note which were."""

    def __init__(self, count: int) -> None:
        self.targets, self.classes = [i % CLASSES for i in range(count)], [*"abcd"]
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.seen.append(index)
        fatal = os.environ.get("FATAL") if os.environ.get("RANK") == "1" and len(self.seen) > FATAL_AT else ""
        if fatal == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fatal == "raise":
            raise ts.TorchsliceError(f"sample {index} cannot be read.")
        noise = torch.randn(6, 6, generator=torch.Generator().manual_seed(index))
        label = self.targets[index]
        noise[label : label + 2, label : label + 2] += 2
        return noise[None], label


def network(num_classes: int = CLASSES) -> nn.Module:
    """Return a small network without batch norm, whose losses do not depend on who computes them."""
    torch.manual_seed(0)
    flat = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, num_classes)]
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), *flat)


def task() -> ts.data.Task:
    """Return the task of samples that are read from disk."""
    return ts.data.task(Disk(SAMPLES), Disk(24), Disk(40), name="disk")


def everything(folder: Path) -> dict[str, Any]:
    """Train, find and judge in every way; return numbers, what was chosen, and what was read, by name."""
    data, read = task(), {}
    numbers: dict[str, Any] = {}
    chosen: dict[str, Any] = {}

    def reads(name: str, split: str = "train") -> None:
        """Keep what was read of a split since the last time."""
        seen = getattr(data, split).dataset.seen
        read[name] = list(seen)
        seen.clear()

    def losses(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    numbers["standard"] = losses(ts.fit(model := network(), data, TRAINING, folder=folder / "standard"))
    reads("epochs")
    neurons = ts.find_neurons(model, data.example, classes=data.classes)
    gated = ts.gates.attach(ts.find_neurons(network(), data.example, classes=data.classes))
    numbers["gates"] = losses(ts.fit(gated, data, TRAINING, objective=ts.gates.objective()))
    reads("epochs")
    found = ts.gates.statistics(gated, data, progress=False)
    reads("statistics")
    numbers["statistics"] = {"frequency": found.frequency, "mean": found.mean}
    chosen["slices by gates"] = ts.gates.class_slices(gated, data, progress=False)
    reads("epochs")
    numbers["report"] = ts.gates.report(gated, data, chosen["slices by gates"], progress=False).to_plain()
    reads("report")
    scores = ts.semantic.contributions(neurons, data, metric=["taylor", "ens", "deeplift"], seed=1, progress=False)
    numbers["contributions"], chosen["samples"] = scores.scores, {"all": scores.samples}
    reads("epochs")
    for strategy in (ts.semantic.ReachTheta(0.9), ts.semantic.ReachTheta(0.9, criterion="mass")):
        slices = ts.semantic.class_slices(neurons, data, scores, metric="taylor", strategy=strategy, progress=False)
        chosen[f"slices to {strategy.criterion}"] = {**slices, "critical": slices.critical}
    rankings = chosen["rankings"] = ts.subtasks.rank(neurons, data, scores, metric="taylor")
    objective = ts.subtasks.objective(neurons, rankings, least=0.5, round_to=2)
    numbers["sub-tasks"] = losses(ts.fit(model, data, replace(TRAINING, seed=3), objective=objective))
    data.test.dataset.seen.clear()  # type: ignore[attr-defined]
    numbers["accuracy"] = {"accuracy": ts.accuracy(model, data).overall}
    reads("evaluation", "test")
    numbers["logits"] = {"test": ts.judge.predict(model, data)}
    pair = ts.reuse(neurons, data, rankings, classes=["a", "c"], param_retention=0.6, round_to=2, training=TRAINING)
    chosen["sub-model"], numbers["sub-model"] = {"slice": pair.slice}, dict(pair.model.state_dict())
    read.pop("epochs")  # of several verbs
    return {"numbers": numbers, "chosen": {key: str(plain(of)) for key, of in chosen.items()}, "read": read}


def plain(tree: Any) -> Any:
    """Return slices, rankings and tensors as plain data."""
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    return tree.to_plain() if hasattr(tree, "to_plain") else tree.tolist()


def flat(tree: Any) -> list[float]:
    """List the numbers of a tree of plain data and tensors."""
    if isinstance(tree, Tensor):
        return flat(tree.tolist())
    if isinstance(tree, Mapping | list | tuple):
        return [x for item in (tree.values() if isinstance(tree, Mapping) else tree) for x in flat(item)]
    return [float(tree)] if isinstance(tree, int | float) else []


def difference(found: Any, expected: Any) -> float:
    """Return the largest difference between numbers, relative to those above 1."""
    pairs = zip(flat(found), flat(expected), strict=True)
    return max(abs(one - other) / max(1.0, abs(other)) for one, other in pairs)


def launch(processes: int, folder: Path, *what: str) -> subprocess.CompletedProcess[str]:
    """Run this module in so many processes of torchrun, see `main`."""
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    root = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*launcher, "-m", "benchmarks.ranks", str(folder), *what],
        env={**clean, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the errors that the processes themselves printed, without the report of the launcher."""
    return re.findall(r"^torchslice(?:, process \d+)?: .*$", done.stderr, re.MULTILINE)


def compared(parts: Sequence[Mapping[str, Any]], alone: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
    """Return the largest differences of what the processes found from what one finds alone, and what is wrong."""
    differences, wrong = {}, []
    for name, expected in alone["numbers"].items():
        differences[name] = max(difference(part["numbers"][name], expected) for part in parts)
        if not differences[name] <= (CLOSE if name in ("standard", "gates", "sub-tasks") else NEAR):
            wrong.append(f"{name}: a difference of {differences[name]:.2g}")
    for name, expected in alone["chosen"].items():
        wrong += [
            f"{name} are others in process {i}" for i, part in enumerate(parts) if part["chosen"][name] != expected
        ]
    for name, expected in alone["read"].items():
        together = sorted(index for part in parts for index in part["read"][name])
        most = max(len(part["read"][name]) for part in parts)
        if together != sorted(expected) or most > len(expected) / len(parts) + CLASSES:
            wrong.append(f"{name}: of {len(expected)} samples {len(together)} were read, {most} by one process")
    return differences, wrong


def died(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what is wrong with the end of a run of which a process was killed: the others end with a line."""
    before, _, _ = done.stderr.partition("torch/distributed/elastic")  # where the report of the launcher begins
    fine = done.returncode and "Traceback" not in before
    return [] if fine else [f"a killed process: {done.stderr[-3000:]}"]


def ends(processes: int, folder: Path) -> list[str]:
    """Kill, resume and refuse runs of so many processes; return what is wrong. In `folder` one was killed already."""
    wrong = []
    whole, broken = folder / "whole", folder / "broken"
    for place in (folder, whole):
        done = launch(processes, place, "train")
        wrong += [] if done.returncode == 0 else [f"training in {place} ended with {done.stderr[-2000:]}"]
    files = [sorted(place.glob("run/*/checkpoint.safetensors")) for place in (folder, whole)]
    resumed, straight = ([read_checkpoint(path)[1] for path in paths] for paths in files)
    if not all(same(one, other) for one, other in zip(resumed, straight, strict=True)):
        wrong.append("a run that was killed and resumed has other weights than one that was not")
    done = launch(processes, broken, "train", "raise")
    if not any("process 1: sample" in line and "cannot be read" in line for line in said(done)):
        wrong.append(f"an error of the second process alone was not told: {done.stderr[-2000:]}")
    done = launch(2 * processes, whole, "train", "kill")  # which would be killed if it began to train
    if not any(f"processes was {processes}, now {2 * processes}" in line for line in said(done)):
        wrong.append(f"another number of processes was not refused: {done.stderr[-2000:]}")
    return wrong


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Tell whether two states are bit-equal."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def run(*, count: int = 4, seed: int = 0) -> tuple[str, list[str]]:
    """Compare 2, 4, ... up to so many processes with one; return a table of differences, and what is wrong."""
    wrong, columns = [], {}
    with tempfile.TemporaryDirectory() as place:
        alone = everything(Path(place, "1"))
        for processes in (2**k for k in range(1, count.bit_length())):
            folder = Path(place, str(processes))
            done = launch(processes, folder, "all")
            parts = [torch.load(path) for path in sorted(folder.glob("*.pt"))]
            columns[processes], odd = compared(parts, alone) if len(parts) == processes else ({}, [done.stderr[-2000:]])
            odd += died(done) + (ends(processes, folder) if processes == 2 else [])
            wrong += [f"{processes} processes: {line}" for line in odd]
    rows = [(name, *(f"{found.get(name, math.nan):.1e}" for found in columns.values())) for name in alone["numbers"]]
    return table(("largest difference from one process", *(f"{n} processes" for n in columns)), rows), wrong


def main(folder: Path, what: str, fatal: str = "") -> int:
    """Be one of the processes: run all verbs and then a training that is killed, or a training alone."""
    if what == "all":
        torch.save(everything(folder), folder / f"{current_ranks(torch.device('cpu')).rank}.pt")
        fatal = "kill"
    os.environ["FATAL"] = fatal
    return cli.main([*TRAIN.split(), "--out", str(folder / "run")])


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
