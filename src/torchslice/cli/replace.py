"""torchslice replace."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import maintain
from ..artefact import load, save
from ..errors import TorchsliceError
from ..runs.source import Opening
from . import common
from .options import Part


def replace(
    source: common.SourceName,
    part: Annotated[
        list[str], typer.Option(metavar="CLASS=FILE", help="Saved network that knows this class better; repeatable.")
    ],
    out: common.Out,
    data: common.SourceData = None,
    opening: Annotated[Opening, Part(skip=("slices",))] = Opening(),
    renormalise: common.Renormalise = False,
    seed: common.Seed = 0,
    device: common.DeviceOption = "auto",
) -> common.Shown:
    """Let parts of other networks answer for classes that a network is weak at; its other logits stay.

    Accuracies printed here are on validation samples; torchslice evaluate looks at the test samples.

    Example:  torchslice replace runs/r20 --part cat=cat.safetensors --out better.safetensors
    """
    files = dict(text.rpartition("=")[::2] for text in part)
    if "" in files or len(files) < len(part):
        raise TorchsliceError(f"part={' '.join(part)!r} must be CLASS=FILE, once for every class.")
    loaded = {file: load(file, allow_import=opening.allow_import) for file in {*files.values()}}
    opened = opening.open(source, data, seed=seed, device=device)
    made = maintain.replace(
        opened.neurons(), {name: loaded[file] for name, file in files.items()}, opened.task, renormalise=renormalise
    )
    save(made, out)
    result = {"artefact": str(out), "replaced": [*files], **made.metrics}
    return result, f"{made}\n{common.next_evaluate(out, opened, opened.data)}"
