"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import TorchsliceError


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def part(self, rows: Tensor) -> Tensor:
        """Return this process's share of `rows` [n, ...], contiguous and at most one longer than that of another."""
        return rows.tensor_split(self.count)[self.rank]

    def owns(self, labels: Any) -> Any:
        """Whether this process is the one for a class, a label or a tensor of them, where classes are shared out."""
        return labels % self.count == self.rank

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the processes, without gradient, and return it."""
        if self.count > 1:
            with _exchanging():
                dist.all_reduce(tensor)
        return tensor

    def gathered(self, own: Tensor, count: int) -> Tensor:
        """Return `count` rows, [count, ...], of which `own` are those of this process's part, in all processes."""
        whole = own.new_zeros(count, *own.shape[1:])
        self.part(whole).copy_(own)
        return self.sum(whole)

    def average_gradients(self, model: nn.Module) -> None:
        """Replace the gradients of a model by their means over the processes, which all have those of the same ones."""
        if self.count > 1:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            means = self.sum(torch.cat([gradient.flatten() for gradient in gradients])) / self.count
            for gradient, mean in zip(gradients, means.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the first process."""
        if self.count > 1:
            with _exchanging():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)


def is_first() -> bool:
    """Whether this process is the one that writes files, also where it is not connected with the others yet."""
    return os.environ.get("RANK", "0") == "0"


def is_connected() -> bool:
    """Whether this process is connected with others, so that an error may be its own."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def _exchanging() -> Iterator[None]:
    """Say it in one line where an exchange fails because another process is not there any more."""
    try:
        yield
    except RuntimeError as error:
        raise TorchsliceError(
            "another process of this run has ended, so this one ends too; once its reason is mended, start all of them "
            "again."
        ) from error


def current_ranks(device: torch.device) -> Ranks:
    """Return the processes of this run; under torchrun, connect them if the user has not done it.

    NCCL connects GPUs, gloo CPUs. The connection stays open until the process ends.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_available() or (count == 1 and not dist.is_initialized()):
        return Ranks()
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (ValueError, RuntimeError) as error:
            raise TorchsliceError(
                f"WORLD_SIZE is {count}, but the processes cannot be connected ({error}). "
                "Start them with torchrun, or unset WORLD_SIZE."
            ) from error
        atexit.register(_disconnect)
    return Ranks(dist.get_rank(), dist.get_world_size())


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        with _exchanging():
            dist.all_reduce(total := tensor.clone())
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * dist.get_world_size()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum a tensor over the processes, for a loss over the global batch that every process computes alike.

    The gradient that reaches a process is that of the loss times the number of processes, because `fit` then averages
    the gradients of the parameters. A single process gets `tensor` back.

    >>> sum_over_ranks(torch.ones(2))
    tensor([1., 1.])
    """
    return _Sum.apply(tensor) if is_connected() else tensor
