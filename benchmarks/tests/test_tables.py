"""Tables and curves, and the committed pages, which are made from the committed results."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.experiment import read_result
from benchmarks.tables import deviation, draw, figure, found, markdown, spread, table
from torchslice import TorchsliceError

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
AXES: dict[str, Any] = {"x": "fraction", "y": "accuracy", "title": "Curves"}
PANEL = {"ours": [[(0.0, 0.9), (1.0, 0.1)], [(0.1, 0.8), (0.9, 0.2)]], "control: random": [[(0.0, 0.5), (1.0, 0.1)]]}


def test_means_and_their_spread() -> None:
    assert spread([0.5]) == "50.0"
    assert spread([0.5, 0.7, None]) == "60.0 ± 14.1"
    assert spread([None]) == "-" and spread([-1e-9]) == "0.0"
    assert markdown(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_a_figure_is_found_by_the_row_and_the_column() -> None:
    rows = [("a", 2, 0.1), ("a", 2, 0.3), ("a", 5, 0.5), ("b", 2, None)]
    run = {"whole": 0.9, "rows": [{"arm": arm, "size": size, "value": value} for arm, size, value in rows]}
    figures = {"2": figure("rows", "value", size=2), "worst": figure("rows", "value", of=min, percent=False)}
    figures |= {"spread": figure("rows", "value", of=deviation, size=5), "whole": lambda runs, row: "x"}
    assert table([run], [("A", {"arm": "a"}), ("B", {"arm": "b"})], figures, corner="arm").splitlines()[2:] == [
        "| A | 20.0 | 0.1 | - | x |",
        "| B | - | - | - | x |",
    ]
    assert figure("", "whole")([run, {"whole": 0.7}], {}) == "80.0 ± 14.1"
    assert found(run["rows"], arm="a", size=5) == [run["rows"][2]]


@pytest.mark.parametrize(("count", "log_x"), [(1, False), (3, True)])
def test_a_picture_of_any_number_of_panels(tmp_path: Path, count: int, log_x: bool) -> None:
    shifted = {arm: [[(x + 1, y) for x, y in curve] for curve in curves] for arm, curves in PANEL.items()}
    text = draw(tmp_path / "x.png", {f"panel {n}": shifted for n in range(count)}, log_x=log_x, **AXES)
    assert text == "![Curves](x.png)" and [path.name for path in tmp_path.iterdir()] == ["x.png"]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(module: str, *, extra: str) -> None:
        raise TorchsliceError(f"this needs {module}: torchslice[{extra}]")

    monkeypatch.setattr(tables, "import_optional", absent)
    text = draw(tmp_path / "x.png", {"one": PANEL}, **AXES)
    assert "No curves are drawn: matplotlib is not installed" in text and not list(tmp_path.iterdir())
    assert "no curves are drawn: this needs matplotlib.figure: torchslice[dev]" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_committed_pages_follow_from_the_committed_results(file: Path, tmp_path: Path) -> None:
    name, _, scale = file.stem.partition("-")
    shutil.copy(file, tmp_path)
    importlib.import_module(f"benchmarks.{name}").BENCHMARK(scale, out=tmp_path, page_only=True)
    assert (tmp_path / f"{file.stem}.md").read_text() == file.with_suffix(".md").read_text()
    shown = f"({file.stem}.png)" in file.with_suffix(".md").read_text()
    assert shown == file.with_suffix(".png").is_file() == (tmp_path / f"{file.stem}.png").is_file()
    assert not shown or (tmp_path / f"{file.stem}.png").read_bytes().startswith(b"\x89PNG")
    assert len(file.read_text().splitlines()) == 2 + len(read_result(file)["runs"])
