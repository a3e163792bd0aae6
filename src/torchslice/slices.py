"""The one noun of torchslice: a Slice is an immutable set of neurons of one model.

Shapes: N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from .errors import TorchsliceError

WIDEST = 10**7  # neurons of a layer that a file may ask for


class Slice:
    """A set of neurons: for every sliceable layer of a model, which of its neurons are in.

    Formally a subset of {(layer, i) : 0 <= i < N_layer}, stored as one bool tensor [N] per layer, on the CPU.
    `|` is union, `&` intersection, `~` complement, `-` difference, `<=` subset, `len` the number of neurons kept.
    Both sides of an operator must be slices of the same layers and widths, else a TorchsliceError.

    >>> cat = Slice({"conv1": torch.tensor([True, False, True])})
    >>> dog = Slice({"conv1": torch.tensor([True, True, False])})
    >>> len(cat | dog), len(cat & dog), cat.jaccard(dog)
    (3, 1, 0.3333333333333333)
    """

    __slots__ = ("_masks",)

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for layer, mask in masks.items():
            if mask.dtype != torch.bool or mask.dim() != 1 or mask.numel() == 0:
                raise TorchsliceError(
                    f"layer {layer!r}: a slice needs a bool tensor [N] per layer, got {mask.dtype} {list(mask.shape)}."
                )
        self._masks = {layer: mask.detach().to("cpu", copy=True) for layer, mask in masks.items()}

    # -- masks -----------------------------------------------------------------------------------------------------
    def __getitem__(self, layer: str) -> Tensor:
        """Return a copy of the mask of a layer, bool [N]."""
        return self._masks[layer].clone()

    @property
    def masks(self) -> dict[str, Tensor]:
        """A copy of the masks, {layer: bool [N]}."""
        return {layer: mask.clone() for layer, mask in self._masks.items()}

    def __len__(self) -> int:
        """Number of neurons in the slice (not of layers)."""
        return sum(int(mask.sum()) for mask in self._masks.values())

    @property
    def layers(self) -> dict[str, int]:
        """Width N of every layer, in the model's order."""
        return {layer: mask.numel() for layer, mask in self._masks.items()}

    # -- set algebra ----------------------------------------------------------------------------------------------
    def _combined(self, other: Slice, operator: Callable[[Tensor, Tensor], Tensor]) -> Slice:
        if not isinstance(other, Slice):
            raise TorchsliceError(f"a slice can only be combined with a slice, not with {type(other).__name__}.")
        mine, theirs = self.layers, other.layers
        for layer in {**mine, **theirs}:
            if mine.get(layer) != theirs.get(layer):
                raise TorchsliceError(
                    f"these are slices of different models: layer {layer!r} has {mine.get(layer, 'no')} neurons in one "
                    f"and {theirs.get(layer, 'no')} in the other. Combine slices of the same model only."
                )
        return Slice({n: operator(m, other._masks[n]) for n, m in self._masks.items()})

    def __or__(self, other: Slice) -> Slice:
        return self._combined(other, torch.logical_or)

    def __and__(self, other: Slice) -> Slice:
        return self._combined(other, torch.logical_and)

    def __sub__(self, other: Slice) -> Slice:
        return self & ~other

    def __invert__(self) -> Slice:
        return Slice({n: ~m for n, m in self._masks.items()})

    def __le__(self, other: Slice) -> bool:
        return not self - other

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Slice):
            return NotImplemented
        return self.layers == other.layers and all(torch.equal(m, other._masks[n]) for n, m in self._masks.items())

    def __hash__(self) -> int:
        return hash(frozenset((n, m.numpy().tobytes()) for n, m in self._masks.items()))

    # -- figures --------------------------------------------------------------------------------------------------
    @property
    def total(self) -> int:
        """Number of neurons of the model's sliceable layers."""
        return sum(self.layers.values())

    @property
    def neuron_retention(self) -> float:
        """Fraction of the neurons that are in the slice, in [0, 1] (the kernel retention rate of MwT, section 4)."""
        return len(self) / self.total if self.total else 1.0

    def jaccard(self, other: Slice) -> float:
        """Jaccard overlap in [0, 1] of two slices; 1 for two empty ones."""
        union = len(self | other)
        return len(self & other) / union if union else 1.0

    def empty_layers(self) -> list[str]:
        """Layers of which the slice keeps no neuron."""
        return [n for n, m in self._masks.items() if not m.any()]

    # -- plain data -----------------------------------------------------------------------------------------------
    def to_plain(self) -> dict[str, dict[str, Any]]:
        """Return the slice as JSON-able data: per layer its width and the indices kept."""
        return {n: {"width": m.numel(), "kept": m.nonzero().flatten().tolist()} for n, m in self._masks.items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Mapping[str, Any]]) -> Slice:
        """Rebuild a slice from `to_plain`; anything else, such as an index outside its layer, is an error."""
        if not isinstance(plain, Mapping):
            raise TorchsliceError(f"expected the slice of every layer, got {plain!r:.100}.")
        masks = {}
        for layer, entry in plain.items():
            width, kept = (entry.get(key) if isinstance(entry, Mapping) else None for key in ("width", "kept"))
            if type(width) is not int or not isinstance(kept, list) or any(type(i) is not int for i in kept):
                raise TorchsliceError(f"layer {layer!r}: expected {{'width': N, 'kept': [...]}}, got {entry!r:.100}.")
            if not 1 <= width <= WIDEST:
                raise TorchsliceError(f"layer {layer!r}: a layer has 1 to {WIDEST:,} neurons, not {width}.")
            if any(not 0 <= i < width for i in kept):
                raise TorchsliceError(f"layer {layer!r} has {width} neurons; the slice names {max(kept, key=abs)}.")
            masks[layer] = torch.zeros(width, dtype=torch.bool)
            masks[layer][kept] = True
        return cls(masks)

    def __repr__(self) -> str:
        return f"Slice({len(self)} of {self.total} neurons, {self.neuron_retention:.1%}, in {len(self._masks)} layers)"


def union(slices: Iterable[Slice]) -> Slice:
    """Return the neurons that are in any of the slices, of which there must be at least one.

    >>> union(slices[name] for name in ("3", "8")) == slices["3"] | slices["8"]
    True
    """
    return reduce(or_, slices)
