"""torchslice slice."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from .common import DataDir, Device, DeviceOption, Json, RunFolder, Seed, check_writable, emit, say


class By(StrEnum):
    """What tells which neurons a class needs."""

    gates = "gates"


def slice(
    run: RunFolder,
    by: Annotated[By, typer.Option(help="What tells which neurons a class needs.")] = By.gates,
    threshold: Annotated[
        float, typer.Option(help="Keep neurons whose gates are on for this share of a class's training images.")
    ] = 0.9,
    data_dir: DataDir = None,
    seed: Seed = 0,
    device: DeviceOption = Device.auto,
    as_json: Json = False,
) -> None:
    """Find the slice of every class in a modular run; they are kept in RUN/slices.json.

    Example:  torchslice slice runs/r20 --by gates --threshold 0.9
    """
    from ..runs import Run

    opened = Run.open(run)
    check_writable(run / "slices.json")
    data = opened.load_data(data_dir)
    say(f"gates of {opened.recipe.model} on the {len(data.train):,} training images of {data.name}; result in {run}")
    found = opened.find_slices(data, threshold=threshold, device=device.value)
    result = {"run": str(run), "by": by.value, "threshold": threshold, "report": found.to_plain()}
    names = ",".join(data.classes[:2])
    next_step = f"Next:  torchslice extract {run} --classes {names} --out part.safetensors"
    emit(result, f"{found}\n{next_step}", as_json=as_json)
