"""The kinds of layers that can be cut: what the rows and columns of their parameters stand for, and how they change.

A new kind of layer is one class here and one rule in `rules.py`.

Shapes: n channels of one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

Ids = np.ndarray  # int, the numbers of a tensor's channels
Flags = np.ndarray  # bool, one for each channel


@dataclass(eq=False)
class Port:
    """The channels that the rows (`outs`) and columns (`ins`) of one layer's parameters stand for.

    Attributes:
        outs: number of the channel of each row, int [outputs].
        ins: number of the channel of each column over all groups, int [inputs]; None for a layer without columns.
        groups: of channels that are kept apart.
        kernel: weights per pair of an output and an input channel.
        positions: places per sample at which the layer is applied, over all its calls.
        taken: whether code outside of the layer's module takes its tensors, so that hooks on the module do not see all.
    """

    outs: Ids
    ins: Ids | None = None
    groups: int = 1
    kernel: int = 1
    positions: int = 0
    taken: bool = False
    makes_neurons: ClassVar[bool] = False  # whether its rows are neurons; else they follow those of other layers
    axis = 1  # of its output that counts rows

    def sizes(self, outs: int, ins: int, groups: int) -> dict[str, int]:
        """Return the attributes that tell a module of this kind how many rows, columns and groups it has."""
        raise NotImplementedError

    def row_axis(self, key: str) -> int:
        """Return the axis of one of its tensors that counts rows."""
        return 0

    def cut(self, tensors: Mapping[str, Tensor | None], outs: Flags, ins: Flags | None) -> dict[str, Tensor]:
        """Return its tensors with some rows and columns only; itself, one that loses none."""
        cut = {
            key: take(tensor, self.row_axis(key), outs)
            for key, tensor in tensors.items()
            if tensor is not None and tensor.dim() > 0
        }
        if ins is not None:
            cut["weight"] = self.cut_columns(cut["weight"], outs, ins)
        return cut

    def cut_columns(self, rows: Tensor, outs: Flags, ins: Flags) -> Tensor:
        """Return the weight with the columns `ins` only; its rows are cut to `outs` already."""
        return rows

    def grow_columns(self, rows: Tensor, places: Tensor, new: Tensor) -> Tensor:
        """Return the weight with its columns at `places`; those that are new read with zero weights."""
        return rows

    def draw(self, tensor: Tensor, key: str, new: Tensor, inputs: int) -> None:
        """Fill the new rows of a tensor as PyTorch draws those of a layer with so many inputs."""
        bound = (self.kernel * inputs) ** -0.5
        tensor[new] = torch.empty_like(tensor[new]).uniform_(-bound, bound)

    def connections(self, outs: Flags, ins: Flags) -> int:
        """Count the pairs of an output and an input channel that a weight joins."""
        return int((outs.reshape(self.groups, -1).sum(1) * ins.reshape(self.groups, -1).sum(1)).sum())

    def zero(self, tensors: Mapping[str, Tensor | None], rows: Tensor) -> None:
        """Set rows to zero, in place, so that the layer computes zero from zeros; a variance becomes one."""
        for key in ("weight", "bias", "running_mean", "running_var"):
            if (tensor := tensors.get(key)) is not None:
                tensor.movedim(self.row_axis(key), 0)[rows.to(tensor.device)] = float(key == "running_var")


class Linear(Port):
    """nn.Linear."""

    makes_neurons = True
    axis = -1

    def sizes(self, outs: int, ins: int, groups: int) -> dict[str, int]:
        return {"in_features": ins, "out_features": outs}

    def cut_columns(self, rows: Tensor, outs: Flags, ins: Flags) -> Tensor:
        return take(rows, 1, ins)

    def grow_columns(self, rows: Tensor, places: Tensor, new: Tensor) -> Tensor:
        wide = rows[:, places]
        wide[:, new] = 0
        return wide


class Transposed(Linear):
    """A layer whose weight has its rows on the second axis: a matrix that is multiplied from the right."""

    def sizes(self, outs: int, ins: int, groups: int) -> dict[str, int]:
        return {"nx": ins, "nf": outs}  # the names of transformers.pytorch_utils.Conv1D

    def row_axis(self, key: str) -> int:
        return int(key == "weight")

    def cut_columns(self, rows: Tensor, outs: Flags, ins: Flags) -> Tensor:
        return take(rows, 0, ins)


class Conv(Linear):
    """A convolution of one group."""

    axis = 1

    def sizes(self, outs: int, ins: int, groups: int) -> dict[str, int]:
        return {"in_channels": ins, "out_channels": outs, "groups": groups}


class TransposedConv(Transposed):
    """A transposed convolution of one group."""

    axis = 1
    sizes = Conv.sizes


class Grouped(Port):
    """A convolution of several groups; those that stay are equally wide."""

    makes_neurons = True
    sizes = Conv.sizes

    def cut_columns(self, rows: Tensor, outs: Flags, ins: Flags) -> Tensor:
        parts, start = [], 0
        for columns, kept in zip(ins.reshape(self.groups, -1), outs.reshape(self.groups, -1), strict=True):
            stop = start + int(kept.sum())
            if stop > start:
                parts.append(take(rows[start:stop], 1, columns))
            start = stop
        return torch.cat(parts)


class Depthwise(Port):
    """A convolution with a group for each input channel; its channels live and die with those that it reads."""

    def sizes(self, outs: int, ins: int, groups: int) -> dict[str, int]:
        return {"in_channels": ins, "out_channels": outs, "groups": ins}

    def draw(self, tensor: Tensor, key: str, new: Tensor, inputs: int) -> None:
        super().draw(tensor, key, new, 1)

    def connections(self, outs: Flags, ins: Flags) -> int:
        return int(outs.sum())


class Norm(Port):
    """Batch norm or instance norm."""

    def sizes(self, outs: int, ins: int, groups: int) -> dict[str, int]:
        return {"num_features": outs}

    def draw(self, tensor: Tensor, key: str, new: Tensor, inputs: int) -> None:
        tensor[new] = float(key in ("weight", "running_var"))  # the identity


class GroupNorm(Norm):
    """Group norm; its groups stay or go as a whole."""

    def sizes(self, outs: int, ins: int, groups: int) -> dict[str, int]:
        return {"num_channels": outs, "num_groups": groups}


class Free(Port):
    """A parameter or buffer that is joined with activations, such as a table of biases; `outs` has its shape."""

    def sizes(self, outs: int, ins: int, groups: int) -> dict[str, int]:
        return {}

    def cut(self, tensors: Mapping[str, Tensor | None], outs: Flags, ins: Flags | None) -> dict[str, Tensor]:
        return {key: along(tensor, outs) for key, tensor in tensors.items() if tensor is not None}

    def zero(self, tensors: Mapping[str, Tensor | None], rows: Tensor) -> None:
        for tensor in tensors.values():
            if tensor is not None:
                tensor[rows.to(tensor.device)] = 0


class Shift(Port):
    """A module that adds a constant to all channels at its end; it can be zero only where a channel leaves."""

    def sizes(self, outs: int, ins: int, groups: int) -> dict[str, int]:
        return {}


class PReLU(Port):
    """A PReLU with a slope for each channel; zero stays zero whatever the slope is."""

    def sizes(self, outs: int, ins: int, groups: int) -> dict[str, int]:
        return {"num_parameters": outs}

    def draw(self, tensor: Tensor, key: str, new: Tensor, inputs: int) -> None:
        """Leave the new rows as the copies that they are."""

    def zero(self, tensors: Mapping[str, Tensor | None], rows: Tensor) -> None:
        """Leave the slopes as they are."""


def take(tensor: Tensor, axis: int, kept: Flags) -> Tensor:
    """Cut an axis of a tensor to the places that stay; the tensor itself where all do."""
    return tensor if kept.all() else tensor.index_select(axis, torch.from_numpy(kept.nonzero()[0]).to(tensor.device))


def along(tensor: Tensor, kept: Flags) -> Tensor:
    """Cut a tensor to the places, on each axis, that hold something of a block `kept`, which broadcasts to it."""
    for axis in range(-kept.ndim, 0):
        places = staying(kept, axis)
        if places is not None:
            tensor = take(tensor, axis, places)
    return tensor


def staying(kept: Flags, axis: int) -> Flags | None:
    """Return which places on an axis hold something of a block, bool [n]; None if the block does not vary there."""
    if kept.ndim < -axis or kept.shape[axis] == 1:
        return None
    return np.asarray(kept.any(tuple(other for other in range(-kept.ndim, 0) if other != axis)))
