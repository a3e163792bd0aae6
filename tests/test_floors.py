"""A file imports only from lower floors or its own room, so that each can be read without those above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import torchslice

ROOT = Path(torchslice.__file__).parent
GROUND = (
    "errors",
    "registry",
    "slices",
    "rankings",
    "files",
    "imports",
    "tables",
    "inputs",
)  # each may use those before it
FLOORS = (
    GROUND,
    ("graph", "models", "data"),
    ("cut", "training"),
    ("budget", "reused"),
    ("find.gates", "find.semantic", "find.subtasks", "judge", "maintain", "artefact"),
    ("submodel", "show"),
    ("runs",),
    ("demo",),
    ("cli",),
)
BESIDE = {("maintain", "judge"), ("find.subtasks", "find.semantic")}  # the rooms that know a neighbour
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def room_of(module: str) -> str:
    """Return the room of a dotted name below the package; "" for the package itself and what only holds rooms."""
    parts = module.split(".")
    return next((room for room in (".".join(parts[:2]), parts[0]) if room in FLOOR), "")


def imported(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Yield the dotted names below torchslice that a source text imports anywhere; `package` is what holds it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            modules = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (module.removeprefix("torchslice.") for module in modules if module.startswith("torchslice."))


def allowed(room: str, other: str) -> bool:
    """Whether a file of one room may import from another."""
    if room in GROUND and other in GROUND:
        return GROUND.index(other) < GROUND.index(room)
    return room == other or (room, other) in BESIDE or FLOOR[other] < FLOOR[room]


def test_every_file_imports_from_lower_floors_or_its_own_room() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        room = room_of(".".join(parts))
        if not room:
            assert parts[-1] == "__init__", f"{'/'.join(parts)} has no floor yet: give it one in this test"
            continue
        for module in imported(path.read_text(), ("torchslice", *parts[:-1])):
            other = room_of(module)
            assert other, f"{'/'.join(parts)} imports {module}, which has no floor"
            if not allowed(room, other):
                wrong.append(f"{'/'.join(parts)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_finding_and_using_slices_know_nothing_of_each_other() -> None:
    finding, using = (room for room in FLOOR if room.startswith("find.")), ("judge", "maintain", "artefact")
    for one in finding:
        assert not [other for other in using if allowed(one, other) or allowed(other, one)]
    assert allowed("maintain", "judge") and not allowed("judge", "maintain") and not allowed("maintain", "artefact")


def test_imports_are_read_in_every_form() -> None:
    for source, modules in [
        ("from ...errors import TorchsliceError", ["errors.TorchsliceError"]),
        ("from .losses import a, b", ["find.gates.losses.a", "find.gates.losses.b"]),
        ("from .. import semantic", ["find.semantic"]),
        ("def f():\n    from torchslice.judge.stages import Stage", ["judge.stages.Stage"]),
        ("import torch, torchslice.cli as cli", ["cli"]),
        ("from torch import nn\nimport os.path", []),
    ]:
        assert list(imported(source, ("torchslice", "find", "gates"))) == modules
