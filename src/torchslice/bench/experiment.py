"""What every bench shares: its scales, its manifest, finished parts on disk, and means with their spread."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data import Data
from ..errors import TorchsliceError
from ..files import atomic_write
from ..registry import Registry, unknown

SCALES = ("smoke", "cpu", "paper")
#: name -> function (scale, *, data_dir, out, seed, device, progress) -> plain data; it writes out/NAME.json and .md
BENCHES: Registry[Callable[..., dict[str, Any]]] = Registry("bench")


def check_scale(scale: str) -> None:
    """Raise for a scale that does not exist."""
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)


def manifest(command: str, settings: dict[str, Any], data: Data | None = None) -> dict[str, Any]:
    """Return what is needed to repeat a run: command, settings, versions, processor, and a hash of the data."""
    return {
        "command": command,
        "settings": settings,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "data": None if data is None else f"{data!r} {data.fingerprint}",
    }


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
