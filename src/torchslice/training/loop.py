"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn

from ..errors import TorchsliceError
from .batches import Batches, epoch_seed
from .objectives import Drawn, Objective, checked
from .placement import Placement, in_format
from .progress import Advance, RunningMeans
from .settings import Training

SHOW_EVERY = 20  # steps between two looks at the losses, each of which waits for the device
EXPLODED = 1e4  # a mean loss so many times the first one, or 1, is as lost as one that is not finite


def train_epochs(
    network: nn.Module,
    batches: Batches,
    objective: Objective | Drawn,
    optimizer: torch.optim.Optimizer,
    training: Training,
    *,
    placement: Placement,
    memory_format: torch.memory_format,
    done: int,
    rate: Callable[[int], float],
    bar: Advance,
) -> Iterator[dict[str, Any]]:
    """Train from after epoch `done` to the last epoch and yield a row of figures after each.

    `rate` gives the learning rate of a step, counted from 0 over all epochs.
    """
    ranks, step, first_loss = batches.ranks, done * len(batches), None
    for epoch in range(done + 1, training.epochs + 1):
        started, means, first_rate = time.perf_counter(), RunningMeans(), rate(step)
        torch.manual_seed(epoch_seed(training.seed, epoch, ranks.rank))  # dropout
        network.train()
        for number, (inputs, labels, drawn) in enumerate(batches.epoch(epoch), start=1):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            inputs = in_format(inputs, memory_format)
            with placement.autocast():
                loss, correct, parts = checked((drawn or cast(Objective, objective))(network, inputs, labels))
            optimizer.zero_grad()
            loss.backward()
            ranks.average_gradients(network)
            optimizer.step()
            step += 1
            means.add(len(correct), loss=loss, **parts, train_accuracy=correct.double().mean())
            first_loss = abs(loss.item()) if first_loss is None else first_loss
            look = number % SHOW_EVERY == 0 or number == len(batches)
            bar(f"epoch {epoch}/{training.epochs}", _losses(means, epoch, training, first_loss) if look else "")
        seconds = time.perf_counter() - started
        yield {"epoch": epoch, "learning_rate": first_rate, **means.read(ranks), "steps": step, "seconds": seconds}


def _losses(means: RunningMeans, epoch: int, training: Training, first_loss: float) -> str:
    values = means.read()
    loss = values["loss"]
    if not abs(loss) <= EXPLODED * max(1.0, first_loss):
        how = f"grew from {first_loss:.3g} to {loss:.3g}" if math.isfinite(loss) else "is no longer finite"
        raise TorchsliceError(
            f"the loss {how} in epoch {epoch}. Lower learning_rate (now {training.learning_rate:g}) or the weights of "
            "the objective, or use precision fp32; finished epochs stay in the folder, if one was given."
        )
    return "  ".join(f"{name} {value:.3f}" for name, value in values.items() if "accuracy" not in name)
