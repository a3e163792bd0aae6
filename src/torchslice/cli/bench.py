"""torchslice bench."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .common import DataDir, Device, DeviceOption, Json, Seed, check_writable, emit, say


class Scale(StrEnum):
    """How much work a bench does."""

    smoke = "smoke"
    cpu = "cpu"
    paper = "paper"


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which bench, such as mwt or speed.")],
    scale: Annotated[
        Scale, typer.Option(help="smoke: minutes, to see that it runs; cpu: two cores; paper: needs a GPU.")
    ] = Scale.cpu,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the tables and the runs behind them.")] = (
        Path("results")
    ),
    data_dir: DataDir = None,
    seed: Seed = 0,
    device: DeviceOption = Device.auto,
    as_json: Json = False,
) -> None:
    """Reproduce a table of measurements.

    Example:  torchslice bench mwt --scale cpu --data-dir data --out results
    """
    check_writable(out / f"{name}.json")
    from ..bench import BENCHES

    run = BENCHES[name]
    say(f"bench {name} at scale {scale.value}; result in {out}")
    result = run(scale.value, data_dir=data_dir, out=out, seed=seed, device=device.value, progress=True)
    emit(result, (out / f"{name}-{scale.value}.md").read_text(), as_json=as_json)
