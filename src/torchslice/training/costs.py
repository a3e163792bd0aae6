"""What a network costs: parameters, multiply-accumulates and measured latency.

Shapes: B batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..errors import TorchsliceError
from ..graph.record import evaluating
from ..inputs import Inputs, batch_size, call_model, device_of, take, to_device


@dataclass(frozen=True)
class Cost:
    """Size of a network: its parameters, and the multiply-accumulates of one sample."""

    parameters: int
    macs: int

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters, {self.macs:,} MACs per sample"


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass over a batch: median and quartiles, in milliseconds, over `repeats` measurements."""

    batch_size: int
    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    repeats: int

    def __str__(self) -> str:
        spread = f"{self.lower_quartile_ms:.2f} to {self.upper_quartile_ms:.2f}"
        return f"{self.median_ms:.2f} ms ({spread}) at batch {self.batch_size}"


def cost(model: nn.Module, example: Inputs) -> Cost:
    """Count parameters (a shared one once) and the MACs that one sample of `example` [B, ...] takes.

    Counted are the convolutions and matrix products, attention included, as the flop counter of PyTorch sees them;
    norms, activations and additions are left out.

    >>> print(cost(nn.Linear(8, 4), torch.zeros(2, 8)))
    36 parameters, 32 MACs per sample
    """
    sample = to_device(take(example, slice(0, 1)), device_of(model))
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused attention kernels are invisible to the flop counter
    try:
        with evaluating(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call_model(model, sample)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


def latency_ms(
    models: Mapping[str, nn.Module],
    example: Inputs,
    *,
    batch_sizes: Sequence[int] = (1, 64),
    repeats: int = 21,
    warm_up: int = 3,
) -> dict[str, dict[int, Latency]]:
    """Measure the forward pass of several models side by side, each in eval mode on the device it is on.

    The models take turns, in alternating order, so that a drift of the machine's speed meets all of them alike.

    Args:
        models: name -> model.
        example: [B, ...]; its samples are repeated to fill a batch.
        batch_sizes: batches to measure.
        repeats: measurements per model and batch size.
        warm_up: rounds that are run first and not counted.

    Returns:
        name -> batch size -> Latency.

    >>> times = latency_ms({"full": model, "part": small}, task.example, batch_sizes=(1,), repeats=3)
    >>> times["part"][1].median_ms > 0
    True
    """
    if repeats < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise TorchsliceError(
            f"latency needs repeats >= 1 and batch sizes >= 1, got repeats={repeats}, batch_sizes={tuple(batch_sizes)}."
        )
    result: dict[str, dict[int, Latency]] = {name: {} for name in models}
    for size in batch_sizes:
        batch = take(example, torch.arange(size) % batch_size(example))
        inputs = {name: to_device(batch, device_of(model)) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        order = list(models)
        for turn in range(warm_up + repeats):
            for name in order:
                with evaluating(models[name]):
                    elapsed = _forward_ms(models[name], inputs[name])
                if turn >= warm_up:
                    times[name].append(elapsed)
            order.reverse()
        for name, measured in times.items():
            result[name][size] = _summary(size, measured)
    return result


def latency(
    model: nn.Module, example: Inputs, *, batch_sizes: Sequence[int] = (1, 64), repeats: int = 21, warm_up: int = 3
) -> dict[int, Latency]:
    """Measure one model alone, batch size -> Latency; compare models with `latency_ms` instead, in one run."""
    return latency_ms({"model": model}, example, batch_sizes=batch_sizes, repeats=repeats, warm_up=warm_up)["model"]


def _forward_ms(model: nn.Module, inputs: Inputs) -> float:
    """Time one forward pass; on CUDA from an idle device to an idle device."""
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call_model(model, inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def _summary(batch_size: int, measured: list[float]) -> Latency:
    """Return median and quartiles of the times in `measured`."""
    one = len(measured) == 1
    lower, median, upper = measured * 3 if one else statistics.quantiles(measured, n=4, method="inclusive")
    return Latency(batch_size, median, lower, upper, len(measured))
