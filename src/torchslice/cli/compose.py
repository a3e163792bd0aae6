"""torchslice compose."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Annotated

import typer

from .. import maintain
from ..artefact import load, save
from ..data import joined
from ..errors import TorchsliceError
from ..runs.source import Opening
from . import common
from .options import Part


def compose(
    file: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files that torchslice saved, at least two.")],
    data: Annotated[
        list[str], typer.Option(metavar="DATA", help=f"{common.DATA}; once for every FILE, in their order.")
    ],
    out: common.Out,
    opening: Annotated[Opening, Part(only=("data_option", "data_dir", "allow_import"))] = Opening(),
    renormalise: common.Renormalise = False,
    seed: common.Seed = 0,
) -> common.Shown:
    """Make one classifier of parts with different classes: of any parents, architectures and data sets.

    Its inputs are prepared as those of the first. Accuracies printed here are on validation samples.

    Example:  torchslice compose a.safetensors b.safetensors --data mnist --data fashion-mnist --out c.safetensors
    """
    if len(data) != len(file):
        raise TorchsliceError(
            f"{len(file)} files need as many data sets, each with the classes of its file; got {len(data)}."
        )
    parts, tasks = [load(path, allow_import=opening.allow_import) for path in file], []
    for path, part, name in zip(file, parts, data, strict=True):
        if part.classes is None:
            raise TorchsliceError(f"{path} does not name its classes; save it with them.")
        tasks.append(opening.load(name, seed=seed).restrict(part.classes).like(parts[0].preprocessing))
    made = maintain.compose(parts, reduce(joined, tasks), renormalise=renormalise)
    save(made, out)
    return {"artefact": str(out), "classes": made.classes, **made.metrics}, str(made)
