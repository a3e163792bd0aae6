"""Where and how precisely a network runs."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.record import evaluating
from ..errors import TorchsliceError

PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class Placement:
    """A device and a precision: "fp32", or "bf16" for autocast to bfloat16."""

    device: torch.device
    precision: str

    def autocast(self) -> torch.autocast:
        """Return the context in which forward passes run; it does nothing for fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def put(self, model: nn.Module, example: Tensor) -> torch.memory_format:
        """Move a model to the device, in the memory format in which it is trained; return that, see `fast_format`."""
        model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        memory_format = fast_format(model, example.to(self.device))
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
        raise TorchsliceError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise TorchsliceError(f"device {str(device)!r} cannot be used ({reason}). Choose auto, cpu or cuda.") from error
    if precision == "auto":
        precision = "bf16" if _computes_bf16(chosen) else "fp32"
    return Placement(chosen, precision)


def fast_format(model: nn.Module, images: Tensor) -> torch.memory_format:
    """Return channels_last if a model runs on a few images [B, ch, H, W] in it, else contiguous_format.

    Convolutions are faster in channels_last. Models that flatten with `view` do not run in it. To change the format of
    images take `clone`: other methods leave images of one channel as they are.

    >>> images = images.clone(memory_format=fast_format(model, images[:2]))
    """
    try:
        with evaluating(model):
            model(images.clone(memory_format=torch.channels_last))
    except Exception:  # whatever else is wrong will show where the model is used
        return torch.contiguous_format
    return torch.channels_last


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
