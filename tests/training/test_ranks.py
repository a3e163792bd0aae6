"""Two processes train exactly what one does, with gradients through the sums they exchange."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tests.training.tiny import state, tiny_data, tiny_net
from torch.nn.parallel import DistributedDataParallel

from torchslice import modular
from torchslice.errors import TorchsliceError
from torchslice.training import fit
from torchslice.training.ranks import Ranks, current_ranks, sum_over_ranks

ARGUMENTS = {"batch_size": 8, "epochs": 2, "device": "cpu", "precision": "fp32", "progress": False}


def train_both(folder: Path | None) -> dict[str, dict]:
    """Train a plain and a modular network and find class slices, in however many processes there are."""
    data, plain, gated = (
        tiny_data(25),
        tiny_net(norm=False),
        modular.attach_gates(tiny_net(norm=False), tiny_data().example),
    )
    rows = fit(plain, data, folder=folder, **ARGUMENTS)
    modular_rows = fit(gated, data, objective=modular.objective(), **ARGUMENTS)
    slices = modular.class_slices(gated, data, device="cpu", progress=False)
    masks = {f"{label} {layer}": mask for label, part in slices.items() for layer, mask in part.masks.items()}
    return {"plain": state(plain), "gated": state(gated), "masks": masks, "rows": [*rows, *modular_rows]}


def worker(rank: int, folder: str) -> None:
    """Be one of two processes, as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x = torch.tensor([1.0 + rank], requires_grad=True)  # x0 = 1, x1 = 2
    (sum_over_ranks(x) ** 2).sum().backward()
    ranks = current_ranks(torch.device("cpu"))
    exchanged = {"rank": ranks.rank, "gradient": x.grad, "total": ranks.sum(x.detach().clone())}
    torch.save({**train_both(Path(folder, "run")), **exchanged}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)], folder


def test_the_processes_end_with_the_same_network(two):
    (first, second), folder = two
    for kind in ("plain", "gated", "masks"):
        for name in first[kind]:
            assert torch.equal(first[kind][name], second[kind][name]), name
    assert sorted(path.name for path in (folder / "run").iterdir()) == ["checkpoint.safetensors", "metrics.jsonl"]


def test_two_processes_train_what_one_does(two):
    (first, _), _ = two
    start, one = state(tiny_net(norm=False)), train_both(None)
    assert not torch.allclose(one["plain"]["0.weight"], start["0.weight"], atol=1e-3)  # it did train
    for kind in ("plain", "gated"):
        for name, tensor in one[kind].items():
            torch.testing.assert_close(first[kind][name], tensor, rtol=1e-4, atol=1e-5, msg=f"{kind} {name}")
    for name, mask in one["masks"].items():
        assert torch.equal(first["masks"][name], mask), name
    for row, expected in zip(first["rows"], one["rows"], strict=True):
        for key in set(expected) - {"seconds"}:
            assert row[key] == pytest.approx(expected[key], rel=1e-4), key


def test_sums_carry_the_gradient_that_averaging_needs(two):
    # loss = (x0 + x1)^2 = 9; d loss / d x = 2 * 3, times 2 processes
    for rank, result in enumerate(two[0]):
        assert result["rank"] == rank
        assert result["total"].item() == 3 and result["gradient"].item() == 12


def test_a_single_process_exchanges_nothing():
    x = torch.ones(2)
    assert sum_over_ranks(x) is x and Ranks().sum(x) is x
    assert current_ranks(torch.device("cpu")) == Ranks(0, 1)
    assert Ranks(1, 3).part(torch.arange(7)).tolist() == [3, 4]


def test_a_world_without_torchrun_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(TorchsliceError, match=r"WORLD_SIZE is 2.*Start them with torchrun"):
        current_ranks(torch.device("cpu"))


def test_distributed_wrappers_are_refused():
    class Wrapper(DistributedDataParallel):
        def __init__(self):
            torch.nn.Module.__init__(self)

    Wrapper.__name__ = "DistributedDataParallel"
    with pytest.raises(TorchsliceError, match=r"wrapped \(DistributedDataParallel\); pass model.module"):
        fit(Wrapper(), tiny_data(), **ARGUMENTS)
