"""Functions that only move elements about: reshape, permute, split, index and the like.

What they do to channels is seen by running them on tensors whose elements are the numbers of their channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..inputs import leaves, map_leaves
from .flow import Channels, Written
from .functions import SHAPED, SIZED
from .ground import Ground, arg, from_right
from .layers import Ids
from .record import Call, Size, Value


class Moves(Ground):
    """Rules of functions that move elements."""

    def _move(self, call: Call) -> None:
        """Run the function on a tensor whose elements are their channels' numbers, and read off where they went."""
        value = arg(call, 0, "input")
        source = self._known(value)
        if source is None:
            self._expand(call, value)
        else:
            self._move_channels(call, value, source)
        self._note_sizes(call, source)

    def _move_channels(self, call: Call, value: Value, source: Channels) -> None:
        moved = self.run_numbered(call, call, value, self.numbered(value, source))
        if moved is None:
            return self._unknown(call, "takes several tensors")
        for out, result in zip(call.outputs, moved, strict=True):
            if 0 in out.shape:
                continue
            index = _narrowed(result).numpy()
            ids = source.ids.ravel()[index]
            self.channels[out] = self._step(call, "keep", [source], ids, index=index)
            self._judge(call, source, index, out)

    def _judge(self, call: Call, source: Channels, index: Ids, out: Value) -> None:
        """Note what may not go with a cut: channels that part, or whose number the code may spell out."""
        axes, n = self.channels[out].axes, source.ids.size
        flat = index.ravel()
        if len(source.axes) == len(axes) == 1 and len(flat) % n == 0:
            plain = bool((flat == np.repeat(np.arange(n), len(flat) // n)).all())
        else:
            plain = source.axes == axes and flat.size == n and bool((flat == np.arange(n)).all())
        spelled = call.name in SHAPED and {out.shape[axis] for axis in axes} & {*leaves((call.args[1:], call.kwargs))}
        if not plain or spelled:
            self.doubtful.append(call)
        m = len(flat)
        if len(source.axes) == 1 and m < n and n % m == 0 and flat[0] % m == 0 and (np.diff(flat) == 1).all():
            parts = source.ids.reshape(-1, m)  # one of several equal parts
            if not any(np.array_equal(parts, other) for other in self.flow.even[-1:]):
                self.flow.even.append(parts)

    def _expand(self, call: Call, value: Value) -> None:
        """Number the copies that a tensor is expanded to, if an attribute says how many: there may be fewer."""
        out = call.outputs[0]
        for axis, size in _sizes(call, out) if call.name in SIZED - SHAPED else ():
            old = value.shape[axis] if len(value.shape) >= -axis else 1
            if isinstance(size, Size) and old == 1 < size:
                self.channels[out] = self._step(call, "lose", [], self.flow.new(size).reshape(-1, *[1] * (-axis - 1)))
                return

    def _note_sizes(self, call: Call, source: Channels | None) -> None:
        """Note which attributes of modules say how wide the parts and results of a move are."""
        found: list[tuple[Any, Channels | None, int, Any]] = []
        of = self.channels.get
        if call.name in SIZED:
            found = [(size, of(call.outputs[0]), axis, None) for axis, size in _sizes(call, call.outputs[0])]
        elif call.name == "split":
            sizes, axis = arg(call, 1, "split_size_or_sections"), _axis(call, 2)
            parts = (
                zip(sizes, call.outputs, strict=True) if isinstance(sizes, tuple | list) else [(sizes, call.outputs[0])]
            )
            found = [(size, of(out), axis, None) for size, out in parts]
        elif call.name == "getitem":
            slices = [(axis, item) for axis, item in _indices(call) if isinstance(item, slice)]
            found = [(end, source, axis, end) for axis, part in slices for end in (part.start, part.stop)]
        elif call.name == "narrow":
            start, length, axis = arg(call, 2, "start"), arg(call, 3, "length"), _axis(call, 1)
            found = [(start, source, axis, start), (length, of(call.outputs[0]), axis, None)]
        for size, channels, axis, upto in found:
            if isinstance(size, Size):
                self.flow.written.append(Written(size, channels, axis, upto))

    def numbered(self, value: Value, source: Channels) -> Tensor:
        """Return a tensor of a value's shape that holds the places of its channels in `source.ids`."""
        padded = (1,) * (len(value.shape) - source.ids.ndim) + source.ids.shape
        return torch.arange(source.ids.size, dtype=torch.int32).view(padded).expand(value.shape)

    def run_numbered(self, call: Call, as_in: Call, value: Value, numbers: Tensor) -> list[Tensor] | None:
        """Run the function of a call, with the arguments it has in `as_in`, on numbers in the place of a value.

        None if the result depends on other tensors that cannot be known.
        """
        if call.name in SHAPED:  # a view needs real memory
            numbers = numbers.contiguous()
        others = dict(zip(as_in.inputs, call.inputs, strict=True))
        varying = {other for other in others.values() if other is not value and other.dynamic}
        if not call.name.endswith("_as"):
            chosen = (
                {axis for axis, item in _indices(call) if isinstance(item, Value) and item in varying}
                if call.name == "getitem"
                else set()
            )
            if varying and (not chosen or chosen.intersection(self.channels[value].axes)):
                return None

        def stand_in(leaf: Any) -> Any:
            if not isinstance(leaf, Value):
                return leaf
            if others[leaf] is value:
                return numbers
            if call.name.endswith("_as"):
                return torch.empty(leaf.shape)
            # Which places an index takes says nothing about the channels on other axes.
            return (
                torch.zeros(leaf.shape, dtype=torch.int64) if others[leaf] in varying else self._constant(others[leaf])
            )

        args, kwargs = map_leaves(stand_in, (as_in.args, as_in.kwargs))
        moved = call.function(*args, **kwargs)
        results = list(moved) if isinstance(moved, tuple | list) else [moved]
        same = [tuple(result.shape) for result in results] == [out.shape for out in as_in.outputs]
        return results if same else None


def _narrowed(numbered: Tensor) -> Tensor:
    """Cut a tensor to one place along every axis on which it does not vary."""
    for axis in range(numbered.dim()):
        first = numbered.narrow(axis, 0, 1)
        if numbered.stride(axis) == 0 or bool((numbered == first).all()):
            numbered = first
    return numbered


def _sizes(call: Call, out: Value) -> Iterator[tuple[int, Any]]:
    """Yield the axes of a result with the numbers that the code gives for their sizes."""
    numbers = [leaf for leaf in leaves((call.args[1:], call.kwargs)) if isinstance(leaf, int)]
    if len(numbers) == len(out.shape):
        yield from zip(range(-len(numbers), 0), numbers, strict=True)


def _indices(call: Call) -> Iterator[tuple[int, Any]]:
    """Yield the axes of a tensor with what an index says of them."""
    rank, index = len(call.args[0].shape), call.args[1]
    items = index if isinstance(index, tuple) else (index,)
    axis = -rank
    for item in items:
        if item is Ellipsis:
            axis += rank - sum(other is not None and other is not Ellipsis for other in items)
        elif item is not None:
            yield axis, item
            axis += 1


def _axis(call: Call, position: int) -> int:
    return from_right(arg(call, position, "dim", 0), len(call.args[0].shape))
