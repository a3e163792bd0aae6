"""torchslice export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..artefact import export as export_network
from ..artefact.export import FORMATS
from ..maintain import Extended
from ..runs.source import Opening
from . import common
from .options import Part

COMPARED = 64  # samples at most


def export(
    source: common.SourceName,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write, such as part.onnx.")],
    data: common.SourceData = None,
    format: Annotated[
        str | None, typer.Option(help="onnx or pt2 (default: what FILE ends with).", show_default=False)
    ] = None,
    opening: Annotated[Opening, Part(skip=("slices",))] = Opening(),
    seed: common.Seed = 0,
) -> common.Shown:
    """Write a network as a program for ONNX Runtime or torch.export, compared on validation samples first.

    Example:  torchslice export pets.safetensors cifar10 --data-dir data --out pets.onnx
    """
    _ = FORMATS[format or out.suffix.lstrip(".")]  # says which there are
    opened = opening.open(source, data, seed=seed, device="cpu")
    task, model = opened.task, opened.model
    if opened.extension is not None:
        model = Extended.of(opened.neurons(), opened.extension).joined()
    samples = next(iter(task.batches("validation", COMPARED)))[0]
    made = export_network(
        model, out, samples=samples, format=format, classes=task.classes, preprocessing=task.preprocessing
    )
    result = {**asdict(made), "path": str(out), "classes": task.classes}
    return result, str(made)
