"""Several networks that answer together.

Shapes: B batch, C classes, K logits of all networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..inputs import logits_of


class Composed(nn.Module):
    """Asks all its networks the same; one linear layer makes logits [B, C] of theirs, side by side [B, K].

    >>> both = Composed([small, small], nn.Linear(4, 3))
    >>> both(task.example).shape
    torch.Size([2, 3])
    """

    def __init__(self, networks: Sequence[nn.Module], calibration: nn.Module) -> None:
        super().__init__()
        self.networks, self.calibration = nn.ModuleList(networks), calibration

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        logits = [logits_of(network(*inputs, **named)) for network in self.networks]
        return self.calibration(torch.cat(logits, dim=1))


def renormalised(network: nn.Module, given: dict[str, Any], own: dict[str, Any]) -> nn.Sequential:
    """Return a network behind a convolution that turns images as they are given into images as it wants them.

    Args:
        given, own: mean and std per channel by which images were normalised, and by which the network wants them.
    """
    mean, std, own_mean, own_std = (torch.tensor(of[key]) for of in (given, own) for key in ("mean", "std"))
    channels = len(mean)
    layer = nn.Conv2d(channels, channels, 1, groups=channels).requires_grad_(False)
    layer.load_state_dict({"weight": (std / own_std).view(-1, 1, 1, 1), "bias": (mean - own_mean) / own_std})
    return nn.Sequential(layer, network)
