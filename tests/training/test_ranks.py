"""Two processes train exactly what one does, with gradients through the sums they exchange."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.data.test_samples import Squares
from tests.nets import state, tiny_net, tiny_task
from torchslice.data import Samples
from torchslice.data import task as make_task
from torchslice.errors import TorchsliceError
from torchslice.training import Training, fit
from torchslice.training.ranks import Ranks, current_ranks, sum_over_ranks

TRAINING = Training(epochs=2, batch_size=8, device="cpu", precision="fp32", progress=False)
KINDS = ("best", "files")


class Square(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = torch.nn.Linear(1, 8), torch.nn.Linear(8, 3)

    def forward(self, number, square):
        return self.head(torch.tanh(self.hidden(square / 500)))


def train_all(folder: Path | None) -> dict[str, dict]:
    """Train networks in two ways, in however many processes there are; `benchmarks.ranks` does so with all verbs."""
    networks, rows = {"best": tiny_net(norm=False), "files": Square()}, {}
    adamw = replace(TRAINING, optimizer="adamw", learning_rate=0.01)
    rows["best"] = fit(networks["best"], tiny_task(25), adamw, keep="best", folder=folder)
    files = Samples(Squares(36), torch.arange(36), torch.arange(36) % 3, workers=1)
    rows["files"] = fit(networks["files"], make_task(files, validation_fraction=0.2), TRAINING)
    return {**{kind: state(networks[kind]) for kind in KINDS}, "rows": rows}


def worker(rank: int, folder: str) -> None:
    """Be one of two processes, as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x = torch.tensor([1.0 + rank], requires_grad=True)  # x0 = 1, x1 = 2
    (sum_over_ranks(x) ** 2).sum().backward()
    ranks = current_ranks(torch.device("cpu"))
    exchanged = {"rank": ranks.rank, "gradient": x.grad, "total": ranks.sum(x.detach().clone())}
    gathered = ranks.gathered(ranks.part(torch.arange(5)), 5)
    torch.save({**train_all(Path(folder, "run")), **exchanged, "gathered": gathered}, f"{folder}/{rank}.pt")
    elsewhere = Path(folder, "run" if rank == 0 else "not shared")
    with pytest.raises(TorchsliceError, match="the processes find different states in .*; name a folder that all"):
        adamw = replace(TRAINING, optimizer="adamw", learning_rate=0.01, epochs=3)
        fit(tiny_net(norm=False), tiny_task(25), adamw, keep="best", folder=elsewhere)
    dist.barrier()  # neither leaves while the other still listens to it
    dist.destroy_process_group()


def test_two_processes_train_and_find_exactly_what_one_does(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    one, wrong = train_all(None), []
    for kind in KINDS:
        start = state(Square() if kind == "files" else tiny_net(norm=False))
        assert not all(torch.allclose(one[kind][name], tensor, atol=1e-4) for name, tensor in start.items()), kind
        for name, tensor in one[kind].items():
            assert torch.equal(first[kind][name], second[kind][name]), f"{kind} {name}"
            if not torch.allclose(first[kind][name], tensor, rtol=1e-4, atol=1e-5):
                wrong.append(f"{kind} {name}")
        for row, expected in zip(first["rows"][kind], one["rows"][kind], strict=True):
            assert row.keys() == expected.keys()
            wrong += [
                f"{kind}: {k} {row[k]}, alone {v}"
                for k, v in expected.items()
                if k != "seconds" and row[k] != pytest.approx(v, rel=1e-4)
            ]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "best.safetensors",
        "checkpoint.safetensors",
        "metrics.jsonl",
    ]
    # loss = (x0 + x1)^2 = 9; d loss / d x = 2 * 3, times 2 processes
    for rank, result in enumerate((first, second)):
        assert (result["rank"], result["total"].item(), result["gradient"].item()) == (rank, 3, 12)
        assert result["gathered"].tolist() == [0, 1, 2, 3, 4]
    assert not wrong, wrong


def test_a_single_process_exchanges_nothing():
    x = torch.ones(2)
    assert sum_over_ranks(x) is x and Ranks().sum(x) is x
    assert current_ranks(torch.device("cpu")) == Ranks(0, 1)
    assert Ranks(1, 3).part(torch.arange(7)).tolist() == [3, 4]
    assert Ranks(1, 3).owns(torch.arange(7)).tolist() == [False, True, False, False, True, False, False]
    assert Ranks().gathered(x.detach(), 2).tolist() == [1, 1]


def test_an_exchange_with_a_process_that_ended_is_one_line(monkeypatch):
    def gone(tensor):
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(dist, "all_reduce", gone)
    with pytest.raises(TorchsliceError, match="another process of this run has ended, so this one ends too; .*again"):
        Ranks(0, 2).sum(torch.ones(1))


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
        fit(Wrapper(), tiny_task(), TRAINING)
