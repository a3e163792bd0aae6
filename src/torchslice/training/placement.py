"""Where and how precisely a network runs."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import TorchsliceError
from ..graph.record import evaluating
from ..graph.views import view_of
from ..inputs import Inputs, call_model, map_tensors, tensors, to_device
from ..registry import unknown
from .settings import PRECISIONS


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

    Automatic is the GPU if there is one (under torchrun the one of this process), and bf16 where the hardware
    computes in it: GPUs that support it, CPUs with AVX512-BF16 or AMX. An impossible choice is a TorchsliceError.

    >>> choose_placement("cpu", "fp32")
    Placement(device=device(type='cpu'), precision='fp32')
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise TorchsliceError(f"device {str(device)!r} cannot be used here. Choose auto, cpu or cuda.") from error
    if precision == "auto":
        precision = "bf16" if _computes_bf16(chosen) else "fp32"
    return Placement(chosen, precision)


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


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
