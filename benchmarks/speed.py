"""What torchslice costs, as ratios measured in one run: each figure beside what it is compared with, taken in turns.

Images are random: the time of a step does not depend on what they show.
"""

from __future__ import annotations

import copy
import json
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchslice as ts
from torchslice import TorchsliceError, gates
from torchslice.data import Images, Task
from torchslice.files import atomic_write
from torchslice.find.gates.measures import cohesion
from torchslice.imports import import_optional
from torchslice.maintain import Partial
from torchslice.training import CrossEntropy, Objective
from torchslice.training.placement import choose_placement

from .experiment import Benchmark, Part, Scale, neurons_of
from .tables import Run, head, markdown

BATCH = 128  # images per pass, beside captum and beside a plain pass
FOUR = ("avg", "var", "ens", "taylor")
STATUS = Path("/proc/self/status")
Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Settings(Scale):
    """One scale of the benchmark."""

    repeats: int = 6  # turns of everything that takes less than a second
    cut: tuple[str, ...] = ("resnet18", "densenet121")  # of torchvision
    steps: int = 7  # training steps of each kind
    sub_tasks: int = 8  # that are drawn for one of these
    models: tuple[str, ...] = ("vgg16", "resnet18")
    width: float = 1.0
    batch_size: int = 128
    images: int = 1024  # for class slices
    masks: tuple[int, int] = (5000, 4736)  # samples and neurons, for cohesion
    contribution_images: int = 2560
    captum_images: int = 64  # one layer at a time is slow


# -- ratios -------------------------------------------------------------------------------------------------------
def noise(count: int) -> Task:
    """Return random images in the shape of CIFAR-10."""
    images = Images(torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), torch.arange(count) % 10)
    return ts.data.task(images, images, images, classes="0123456789", name="noise")


def seconds(run: Callable[[], Any]) -> float:
    """Return how long a call takes, with what it started on the GPU."""
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turns(repeats: int, *sides: Callable[[], Any]) -> list[tuple[float, ...]]:
    """Run all sides once to warm up, then in turns, another one first each time; return the seconds of every turn."""
    turns = []
    for turn in range(repeats + 1):
        first = turn % len(sides)
        taken = {side: seconds(side) for side in (*sides[first:], *sides[:first])}
        turns.append(tuple(taken[side] for side in sides))
    return turns[1:]


def compare(
    what: str, against: str, goal: str, pairs: Sequence[tuple[float, ...]], *, unit: str = "{:.3f} s"
) -> dict[str, Any]:
    """Return the row of pairs of figures (ours, theirs): the median and the quartiles of their ratios.

    >>> compare("a cut", "another", "<= 1", [(1.0, 2.0)])["what"]
    'a cut (1.000 s)'
    """
    ratios = [ours / theirs for ours, theirs in pairs]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    ours, theirs = (unit.format(statistics.median(side)) for side in zip(*pairs, strict=True))
    figures = {"ratio": statistics.median(ratios), "quartiles": [low, high], "pairs": pairs}
    return {"what": f"{what} ({ours})", "against": f"{against} ({theirs})", "goal": goal, **figures}


def missing(what: str, why: object, goal: str) -> dict[str, Any]:
    """Return the row of a ratio that cannot be measured here."""
    return {"what": what, "against": str(why), "goal": goal, "ratio": None, "quartiles": None, "pairs": []}


def cells(row: Run) -> list[str]:
    """Return a row as the cells of a Markdown table."""
    ratio = "-" if row["ratio"] is None else "{:.2f} ({:.2f} to {:.2f})".format(row["ratio"], *row["quartiles"])
    return [row["what"], row["against"], ratio, row["goal"]]


