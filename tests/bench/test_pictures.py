"""Curves of benches."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchslice.bench.pictures import draw, interpolated
from torchslice.errors import TorchsliceError

AXES = {"x": "share", "y": "accuracy", "title": "Curves"}
PANEL = {"ours": [[(0.0, 0.9), (1.0, 0.1)], [(0.1, 0.8), (0.9, 0.2)]], "control: random": [[(0.0, 0.5), (1.0, 0.1)]]}


def test_interpolation_ends_with_the_curve() -> None:
    curve = [(0.4, 0.2), (0.0, 1.0)]
    assert interpolated(curve, 0.1) == pytest.approx(0.8) and interpolated(curve, 0.41) is None
    assert interpolated(curve, 0.0) == 1.0 and interpolated(curve[:1], 0.4) == 0.2


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("log_x", [False, True])
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

    monkeypatch.setattr("torchslice.bench.pictures.import_optional", absent)
    text = draw(tmp_path / "x.png", {"one": PANEL}, **AXES)
    assert "No curves are drawn: matplotlib is not installed" in text and not list(tmp_path.iterdir())
    assert "no curves are drawn: this needs matplotlib.figure: torchslice[dev]" in capsys.readouterr().err
