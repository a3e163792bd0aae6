"""What a row says by hand: outcomes, limits of time, and which networks take part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import conformance
from benchmarks.conformance import SETTINGS, Measuring, Member, difference, families, make, prune, theirs
from benchmarks.tests.nets import Tiny


def side(which: str, seconds: int = 60) -> dict[str, Any]:
    network, settings = Member("timm", "resnet10t", "resnet"), conformance.replace(SETTINGS["smoke"], seconds=seconds)
    return Measuring(settings, network, None, 0, Path(), "cpu", progress=False).side(which)  # type: ignore[arg-type]


def test_a_network_that_hangs_costs_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(*batches: Any) -> Iterator[dict[str, Any]]:
        yield {"outcome": "out of time", "parameters": 7}
        while True:
            pass

    monkeypatch.setattr(conformance, "ours", hangs)
    assert side("ours", seconds=1) == {"outcome": "out of time", "parameters": 7}


def test_what_goes_wrong_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (example, unseen) = make("timm", "resnet10t")

    def fails(*arguments: Any) -> None:
        raise KeyError("oh")

    monkeypatch.setattr(conformance.ts, "extract", fails)
    *_, row = conformance.ours(model, example, unseen)
    assert (row["outcome"], row["reason"]) == ("crash", "KeyError: 'oh'")
    monkeypatch.setattr(conformance.ts, "extract", lambda neurons, slice_: nn.Sequential(neurons.model, nn.Hardtanh()))
    *_, row = conformance.ours(model, example, unseen)
    assert row["outcome"] == "inexact" and row["difference"] > 0.01
    *_, row = conformance.ours(nn.Flatten(), example, unseen)
    assert row["outcome"] == "refused" and "no neuron" in row["reason"]
    monkeypatch.setattr(conformance, "prune", fails)
    *_, row = theirs(model, example, unseen, 1)
    assert row == {"tp_outcome": "fails", "tp_reason": "KeyError: 'oh'"}


def test_nothing_of_a_network_is_constant() -> None:
    model, (one, other) = make("torchvision", "squeezenet1_1")
    assert all(p.unique().numel() > 1 for p in model.parameters()) and not torch.equal(one, other)
    assert difference(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 4.0])) == 0.25


def test_outputs_that_torch_pruning_removed() -> None:
    model = Tiny().eval()
    small, removed = prune(model, torch.zeros(2, 1, 8, 8))
    for name, gone in removed.items():
        bias = model.get_submodule(name).bias
        assert 0 < int(gone.sum()) < len(gone) and torch.equal(small.get_submodule(name).bias, bias[~gone])
    assert removed.keys() == {"conv1", "norm1", "conv2", "norm2"}


def test_families_of_torchvision() -> None:
    members = families("torchvision", 60_000_000)["members"]
    assert {"data": "torchvision", "model": "resnet18", "family": "resnet"} in members
    assert "alexnet" not in {member["family"] for member in members}  # its 61 million are above
    assert len(families("transformers", 0)["members"]) == 10