# -- what is measured ---------------------------------------------------------------------------------------------
def against_torch_pruning(settings: Settings, device: str, task: Task) -> Rows:
    """find_neurons + extract of half the neurons, checked, against torch-pruning on a copy of the model."""
    try:
        tp = import_optional("torch_pruning", extra="dev")
    except TorchsliceError as error:
        yield missing("find_neurons + extract", error, "<= 1")
        return
    example = torch.randn(2, 3, 64, 64)

    def ours(model: nn.Module) -> None:
        neurons = ts.find_neurons(model, example)
        ts.extract(neurons, neurons.random(0.5))

    def theirs(model: nn.Module) -> None:
        other = copy.deepcopy(model)
        last = [module for module in other.modules() if isinstance(module, nn.Linear)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importance = tp.importance.RandomImportance()
            tp.pruner.BasePruner(other, example, importance, pruning_ratio=0.5, ignored_layers=last).step()

    for name in settings.cut:
        model = ts.models.create(f"torchvision:{name}").eval()
        turns = in_turns(settings.repeats, partial(ours, model), partial(theirs, model))
        yield compare(f"find_neurons + extract, {name}", "torch-pruning", "<= 1", turns)


def steps(settings: Settings, device: str, task: Task) -> Rows:
    """Steps of MwT, of sub-task training and of some neurons only, against a standard one; each with its optimizer."""
    placement, size = choose_placement(device), settings.batch_size
    images = torch.randn(size, 3, 32, 32, device=placement.device).contiguous(memory_format=torch.channels_last)
    numbers = torch.arange(size, device=placement.device)
    least = "<= 1.15" if placement.device.type == "cuda" else "<= 1.08"

    def step(model: nn.Module, *objectives: Objective) -> Callable[[], None]:
        placement.put(model.train(), images[:2])
        optimizer = ts.Training(learning_rate=settings.learning_rate).make_optimizer(model)

        def run() -> None:
            for objective in objectives:
                classes = torch.tensor(getattr(objective, "classes", range(10)), device=placement.device)
                with placement.autocast():
                    loss, _, _ = objective(model, images, classes[numbers % len(classes)])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        return run

    for name in settings.models:
        standard, gated, divided, some = (
            neurons_of(ts.models.create(name, width=settings.width).to(placement.device), task) for _ in range(4)
        )
        options: dict[str, Any] = {"samples_per_class": settings.samples_per_class, "correct_only": False}
        scores = ts.semantic.contributions(divided, task, progress=False, **options)
        divide = ts.subtasks.objective(divided, ts.subtasks.rank(divided, task, scores))
        generator = torch.Generator().manual_seed(0)
        drawn = [divide.draw(generator) for _ in range(settings.sub_tasks)]
        sub_task = "sub-task step, mean of those drawn"
        sides = {
            "MwT step": (step(gates.attach(gated), gates.objective()), 1, least),
            sub_task: (step(divided.model, *drawn), len(drawn), "<= 1"),
            "step of 20 % of the neurons": (step(Partial(some, some.random(0.2)), CrossEntropy()), 1, "< 1"),
        }
        turns = in_turns(settings.steps, *(run for run, _, _ in sides.values()), step(standard.model, CrossEntropy()))
        for i, (what, (_, count, goal)) in enumerate(sides.items()):
            about = f"{what}, {name}, batch {size}, {placement.precision}"
            yield compare(about, "standard step", goal, [(turn[i] / count, turn[-1]) for turn in turns])


def class_slices(settings: Settings, device: str, task: Task) -> Rows:
    """Class slices of all classes against one forward pass of the same gated network over the same images."""
    placement, task, name = choose_placement(device, "fp32"), noise(settings.images), settings.models[0]
    model = ts.models.create(name, width=settings.width).to(placement.device)
    gated = gates.attach(neurons_of(model, task)).eval()

    @torch.no_grad()
    def forward() -> None:
        for images, _ in task.batches("train", 512, device=placement.device):
            gated(images)

    turns = in_turns(max(1, settings.repeats // 3), partial(gates.class_slices, gated, task, progress=False), forward)
    state = 2 * 8 * len(task.classes) * len(gated.neurons) / 2**20
    what = f"class slices, {name}, {settings.images} images, {state:.1f} MiB of sums"
    yield compare(what, "one forward pass", "<= 1.1, < 5 MiB", turns)


def exact_cohesion(settings: Settings, device: str, task: Task) -> Rows:
    """Exact cohesion of one class, in seconds."""
    masks = torch.rand(settings.masks) < 0.5
    pairs = [(seconds(lambda: cohesion(masks)), 1.0) for _ in range(max(1, settings.repeats // 3))]
    yield compare("exact cohesion of {} x {}".format(*settings.masks), "one second", "<= 2", pairs)


def sub_model(settings: Settings, device: str, task: Task) -> Rows:
    """The speed-up of a sub-model with half of every layer at batch 64, against its fraction of the MACs."""
    placement = choose_placement(device, "fp32")
    for name in settings.models:
        neurons = neurons_of(ts.models.create(name, width=settings.width).eval(), task)
        pair = {"full": neurons.model, "half": ts.extract(neurons, neurons.random(0.5))}
        for model in pair.values():
            placement.put(model, task.example)
        macs = [ts.judge.cost(model, task.example).macs for model in pair.values()]
        times = ts.judge.latency_ms(pair, task.example, batch_sizes=(64,), repeats=settings.repeats)
        full, half = (times[key][64].median_ms for key in pair)
        what = f"speed-up by half of {name}, batch 64"
        yield compare(what, "its MAC ratio", ">= 0.8", [(full / half, macs[0] / macs[1])], unit="{:.2f}x")


class Passes:
    """What contributions are compared with: passes over random images of 32x32 through a ResNet18."""

    def __init__(self, width: float, images: int, device: str) -> None:
        self.task, self.device = noise(images), choose_placement(device, "fp32").device
        self.model = ts.models.create("resnet18", width=width).to(self.device).eval()
        self.neurons = neurons_of(self.model, self.task)
        self.layers = [self.model.get_submodule(name) for name in self.neurons.layers]
        self.what = f"of resnet18, {images} images"

    def plain(self) -> None:
        """One forward and backward pass over the images."""
        for images, labels in self.task.batches("train", BATCH, device=self.device):
            nn.functional.cross_entropy(self.model(images), labels).backward()
        self.model.zero_grad()

    def ours(self, *metrics: str) -> None:
        """Contributions of all layers to all classes."""
        options: dict[str, Any] = {"samples_per_class": len(self.task.train), "correct_only": False, "progress": False}
        ts.semantic.contributions(self.neurons, self.task, metric=metrics, batch_size=BATCH, **options)

    def captums(self, method: Any, *, at_once: bool) -> None:
        """The same by a method of captum, without the means: of a list of layers, or of one after the other."""
        whole, _ = next(self.task.batches("train", len(self.task.train), device=self.device))
        base = whole.mean(0, keepdim=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # captum says that it sets hooks
            for x, target in self.task.batches("train", BATCH, device=self.device):
                for layer in [self.layers] if at_once else self.layers:
                    baselines = () if at_once else (base.expand_as(x),)
                    method(self.model, layer).attribute(x, *baselines, target=target)


def contribution_times(settings: Settings, device: str, task: Task) -> Rows:
    """Contributions against a plain pass over the same images."""
    passes, plain = Passes(settings.width, settings.contribution_images, device), "forward and backward pass"
    sides = passes.plain, partial(passes.ours, *FOUR), partial(passes.ours, "deeplift")
    turns = in_turns(max(1, settings.repeats // 3), *sides)
    yield compare(f"{', '.join(FOUR)} {passes.what}", plain, "<= 1.15", [(four, theirs) for theirs, four, _ in turns])
    yield compare(f"deeplift {passes.what}", plain, "<= 3", [(ours, theirs) for theirs, _, ours in turns])


def against_captum(settings: Settings, device: str, task: Task) -> Rows:
    """Contributions against captum, whose DeepLIFT takes one layer at a time, and functions by their gradient."""
    passes = Passes(settings.width, settings.captum_images, device)
    try:
        attr = import_optional("captum.attr", extra="dev")
    except TorchsliceError as error:
        yield missing(f"taylor, deeplift {passes.what}", f"captum: {error}", "none")
        return
    layers = f"{len(passes.layers)} layers"
    for metric, theirs, method, at_once in (
        ("taylor", f"gradient x activation, list of {layers}", attr.LayerGradientXActivation, True),
        ("deeplift", f"LayerDeepLift, {layers} one by one, relu by its gradient", attr.LayerDeepLift, False),
    ):
        turns = in_turns(1, partial(passes.ours, metric), partial(passes.captums, method, at_once=at_once))
        yield compare(f"{metric} {passes.what}", f"captum, {theirs}", "none", turns)


def contribution_memory(settings: Settings, device: str, task: Task) -> Rows:
    """Peak memory of contributions against that of a plain pass, each in a process of its own."""
    if not STATUS.is_file():
        yield missing("peak memory of contributions", f"not measured: this system has no {STATUS}", "<= 1.2")
        return
    images = min(settings.contribution_images, 2 * BATCH)
    idle, peak = peak_memory((), images, settings.width, device)
    for metrics in (FOUR, ("deeplift",)):
        own_idle, own_peak = peak_memory(metrics, images, settings.width, device)
        what = f"peak memory of {', '.join(metrics)} of resnet18, batch {min(images, BATCH)}"
        for which, pair in (("whole process", (own_peak, peak)), ("above idle", (own_peak - own_idle, peak - idle))):
            against = f"forward and backward pass, {which}"
            yield compare(f"{what}, {which}", against, "<= 1.2", [pair], unit="{:.0f} MiB")


def peak_memory(metrics: tuple[str, ...], images: int, width: float, device: str) -> tuple[float, float]:
    """Run contributions, or a plain pass for no metrics, in a fresh process: its memory before and at most, in MiB."""
    code = f"from {__name__} import report_memory; report_memory({metrics!r}, {images}, {width}, {device!r})"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    idle, peak = json.loads(done.stdout)
    return idle, peak


def report_memory(metrics: tuple[str, ...], images: int, width: float, device: str) -> None:
    """Do the work of `peak_memory` in this process and print what it needs."""
    passes = Passes(width, images, device)
    idle, _ = memory_mib(passes.device)
    passes.ours(*metrics) if metrics else passes.plain()
    print(json.dumps([idle, memory_mib(passes.device)[1]]))


def memory_mib(device: torch.device) -> tuple[float, float]:
    """Return the memory of this process now and at its peak, in MiB; on a GPU, that of its tensors."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20, torch.cuda.max_memory_allocated(device) / 2**20
    now, peak = (re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text()) for key in ("VmRSS", "VmHWM"))
    assert now and peak
    return int(now[1]) / 1024, int(peak[1]) / 1024


GROUPS: dict[str, Callable[[Settings, str, Task], Rows]] = {
    "torch-pruning": against_torch_pruning,
    "steps": steps,
    "class slices": class_slices,
    "cohesion": exact_cohesion,
    "sub-model": sub_model,
    "contributions": contribution_times,
    "captum": against_captum,
    "memory": contribution_memory,
}


# -- the benchmark ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Group:
    """Ratios that are measured together; takes the place of a network."""

    model: str  # one of GROUPS
    data: str = "noise"

    def load(self, data_dir: str | Path | None, seed: int) -> Task:
        """Return random images."""
        torch.manual_seed(seed)
        return noise(100)


@dataclass(frozen=True)
class Measuring(Part):
    """One group of ratios."""

    def result(self) -> dict[str, Any]:
        rows = []
        for row in GROUPS[self.network.model](self.settings, self.device, self.task):
            rows.append(row)
            self.note(" | ".join(cells(row)))
        return {"rows": rows}


def write_page(result: dict[str, Any], path: Path) -> str:
    """Write one table, and what became worse since the last time on such a machine."""
    text = (
        "Both sides of a ratio are measured in turns in the same run; the median of the pairwise ratios, with "
        "quartiles. Peak memory is that of a fresh process for each side."
    )
    rows = [cells(row) for run in result["runs"] for row in run["rows"]]
    table = markdown(["what", "against", "ratio (quartiles)", "goal"], rows)
    return "\n\n".join(["# Speed", head(result), text, table, since_last(result, path)]) + "\n"


def since_last(result: dict[str, Any], path: Path) -> str:
    """Add a result to the history beside it, one line of JSON each, and say which ratios are worse than before.

    Worse is what is further than a tenth from the last result of the same machine, measured between the quartiles that
    are nearest to each other.
    """
    about, file = result["manifest"], path.with_suffix(".history.jsonl")
    rows = [row for run in result["runs"] for row in run["rows"] if row["ratio"] is not None]
    entry = {
        "commit": about["commit"],
        "machine": f"{about['processor']}, {about['accelerator'] or 'no GPU'}",
        "ratios": {row["what"].rpartition(" (")[0]: [row["ratio"], *row["quartiles"], row["goal"]] for row in rows},
    }
    entries = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not entries or entries[-1] != entry:
        entries.append(entry)
        atomic_write(file, "".join(json.dumps(line) + "\n" for line in entries))
    earlier = [line for line in entries[:-1] if line["machine"] == entry["machine"]]
    if not earlier:
        return f"The first result of this machine ({entry['machine']}); later ones are compared with it."
    before, now = earlier[-1]["ratios"], entry["ratios"]
    lines = [
        f"- {name}: {now[name][0]:.2f}, was {before[name][0]:.2f}"
        for name in now
        if name in before and worse(now[name], before[name])
    ]
    title = f"Worse than at commit {earlier[-1]['commit']} by more than a tenth, beyond the spread: "
    return "\n".join([title + ("" if lines else "nothing."), *lines])


def worse(now: Sequence[Any], before: Sequence[Any]) -> bool:
    """Whether a ratio (median, quartiles, goal) is worse than it was by more than a tenth beyond its spread.

    >>> worse([1.3, 1.2, 1.4, "<= 1"], [1.0, 0.9, 1.05, "<= 1"]), worse([1.3, 1.1, 1.4, "<= 1"], [1.0, 0.9, 1.05, ""])
    (True, False)
    """
    (_, low, high, goal), (_, low_before, high_before, _) = now, before
    return high < low_before / 1.1 if goal.startswith(">") else low > high_before * 1.1


COMMON: dict[str, Any] = {"networks": tuple(map(Group, GROUPS)), "seeds": 1, "samples_per_class": 2}
COMMON |= {"learning_rate": 1e-3}
SMOKE: dict[str, Any] = {"repeats": 1, "cut": ("resnet18",), "steps": 1, "models": ("resnet18",), "width": 0.125}
SMOKE |= {"batch_size": 8, "images": 32, "masks": (200, 300), "contribution_images": 20, "captum_images": 10}
SETTINGS = {
    "smoke": Settings(**COMMON, **SMOKE),
    "cpu": Settings(**COMMON),
    "paper": Settings(**COMMON, repeats=9, steps=30, images=10_000, captum_images=128),
}
BENCHMARK = Benchmark("speed", SETTINGS, Measuring, write_page)
