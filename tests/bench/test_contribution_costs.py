"""What contributions cost: rows for what cannot be measured, and what memory is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchslice.bench import contribution_costs
from torchslice.bench.ratios import cells
from torchslice.errors import TorchsliceError


def test_what_cannot_be_compared_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(module: str, *, extra: str) -> None:
        raise TorchsliceError("this needs captum, which is not installed.")

    monkeypatch.setattr(contribution_costs, "import_optional", absent)
    (row,) = contribution_costs.captum_rows(10, 0.125, "cpu")
    assert cells(row)[1:3] == ["captum: this needs captum, which is not installed.", "-"]
    monkeypatch.setattr(contribution_costs, "STATUS", tmp_path / "nowhere")
    (row,) = contribution_costs.memory_rows(10, 0.125, "cpu")
    assert "not measured" in cells(row)[1] and row["ratio"] is None


def test_memory_is_that_of_this_process() -> None:
    place = torch.device("cpu")
    before, _ = contribution_costs.memory_mib(place)
    ballast = torch.ones(512 * 2**18)  # 512 MiB
    now, peak = contribution_costs.memory_mib(place)
    assert 400 < now - before < 600 and peak >= now and len(ballast)
