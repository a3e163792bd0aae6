"""torchslice store add, list, search, show, verify, remove, push, pull."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..artefact import Entry, Store, hub, read_record
from ..errors import TorchsliceError
from ..tables import table
from . import common
from .options import with_options

Folder = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of artefacts; add and pull make it.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Of an artefact in the store.")]
Repo = Annotated[str, typer.Argument(metavar="USER/REPOSITORY", help="On the Hugging Face Hub.")]

app = typer.Typer(help="Keep artefacts in a folder, find them by class, accuracy and size, share them on the Hub.")


def shown(folder: Path, entries: Sequence[Entry]) -> common.Shown:
    """Return entries as plain data and as a table."""
    headings = ("name", "bytes", "parameters", "accuracy", "classes")
    result = {"store": str(folder), "artefacts": [asdict(entry) for entry in entries]}
    return result, table(headings, [entry.row for entry in entries])


def existing(folder: Path) -> Store:
    """Return a store that is there."""
    if not folder.exists():
        raise TorchsliceError(f"there is no store {folder}; make it with: torchslice store add {folder} FILE")
    return Store(folder)


def add(
    folder: Folder,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Artefacts, which keep their names.")],
    force: common.Force = False,
) -> common.Shown:
    """Copy artefacts into the store, after their hashes were checked.

    Example:  torchslice store add parts pets.safetensors
    """
    store = Store(folder)
    return shown(folder, [store.add(file, overwrite=force) for file in files])


def list_(folder: Folder) -> common.Shown:
    """List the artefacts of a store, and files in it that cannot be used, with the reason.

    Example:  torchslice store list parts
    """
    return shown(folder, existing(folder).entries())


def search(
    folder: Folder,
    classes: Annotated[str, typer.Option(metavar="A,B,...", help="Classes that it must know, all of them.")] = "",
    min_accuracy: Annotated[float | None, typer.Option(min=0, max=1, help="As saved with it, in [0, 1].")] = None,
    max_parameters: Annotated[int | None, typer.Option(min=0, help="Number of parameters at most.")] = None,
) -> common.Shown:
    """Find artefacts by class, accuracy and size; the smallest comes first.

    Example:  torchslice store search parts --classes cat,dog --min-accuracy 0.9
    """
    wanted = common.names(classes)
    found = existing(folder).search(classes=wanted, min_accuracy=min_accuracy, max_parameters=max_parameters)
    return shown(folder, found)


def show(folder: Folder, name: Name) -> common.Shown:
    """Show all that an artefact says of itself; as text, its model card.

    Example:  torchslice store show parts pets
    """
    record = read_record(existing(folder).path(name))
    return record, hub.card(record, f'Store("{folder}").path("{name}")').rstrip()


def verify(folder: Folder, as_json: common.Json = False) -> None:
    """Read every file whole and compare it with its hash; exit with 2 if one cannot be used.

    Example:  torchslice store verify parts
    """
    found = existing(folder).verify()
    common.emit(*shown(folder, found), as_json=as_json)
    if damaged := [entry.name for entry in found if entry.problem]:
        raise TorchsliceError(f"{len(damaged)} of {len(found)} files cannot be used: {', '.join(damaged[:10])}.")


def remove(folder: Folder, name: Name) -> common.Shown:
    """Delete an artefact from the store.

    Example:  torchslice store remove parts pets
    """
    existing(folder).remove(name)
    return {"store": str(folder), "removed": name}, f"removed: {name}"


def push(
    folder: Folder,
    name: Name,
    repo: Repo,
    public: Annotated[bool, typer.Option("--public", help="Let anybody read a repository that is made now.")] = False,
) -> common.Shown:
    """Upload an artefact with a model card to the Hugging Face Hub.

    Example:  torchslice store push parts pets me/pets
    """
    address = hub.push(existing(folder).path(name), repo, private=not public)
    return {"store": str(folder), "name": name, "address": address}, address


def pull(folder: Folder, repo: Repo, name: Name, force: common.Force = False) -> common.Shown:
    """Download an artefact from the Hugging Face Hub into the store.

    Example:  torchslice store pull parts me/pets pets
    """
    return shown(folder, [Store(folder).add(hub.pull(repo), name=name, overwrite=force)])


for _command in (add, list_, search, show, verify, remove, push, pull):
    app.command(_command.__name__.rstrip("_"))(with_options(_command))
