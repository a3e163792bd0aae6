"""Quiet and repeatable tests that leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test in an empty folder, from the same random state."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
