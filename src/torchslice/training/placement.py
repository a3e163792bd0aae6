"""Where and how precisely a network runs."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TorchsliceError
from ..graph.record import evaluating
from ..graph.views import view_of
from ..inputs import Inputs, call_model, map_tensors, tensors, to_device
from ..registry import unknown
from .ranks import current_ranks
from .settings import PRECISIONS

WORTH_IT = 0.8  # of the time of fp32; bf16 that hardly gains any would change with the noise of a measurement


@dataclass(frozen=True)
class Placement:
    """A device and a precision: "fp32", or "bf16" for autocast to bfloat16."""

    device: torch.device
    precision: str

    def autocast(self) -> torch.autocast:
        """Return the context in which forward passes run; it does nothing for fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def put(self, model: nn.Module, example: Inputs) -> torch.memory_format:
        """Move a model to the device, in the memory format in which it is trained; return that, see `fast_format`."""
        model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        memory_format = fast_format(model, to_device(example, self.device))
        model.to(memory_format=memory_format)  # type: ignore[call-overload]
        return memory_format


def choose_placement(device: str | torch.device = "auto", precision: str = "auto") -> Placement:
    """Check the user's choice of device and precision, and make it where it is "auto".

    Automatic is the GPU if there is one (under torchrun the one of this process). An automatic precision is bf16 on
    GPUs that compute in it and on CPUs where it is measured to be faster, once in a process, in tens of milliseconds;
    under torchrun the first process decides. An impossible choice is a TorchsliceError.

    >>> choose_placement("cpu", "fp32")
    Placement(device=device(type='cpu'), precision='fp32')
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    chosen = choose_device(device)
    if precision == "auto":
        faster = torch.tensor(_bf16_is_faster(chosen), device=chosen)
        current_ranks(chosen).copy_from_first([faster])
        precision = "bf16" if faster else "fp32"
    return Placement(chosen, precision)


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device that the user chose, or the best one; raise for one that cannot be used here."""
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.zeros((), device=chosen).item()  # which the meta device cannot
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["auto", "cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        raise TorchsliceError(f"device {str(device)!r} cannot be used here. Choose {' or '.join(there)}.") from error
    return chosen


def fast_format(model: nn.Module, inputs: Inputs) -> torch.memory_format:
    """Return channels_last if a model runs on a few inputs in it, else contiguous_format.

    Convolutions are faster in channels_last. Models that flatten with `view` do not run in it.

    >>> memory_format = fast_format(model, task.example)
    """
    if not any(_is_image(tensor) for tensor in tensors(inputs)):
        return torch.contiguous_format
    view = view_of(model)
    try:
        with evaluating(view):
            call_model(view, in_format(inputs, torch.channels_last))
    except Exception:  # whatever else is wrong will show where the model is used
        return torch.contiguous_format
    return torch.channels_last


def in_format(inputs: Inputs, memory_format: torch.memory_format) -> Inputs:
    """Return inputs with their images [B, ch, H, W] in a memory format; other tensors stay as they are."""
    # Only `clone` changes the format of images of one channel.
    return map_tensors(lambda t: t.clone(memory_format=memory_format) if _is_image(t) else t, inputs)


def _is_image(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_floating_point()


def _bf16_is_faster(device: torch.device) -> bool:
    """Whether networks train clearly faster in bf16; emulated, as on many CPUs, it is many times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and _bf16_time() < WORTH_IT


@cache
def _bf16_time() -> float:
    """Return the time that a convolution and a product take on the CPU in bf16, forward and backward, over fp32's."""
    images = torch.ones(8, 64, 16, 16).to(memory_format=torch.channels_last)
    weights = torch.ones(64, 64, 3, 3, requires_grad=True), torch.ones(64, 256, requires_grad=True)

    def spent(bf16: bool) -> float:
        started = time.process_time()  # of this process alone, whatever runs beside it
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            made = F.conv2d(images, weights[0], padding=1).permute(0, 2, 3, 1) @ weights[1]
            torch.autograd.grad(made, weights, torch.ones_like(made))
        return time.process_time() - started

    spent(True), spent(False)  # the first time takes longer
    return min(spent(True) for _ in range(3)) / min(spent(False) for _ in range(3))
