"""What every benchmark shares: scales, networks and seeds, finished parts on disk, and compact results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchslice as ts
from torchslice import TorchsliceError, Training
from torchslice.data import Split, Task
from torchslice.files import atomic_write
from torchslice.graph.neurons import Neurons
from torchslice.inputs import device_of, to_device
from torchslice.registry import unknown
from torchslice.runs.recipe import make_model
from torchslice.training.placement import choose_placement

SCALES = ("smoke", "cpu", "paper")


@dataclass(frozen=True)
class Network:
    """What a benchmark trains first: a built-in network on a built-in data set; None is all images."""

    data: str
    model: str
    width: float
    epochs: int
    train_images: int | None = None
    validation_images: int | None = None

    def load(self, data_dir: str | Path | None, seed: int) -> Task:
        """Load its data."""
        task = ts.data.load(self.data, data_dir, seed=seed)
        return task.limit(train=self.train_images, validation=self.validation_images, seed=seed)


@dataclass(frozen=True)
class Rated(Network):
    """A network with a learning rate of its own."""

    learning_rate: float = Training.learning_rate


@dataclass(frozen=True)
class Scale:
    """What every benchmark needs at a scale; `seed` is the first seed, the learning rate that of the first training."""

    networks: tuple[Any, ...]  # Network, or what takes its place
    seeds: int = 3
    samples_per_class: int = 128  # for the contributions
    learning_rate: float = Training.learning_rate
    seed: int = 0


@dataclass(frozen=True)
class Part:
    """One network and one seed of a benchmark, measured by `result`."""

    settings: Any
    network: Any
    task: Task
    seed: int
    folder: Path
    device: str
    progress: bool

    def result(self) -> dict[str, Any]:
        """Return everything that is measured, as plain data."""
        raise NotImplementedError

    @property
    def training(self) -> Training:
        """Settings of the first training."""
        return Training(
            epochs=self.network.epochs,
            learning_rate=getattr(self.network, "learning_rate", self.settings.learning_rate),
            seed=self.seed,
            device=self.device,
            progress=self.progress,
        )

    def note(self, text: str) -> None:
        """Say on standard error what is being done."""
        if self.progress:
            print(f"{self.network.model} on {self.network.data}, seed {self.seed}: {text}", file=sys.stderr, flush=True)

    def new(self, task: Task) -> nn.Module:
        """Return the untrained network for the classes of a task; its weights follow from the seed."""
        return make_model(self.network.model, task, {"width": self.network.width}, seed=self.seed)

    def trained(self, task: Task, *, folder: Path | None = None) -> nn.Module:
        """Train the network on a task."""
        self.note(f"training on {len(task.classes)} classes, {self.network.epochs} epochs")
        model = self.new(task)
        ts.fit(model, task, self.training, folder=folder)
        return model

    def contributions(self, neurons: Neurons, task: Task, **options: Any) -> ts.semantic.Contributions:
        """Measure contributions with as many samples per class as the settings say."""
        options |= {"samples_per_class": self.settings.samples_per_class, "seed": self.seed, "progress": self.progress}
        return ts.semantic.contributions(neurons, task, **options)


@dataclass(frozen=True)
class Benchmark:
    """Measures a part for every network and seed, and writes NAME-SCALE.json, NAME-SCALE.md and often NAME-SCALE.png.

    `settings` are by scale; `page` returns the text of the page from a result and the path of its files.
    """

    name: str
    settings: Mapping[str, Any]
    part: type[Part]
    page: Callable[[dict[str, Any], Path], str]

    def __call__(self, scale: str, *, out: str | Path, seed: int = 0, page_only: bool = False, **where: Any) -> Any:
        """Run it and return the result as it stands in the file.

        Args:
            out: a folder. Finished parts in it are reused, so that an interrupted benchmark goes on where it stopped.
            seed: the first of the seeds.
            page_only: measure nothing, but make page and picture from the result that is there.
            where: data_dir, device, progress.
        """
        if scale not in SCALES:
            raise unknown("scale", scale, SCALES)
        path = Path(out) / f"{self.name}-{scale}"
        if not page_only:
            choose_placement(where.get("device", "auto"))  # says what is wrong with it
            check_writable(Path(out))
            settings = replace(self.settings[scale], seed=seed)
            runs = self.runs(settings, path, **where)
            command = f"python -m benchmarks {self.name} --scale {scale} --seed {seed}"
            write_result(path.with_suffix(".json"), {"manifest": manifest(command, asdict(settings)), "runs": runs})
        result = read_result(path.with_suffix(".json"))
        atomic_write(path.with_suffix(".md"), self.page(result, path))
        return result

    def runs(
        self, settings: Any, path: Path, *, data_dir: Path | None = None, device: str = "auto", progress: bool = True
    ) -> list[dict[str, Any]]:
        """Measure all parts, or read those that are finished."""
        runs = []
        for network in settings.networks:
            if reason := getattr(network, "absent", ""):
                print(f"{network.model} on {network.data} is left out: {reason}", file=sys.stderr, flush=True)
                continue
            task = network.load(data_dir, settings.seed)
            for seed in range(settings.seed, settings.seed + (getattr(network, "seeds", None) or settings.seeds)):
                place = path.with_name(f"{path.name}-{network.data}-{network.model}-seed{seed}")
                used = {**asdict(settings), "networks": asdict(network), "seeds": seed, "data_hash": task.fingerprint}
                part = self.part(settings, network, task, seed, place, device, progress)
                about = {"data": network.data, "model": network.model, "seed": seed}
                runs.append(about | finished_or_run(place.with_suffix(".json"), used, part.result))
        return runs


class Cells:
    """Figures measured one by one and kept in a file, one a line, so that a long part goes on where it stopped.

    A file that was made with other settings is refused.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, first = path, json.dumps(settings)
        lines = path.read_text().splitlines() if path.is_file() else []
        if lines and lines[0] != first:
            raise TorchsliceError(f"{path} was made with other settings; remove it or choose another --out.")
        self.found = dict(map(json.loads, lines[1:]))
        self.lines = lines or [first]

    def __call__(self, key: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the figures of a key, measured now if they are not there yet."""
        name = json.dumps(key)
        if name not in self.found:
            self.found[name] = measure()
            self.lines.append(json.dumps([name, self.found[name]]))
            atomic_write(self.path, "\n".join(self.lines) + "\n")
        return self.found[name]


# -- networks and data --------------------------------------------------------------------------------------------
def neurons_of(model: nn.Module, task: Task) -> Neurons:
    """Find the neurons of a network, with the classes of a task."""
    return ts.find_neurons(model, to_device(task.example, device_of(model)), classes=task.classes)


def inputs_of(split: Split, device: torch.device) -> Tensor:
    """Return all samples of a split as a model takes them."""
    return next(iter(split.read([torch.arange(len(split))], device=device)))


def spent(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds of a training from its rows."""
    return sum(row["seconds"] for row in rows)


# -- results on disk ----------------------------------------------------------------------------------------------
def manifest(command: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what is needed to repeat a run: command, settings, commit, versions, and processor."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "command": command,
        "commit": commit,
        "settings": settings,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def compact(value: Any) -> Any:
    """Return plain data with figures of four digits, and lists of objects as columns and rows.

    >>> compact([{"arm": "ours", "accuracy": 0.98765}, {"arm": "theirs"}])
    {'columns': ['arm', 'accuracy'], 'rows': [['ours', 0.9877], ['theirs', None]]}
    """
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {str(key): compact(entry) for key, entry in value.items()}
    if not isinstance(value, list | tuple):
        return value
    if not value or not all(isinstance(row, Mapping) for row in value):
        return [compact(entry) for entry in value]
    columns = list(dict.fromkeys(key for row in value for key in row))
    return {"columns": columns, "rows": [[compact(row.get(key)) for key in columns] for row in value]}


def expand(value: Any) -> Any:
    """Return what `compact` was given; what only some rows had is None in the others.

    >>> expand({"columns": ["arm", "accuracy"], "rows": [["ours", 0.9877], ["theirs", None]]})
    [{'arm': 'ours', 'accuracy': 0.9877}, {'arm': 'theirs', 'accuracy': None}]
    """
    if isinstance(value, list):
        return [expand(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"columns", "rows"}:
        return [dict(zip(value["columns"], map(expand, row), strict=True)) for row in value["rows"]]
    return {key: expand(entry) for key, entry in value.items()}


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON, one run a line."""
    about, *runs = (
        json.dumps(compact(entry), separators=(",", ":")) for entry in (result["manifest"], *result["runs"])
    )
    atomic_write(path, "\n".join(['{"manifest":' + about + ',"runs":[', ",\n".join(runs), "]}\n"]))


def read_result(path: Path) -> dict[str, Any]:
    """Read what `write_result` wrote."""
    try:
        result = json.loads(path.read_text())
        return {"manifest": expand(result["manifest"]), "runs": [expand(run) for run in result["runs"]]}
    except FileNotFoundError as error:
        raise TorchsliceError(f"there is no result {path}; run the benchmark without --page-only first.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TorchsliceError(f"{path} is no result of a benchmark; remove it or choose another --out.") from error


def finished_or_run(path: Path, settings: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the run stored at `path` if it was made with these settings; else make, store and return it.

    A run of other settings is refused rather than overwritten.
    """
    if not path.is_file():
        write_result(path, {"manifest": settings, "runs": [run()]})
    stored = read_result(path)
    if stored["manifest"] != expand(compact(settings)):
        raise TorchsliceError(f"{path} was made with other settings; remove it or choose another --out.")
    return stored["runs"][0]


def check_writable(folder: Path) -> None:
    """Raise before long work if files could not be written into a folder after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TorchsliceError(f"cannot write into {folder}: {error.strerror}; choose another --out.") from error
