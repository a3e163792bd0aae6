"""A file of the package imports only from lower floors, so that every part can be read without those above it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchslice

ROOT = Path(torchslice.__file__).parent
BASE = ("errors", "registry", "slices", "files", "imports", "vision", "tables")  # each may use those before it
FLOORS = (
    BASE,
    ("core", "data", "models"),
    ("training",),
    ("modular", "semantic", "use"),
    ("submodel",),
    ("runs",),
    ("bench", "demo"),
    ("cli",),
)
FLOOR = {part: number for number, floor in enumerate(FLOORS) for part in floor}
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT or not path.name.startswith("__")]


def part_of(path: Path) -> str:
    """Folder or file of the package that a source file belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported_parts(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Parts of torchslice that a source text imports anywhere; `package` is the one that holds it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = [*above, *(node.module.split(".") if node.module else [])]
            modules = [[*base, alias.name] for alias in node.names]
        else:
            continue
        yield from (module[1] for module in modules if module[0] == "torchslice" and len(module) > 1)


def allowed(part: str, imported: str) -> bool:
    """Whether a file of `part` may import from `imported`."""
    if part in BASE and imported in BASE:
        return BASE.index(imported) < BASE.index(part)
    return part == imported or FLOOR[imported] < FLOOR[part]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_from_lower_floors_only(path):
    package = ("torchslice", *path.relative_to(ROOT).parts[:-1])
    part = part_of(path)
    assert part in FLOOR, f"{part} has no floor yet: give it one in this test"
    wrong = [other for other in imported_parts(path.read_text(), package) if not allowed(part, other)]
    assert not wrong, f"{path.relative_to(ROOT)}, on floor {FLOOR[part]}, imports from {wrong}"


def test_finding_and_using_slices_know_nothing_of_each_other():
    parts = ("modular", "semantic", "use")
    assert not [(part, other) for part in parts for other in parts if part != other and allowed(part, other)]
    assert allowed("use", "core") and not allowed("core", "use") and not allowed("data", "models")


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("from ..errors import TorchsliceError", ["errors"]),
        ("from .splits import Data, Split", ["data", "data"]),
        ("from .. import core, training", ["core", "training"]),
        ("def f():\n    from torchslice.use.extract import extract", ["use"]),
        ("import torch, torchslice.cli as cli", ["cli"]),
        ("from torch import nn\nimport os.path", []),
    ],
)
def test_imports_are_read_in_every_form(source, parts):
    assert list(imported_parts(source, ("torchslice", "data"))) == parts
