"""Channels and zeros: which channels of which tensors belong together, and where a held neuron leaves a zero behind.

Every channel of every tensor carries a number. Channels that only exist together (the two sides of a residual add, a
convolution and the norm after it, the parts of an attention head) are linked; linked channels form a *wire*. A wire can
be cut out of the network when every layer that reads it (a *sink*) reads a zero there. Zeros are followed step by step
for a given set of held neurons.

Shapes: n channels of one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .layers import Flags, Free, Ids, Port
from .record import Size


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of one tensor: their numbers, in an array that broadcasts to the tensor's shape.

    The channels of a convolution's result [B, C, H, W] are [C, 1, 1]; those of queries in heads [B, H, N, d] are
    [H, 1, d]. Axes are counted from the right.
    """

    ids: Ids

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes along which the channels differ."""
        return tuple(axis for axis in range(-self.ids.ndim, 0) if self.ids.shape[axis] > 1)


@dataclass(frozen=True, eq=False)
class Step:
    """How the zeros of `output` follow from those of `inputs`.

    Rules: "make" (a layer's neurons), "hold" (a norm or depthwise layer: zero in is held at zero out), "keep"
    (f(0) = 0), "lose" (f(0) != 0), "all" (a + b), "any" (a * b), "sink" (a layer reads the channels; a wire must be
    zero here to go). Where an output channel stands for several, it is zero if all of these are.
    """

    rule: str
    inputs: tuple[Channels, ...]
    output: Channels | None = None
    layer: str = ""
    index: np.ndarray | None = None  # "keep", "hold": place of each output channel among all input channels
    where: str = ""


@dataclass(frozen=True)
class Written:
    """A number in an attribute of a module that says how wide a tensor is: of the first `upto` places on its `axis`.

    Without channels it says something else, and must stay what it is.
    """

    size: Size
    channels: Channels | None = None
    axis: int = -1
    upto: int | None = None


def connected(links: Sequence[tuple[Ids, ...]], count: int) -> Ids:
    """Number the parts that links a[i] - b[i] join of `count` things, int [count]."""
    if not links:
        return np.arange(count)
    a, b = (np.concatenate([ids.ravel() for ids in side]) for side in zip(*links, strict=True))
    graph = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


@dataclass
class Flow:
    """The channels and zeros of one model; built by the rules, asked by `Neurons`."""

    count: int = 0
    steps: list[Step] = field(default_factory=list)
    ports: dict[str, Port] = field(default_factory=dict)  # layer -> Port, in forward order
    links: list[tuple[Ids, ...]] = field(default_factory=list)
    pins: list[tuple[Ids, str]] = field(default_factory=list)
    stays: list[tuple[Ids, str]] = field(default_factory=list)  # never cut, but may be held at zero, and why
    even: list[Ids] = field(default_factory=list)  # [parts, n]: equally many channels of all parts must stay
    written: list[Written] = field(default_factory=list)

    def new(self, *shape: int) -> Ids:
        """Number fresh channels."""
        n = int(np.prod(shape))
        self.count += n
        return np.arange(self.count - n, self.count).reshape(shape)

    def link(self, a: Ids, b: Ids) -> None:
        """State that channel a[i] and channel b[i], broadcast against each other, exist only together."""
        if a is not b:
            self.links.append(tuple(np.broadcast_arrays(a, b)))

    def pin(self, ids: Ids, reason: str) -> None:
        """State that these channels can never be cut."""
        self.pins.append((ids.ravel(), reason))

    def wires(self) -> Ids:
        """Return the wire of every channel, int [count]."""
        return connected(self.links, self.count)

    def free(self, held: Mapping[str, Flags]) -> dict[str, Flags]:
        """Return which elements of free vectors are joined with held rows of layers only, bool [n] each."""
        vectors = {n: p.outs for n, p in self.ports.items() if isinstance(p, Free) and p.outs.ndim == 1}
        if not vectors:
            return {}
        rows = np.zeros((2, self.count), dtype=bool)  # alive, held
        for name, port in self.ports.items():
            if port.makes_neurons:
                rows[held.get(name, np.zeros(len(port.outs), dtype=bool)).astype(int), port.outs] = True
        joined = np.zeros_like(rows)
        for one, other in (*self.links, *(link[::-1] for link in self.links)):
            for kind in (0, 1):
                joined[kind, one[rows[kind, other]]] = True
        return {name: joined[1, ids] & ~joined[0, ids] for name, ids in vectors.items()}

    def zeros(self, held: Mapping[str, Flags]) -> Zeros:
        """Follow the zeros that holding `held` (layer -> bool [rows], True = held at zero) leaves behind.

        A layer used twice is held only where every one of its uses may be, which the loop finds by giving way until
        nothing changes.
        """
        layers: dict[str, Flags] = {layer: np.asarray(flags, dtype=bool) for layer, flags in held.items()}
        while True:
            zeros, changed = self._sweep(layers)
            if not changed:
                return zeros

    def _sweep(self, layers: dict[str, Flags]) -> tuple[Zeros, bool]:
        at: dict[Channels, Flags] = {}
        needed = np.zeros(self.count, dtype=bool)
        given_way = False
        for step in self.steps:
            inputs = [at.get(c, np.zeros(c.ids.shape, dtype=bool)) for c in step.inputs]
            if step.rule == "sink":
                needed[step.inputs[0].ids[~inputs[0]]] = True
                continue
            assert step.output is not None
            shape = step.output.ids.shape
            if step.rule == "make":
                out = layers[step.layer].reshape(shape) if step.layer in layers else np.zeros(shape, dtype=bool)
            elif step.rule == "lose":
                out = np.zeros(shape, dtype=bool)
            elif step.rule in ("all", "any"):
                join = np.logical_and if step.rule == "all" else np.logical_or
                out = inputs[0]
                for other in inputs[1:]:
                    out = join(out, other)
            else:  # keep, hold
                out = _placed(inputs, step.index)
            out = _reduced(np.logical_and, out, shape)
            if step.rule == "hold":
                flat = out.ravel()
                before = layers.setdefault(step.layer, flat)
                both = before & flat
                given_way |= bool((both != before).any())
                layers[step.layer] = both
                out = both.reshape(shape)
            at[step.output] = out
        return Zeros(at, needed, layers), given_way

    def useful(self) -> tuple[dict[str, Flags], dict[str, str]]:
        """Return which rows of every layer have zeros that arrive somewhere, and where those of others are lost."""
        useful: dict[Channels, Flags] = {}
        lost: dict[Channels, str] = {}
        rows: dict[str, Flags] = {}
        reasons: dict[str, str] = {}
        for step in reversed(self.steps):
            out = None if step.output is None else useful.get(step.output)
            if step.rule == "make":
                assert step.output is not None
                none = np.zeros(step.output.ids.size, dtype=bool)
                rows[step.layer] = rows.get(step.layer, none) | (none if out is None else out.ravel())
                if step.output in lost:
                    reasons[step.layer] = lost[step.output]
                continue
            start = 0
            for source in step.inputs:
                shape, found = source.ids.shape, np.zeros(source.ids.shape, dtype=bool)
                if step.rule == "sink":
                    found[...] = True
                elif out is not None and step.rule in ("all", "any"):
                    joint = np.broadcast_shapes(shape, *(c.ids.shape for c in step.inputs))
                    found = _reduced(np.logical_or, np.broadcast_to(out, joint), shape)
                elif out is not None and step.rule in ("keep", "hold") and step.index is None:
                    found = np.broadcast_to(out, shape)
                elif out is not None and step.rule in ("keep", "hold"):
                    whole = np.broadcast_to(out, step.index.shape)  # type: ignore[union-attr]
                    chosen = step.index[whole] - start  # type: ignore[index]
                    found.ravel()[chosen[(chosen >= 0) & (chosen < found.size)]] = True
                start += source.ids.size
                useful[source] = useful.get(source, np.zeros(shape, dtype=bool)) | found
                reason = f"{step.where} turns zero into something else" if step.rule == "lose" else ""
                if reason := reason or (lost.get(step.output, "") if step.output is not None else ""):
                    lost[source] = reason
        return rows, reasons


def _placed(inputs: list[Flags], index: np.ndarray | None) -> Flags:
    if index is None:
        return inputs[0]
    flat = inputs[0].ravel() if len(inputs) == 1 else np.concatenate([flags.ravel() for flags in inputs])
    return flat[index]


def _reduced(function: np.ufunc, flags: Flags, shape: tuple[int, ...]) -> Flags:
    """Join flags along the axes on which `shape` has a single place."""
    if flags.shape == shape:
        return flags
    padded = (1,) * (flags.ndim - len(shape)) + shape
    axes = tuple(axis for axis in range(flags.ndim) if padded[axis] == 1 and flags.shape[axis] > 1)
    return np.broadcast_to(function.reduce(flags, axis=axes, keepdims=True), padded).reshape(shape)


@dataclass(frozen=True)
class Zeros:
    """Result of `Flow.zeros`."""

    at: dict[Channels, Flags]  # zeros of every tensor
    needed: Flags  # bool [count]: channels that some sink reads as non-zero
    held: dict[str, Flags]  # layer or norm -> bool [rows], outputs that are held at zero
