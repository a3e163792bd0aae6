"""torchslice demo."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ..demo import run_demo
from ..training.placement import choose_device
from . import common


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder for the run and the sub-models (default: a new one).", show_default=False
        ),
    ] = None,
    seed: common.Seed = 0,
    device: common.DeviceOption = "auto",
    as_json: common.Json = False,
) -> None:
    """Show the whole story on the built-in digits: train, slice, cut sub-models out, save and load one.

    Example:  torchslice demo --out digits-demo
    """
    choose_device(device)
    if out is not None:
        common.check_folder(out / "run" / "run.json")
    folder = Path(tempfile.mkdtemp(prefix="torchslice-demo-")) if out is None else out
    result = run_demo(folder, seed=seed, device=device, say=(lambda text: None) if as_json else print)
    if as_json:
        common.emit(result, "", as_json=True)
