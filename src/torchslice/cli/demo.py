"""torchslice demo."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .common import Device, DeviceOption, Json, Seed, check_writable, emit


def demo(
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the run and the sub-models (default: a new one).")
    ] = None,
    seed: Seed = 0,
    device: DeviceOption = Device.auto,
    as_json: Json = False,
) -> None:
    """Show the whole story on the built-in digits: train, slice, cut out three sub-models, save and load one.

    Example:  torchslice demo --out digits-demo
    """
    if out is not None:
        check_writable(out / "run" / "run.json")
    from ..demo import run_demo

    folder = Path(tempfile.mkdtemp(prefix="torchslice-demo-")) if out is None else out
    result = run_demo(folder, seed=seed, device=device.value, say=(lambda text: None) if as_json else print)
    if as_json:
        emit(result, "", as_json=True)
