"""Scale: time and memory of finding, ranking, cutting and writing, up to 1,000 classes and 30,000 neurons."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from torch import nn

import torchslice as ts
from torchslice.data import Stored, Task
from torchslice.rankings import Ranking
from torchslice.runs.slicefile import SliceFile

from .experiment import Benchmark, Part, Scale
from .fuzz import memory_mib
from .tables import draw, head, markdown

INPUTS, LAYERS = 64, 60
AXES = ("classes", "neurons", "samples")
DRAWN = ("contributions", "rankings", "class slices", "extract")
STEPS = (*DRAWN, "report", "write slices", "write rankings")
TEXT = (
    "A network of linear layers of one width, untrained, on random numbers, one thread, a process for each size. "
    "Contributions are by `taylor`; class slices are those of `ReachTheta` by similarity; two classes are extracted, "
    "from the union of their slices. Files are those of `torchslice slice` and `train`. Memory in the table of growth "
    "is what the process has at its peak above what it had before."
)


@dataclass(frozen=True)
class Size:
    """A synthetic task and network: classes, training samples of each, and width of each of the hidden layers."""

    classes: int
    width: int
    per_class: int
    layers: int = LAYERS
    trained: bool = False  # end to end: also trained, saved, loaded
    data: str = "random numbers"

    @property
    def model(self) -> str:
        """Its name in files and notes."""
        return f"{self.classes}-classes-{self.layers * self.width}-neurons-{self.per_class}-samples"

    @property
    def figures(self) -> dict[str, int]:
        """Its place on the axes."""
        return dict(zip(AXES, (self.classes, self.layers * self.width, self.classes * self.per_class), strict=True))

    def load(self, data_dir: object, seed: int) -> Task:
        """Draw the samples."""
        generator = torch.Generator().manual_seed(seed)

        def split(count: int) -> Stored:
            labels = torch.arange(self.classes * count) % self.classes
            return Stored(torch.randn(len(labels), INPUTS, generator=generator), labels)

        return ts.data.task(split(self.per_class), split(1), split(1), name=self.model)

    def network(self) -> nn.Module:
        """Return the untrained network."""
        torch.manual_seed(0)
        widths = [INPUTS, *[self.width] * self.layers, self.classes]
        parts = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())][:-1]
        return nn.Sequential(*parts).eval()


SETTINGS = {
    "smoke": Scale((Size(4, 8, 2, 3), Size(8, 8, 2, 3), Size(3, 32, 2, 4, True)), 1),
    "cpu": Scale(
        (
            Size(1000, 500, 4),
            Size(10, 7168, 8, 7, True),
            *(Size(classes, 125, 4) for classes in (125, 250, 500, 1000)),
            *(Size(250, width, 4) for width in (63, 250, 500)),
            *(Size(250, 125, count) for count in (2, 8, 16)),
        ),
        1,
    ),
}
SETTINGS["paper"] = SETTINGS["cpu"]


def measure(size: Size, seed: int) -> list[dict[str, Any]]:
    """Be the process that does everything at a size, step by step; return time and most memory of each."""
    torch.set_num_threads(1)
    task, rows = size.load(None, seed), []
    before = memory_mib("VmRSS")

    def step(name: str, work: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        started = time.process_time()
        found = work()
        seconds, peak = time.process_time() - started, memory_mib("VmHWM")
        rows.append({"step": name, "seconds": seconds, "peak_mib": peak, "more_mib": peak - before})
        return found

    model = step("make the network", size.network)
    if size.trained:
        training = ts.Training(
            epochs=1, batch_size=16, learning_rate=1e-3, precision="fp32", device="cpu", progress=False
        )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if size.trained:
            step("train, with a checkpoint", lambda: ts.fit(model, task, training, folder=folder / "run"))
        neurons = step("find neurons", lambda: ts.find_neurons(model, task.example, classes=task.classes))
        options: dict[str, Any] = {"correct_only": False, "progress": False}
        scores = step("contributions", lambda: ts.semantic.contributions(neurons, task, **options))
        rankings = step("rankings", lambda: ts.subtasks.rank(neurons, task, scores))
        slices = step("class slices", lambda: ts.semantic.class_slices(neurons, task, scores, progress=False))
        part = slices[task.classes[0]] | slices[task.classes[1]]
        small = step("extract", lambda: ts.extract(neurons, part, classes=task.classes[:2]))
        step("report", lambda: (str(scores), str(slices), slices.summary(), ts.retention(neurons, part)))
        files: list[tuple[str, Any, Any]] = [("slices", slices, ts.Slice), ("rankings", rankings, Ranking)]
        for name, found, kind in files:
            file = SliceFile(folder / f"{name}.json")
            step(f"write {name}", partial(file.write, found, "", {}))
            step(f"read {name}", partial(file.read, kind, "", ""))
        if size.trained:
            step("save", lambda: ts.save(model, folder / "whole.safetensors"))
            step("load", lambda: ts.load(folder / "whole.safetensors"))
            step("save the sub-model", lambda: ts.save(small, folder / "part.safetensors"))
    return rows


class Sizes(Part):
    """One size."""

    def result(self) -> dict[str, Any]:
        """Measure it in a process of its own."""
        self.note(self.network.model)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows = pool.submit(measure, self.network, self.seed).result()
        parameters = sum(p.numel() for p in self.network.network().parameters())
        return {**self.network.figures, "parameters": parameters, "trained": self.network.trained, "rows": rows}


# -- the page -----------------------------------------------------------------------------------------------------
def write_page(result: dict[str, Any], path: Path) -> str:
    """Write tables of the largest size and of the whole way, and how all grows; draw growth."""
    runs = result["runs"]
    blocks = ["# Scale", head(result), TEXT]
    for title, trained in (("The largest size", False), ("A large network, the whole way", True)):
        kind = [run for run in runs if run["trained"] is trained]
        if not kind:
            continue
        run = max(kind, key=lambda run: run["classes"] * run["neurons"])
        about = ", ".join(f"{run[axis]:,} {axis}" for axis in AXES) + f", {run['parameters'] / 1e6:.0f} M parameters."
        cells = [(row["step"], f"{row['seconds']:.1f}", f"{row['peak_mib']:,.0f}") for row in run["rows"]]
        blocks += [f"## {title}", about, markdown(("step", "CPU seconds", "peak of the process, MiB"), cells)]
    grown = {axis: along(axis, [run for run in runs if not run["trained"]]) for axis in AXES}
    columns, panels = [], {}
    for axis, series in grown.items():
        first, last = series[0], series[-1]
        columns += [f"time, {last[axis] / first[axis]:.1f} times the {axis}", "memory"]
        curves = {
            step: [[(run[axis] / first[axis], of(run, step) / of(first, step)) for run in series]] for step in DRAWN
        }
        panels[f"CPU time over {axis}"] = curves
    panels["most memory"] = {
        f"over {axis}": [[(run[axis] / series[0][axis], most(run) / most(series[0])) for run in series]]
        for axis, series in grown.items()
    }
    lines = []
    for step in STEPS:
        ends = [(series[0], series[-1], key) for series in grown.values() for key in ("seconds", "more_mib")]
        lines.append([step, *(f"{of(last, step, key) / of(first, step, key):.1f}" for first, last, key in ends)])
    base = ", ".join(f"{value:,} {axis}" for axis, value in usual(runs).items())
    blocks += [
        "## Growth",
        f"One of them grows, the others stay at {base} of each class.",
        markdown(("step", *columns), lines),
    ]
    title = "How many times the figure at the smallest size"
    blocks.append(draw(path.with_suffix(".png"), panels, x="times the smallest size", y="times", title=title))
    return "\n\n".join(blocks) + "\n"


def usual(runs: list[dict[str, Any]]) -> dict[str, int]:
    """Return the classes, neurons and samples per class that most sizes have."""
    return {axis: mode(place(run)[axis] for run in runs) for axis in AXES}


def place(run: dict[str, Any]) -> dict[str, int]:
    """Return where a size is: classes, neurons and samples per class."""
    return {**{axis: run[axis] for axis in AXES}, "samples": run["samples"] // run["classes"]}


def along(axis: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the sizes that differ along one axis only, the smallest first."""
    base = {other: value for other, value in usual(runs).items() if other != axis}
    return sorted((run for run in runs if base.items() <= place(run).items()), key=lambda run: run[axis])


def of(run: dict[str, Any], step: str, key: str = "seconds") -> float:
    """Return a figure of a step, at least what can be measured."""
    return max(0.01, next(row[key] for row in run["rows"] if row["step"] == step))


def most(run: dict[str, Any]) -> float:
    """Return the most memory that any step took, above that of the empty process."""
    return max(row["more_mib"] for row in run["rows"])


BENCHMARK = Benchmark("scale", SETTINGS, Sizes, write_page)
