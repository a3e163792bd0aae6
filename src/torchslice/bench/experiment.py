"""What every bench shares: scales, networks and seeds, finished parts on disk, and means with their spread."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from ..data import Data, load
from ..errors import TorchsliceError
from ..files import atomic_write
from ..registry import Registry, unknown
from ..training import fit

SCALES = ("smoke", "cpu", "paper")
#: name -> function (scale, *, data_dir, out, seed, device, progress) -> plain data; it writes out/NAME.json and .md
BENCHES: Registry[Callable[..., dict[str, Any]]] = Registry("bench")


@dataclass(frozen=True)
class Network:
    """What a bench trains first: a built-in network on a built-in data set."""

    data: str
    model: str
    width: float
    epochs: int
    train_images: int | None = None  # None is all
    validation_images: int | None = None

    def load(self, data_dir: str | Path | None, seed: int) -> Data:
        """Load its data."""
        data = load(self.data, data_dir, seed=seed)
        return data.limit(train=self.train_images, validation=self.validation_images, seed=seed)


@dataclass(frozen=True)
class Part:
    """One network and one seed of a bench, measured by `result`.

    `settings` are those of the scale: `networks`, `seeds`, `seed` (the first), `learning_rate`, and a bench's own.
    """

    settings: Any
    network: Any  # Network, with a bench's own fields
    data: Data
    seed: int
    folder: Path
    device: str
    progress: bool

    def result(self) -> dict[str, Any]:
        """Return everything that is measured, as plain data."""
        raise NotImplementedError

    @property
    def running(self) -> dict[str, Any]:
        """Options of whatever takes long."""
        return {"device": self.device, "progress": self.progress}

    @property
    def training(self) -> dict[str, Any]:
        """Options of the first training."""
        rate = self.settings.learning_rate
        return {"epochs": self.network.epochs, "learning_rate": rate, "seed": self.seed, **self.running}

    def note(self, text: str) -> None:
        """Say on standard error what is being done."""
        note(f"{self.network.model} on {self.network.data}, seed {self.seed}: {text}", self.progress)

    def new(self, data: Data) -> nn.Module:
        """Return the untrained network for the classes of some data; its weights follow from the seed."""
        torch.manual_seed(self.seed)
        arguments = {"channels": data.train.images.shape[1], "width": self.network.width}
        return models.create(self.network.model, num_classes=len(data.classes), **arguments)

    def trained(self, data: Data, *, folder: Path | None = None) -> nn.Module:
        """Train the network on some data."""
        self.note(f"training on {len(data.classes)} classes, {self.network.epochs} epochs")
        model = self.new(data)
        fit(model, data, folder=folder, **self.training)
        return model


@dataclass(frozen=True)
class Bench:
    """A bench of several networks and seeds: measures its parts, and writes NAME-SCALE.json and NAME-SCALE.md.

    Finished parts in `out` are reused, so that an interrupted bench goes on where it stopped. `seed` is the first of
    the seeds. `page` returns the text of the page and may add to the result, which is returned.
    """

    name: str
    settings: Mapping[str, Any]
    part: type[Part]
    page: Callable[[dict[str, Any], Path], str]

    def __call__(
        self,
        scale: str,
        *,
        data_dir: str | Path | None = None,
        out: str | Path = "results",
        seed: int = 0,
        device: str = "auto",
        progress: bool = True,
    ) -> dict[str, Any]:
        check_scale(scale)
        settings, folder, runs = replace(self.settings[scale], seed=seed), Path(out), []
        for network in settings.networks:
            data = network.load(data_dir, seed)
            for number in range(seed, seed + settings.seeds):
                name = f"{self.name}-{scale}-{network.data}-{network.model}-seed{number}"
                used = {**asdict(settings), "networks": asdict(network), "seeds": number, "data_hash": data.fingerprint}
                part = self.part(settings, network, data, number, folder / name, device, progress)
                about = {"data": network.data, "model": network.model, "seed": number}
                runs.append(about | finished_or_run(folder / f"{name}.json", used, part.result))
        command = f"torchslice bench {self.name} --scale {scale} --seed {seed}"
        result = {"manifest": manifest(command, asdict(settings)), "runs": runs}
        path = folder / f"{self.name}-{scale}"
        return write_result(path, result, self.page(result, path))


def check_scale(scale: str) -> None:
    """Raise for a scale that does not exist."""
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)


def manifest(command: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what is needed to repeat a run: command, settings, versions, and processor."""
    return {
        "command": command,
        "settings": settings,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def machine(about: Mapping[str, Any]) -> str:
    """Write where and with what a run was made."""
    accelerator = about["accelerator"] or "none"
    return f"{about['processor']}, accelerator {accelerator}, torch {about['torch']}, Python {about['python']}"


def by_network(runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of every network, by "MODEL on DATA"."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        found.setdefault(f"{run['model']} on {run['data']}", []).append(run)
    return found


def spent(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds of a training from its rows."""
    return sum(row["seconds"] for row in rows)


def note(text: str, progress: bool) -> None:
    """Say on standard error what is being done."""
    if progress:
        print(text, file=sys.stderr, flush=True)


def finished_or_run(path: Path, settings: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result stored at `path` if it was made with these settings; else run, store and return it.

    So an interrupted bench goes on where it stopped. A result of other settings is refused rather than overwritten.
    """
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        try:
            stored = json.loads(path.read_text())
            before, result = stored["settings"], stored["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise TorchsliceError(
                f"{path} is no finished part of this bench; remove it or choose another --out."
            ) from error
        if before != settings:
            raise TorchsliceError(f"{path} was made with other settings; remove it or choose another --out.")
        return result
    result = json.loads(json.dumps(run()))  # the same first and later: JSON has no integer keys
    atomic_write(path, json.dumps({"settings": settings, "result": result}, indent=1))
    return result


def write_result(path: Path, result: dict[str, Any], page: str) -> dict[str, Any]:
    """Write a finished bench as PATH.json and PATH.md and return its result."""
    atomic_write(path.with_name(f"{path.name}.json"), json.dumps(result, indent=1))
    atomic_write(path.with_name(f"{path.name}.md"), page)
    return result


def spread(values: Sequence[float | None], *, percent: bool = True, digits: int = 1) -> str:
    """Write a mean and, from two values on, its standard deviation: "81.3 ± 0.4"."""
    known = [v * (100 if percent else 1) for v in values if v is not None]
    if not known:
        return "-"
    text = f"{statistics.fmean(known):z.{digits}f}"
    return text if len(known) == 1 else f"{text} ± {statistics.stdev(known):.{digits}f}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table; the first column is text, the others are numbers."""
    lines = [list(headings), ["---"] + ["---:"] * (len(headings) - 1), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
