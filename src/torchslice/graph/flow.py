"""Channels and zeros: which channels of which tensors belong together, and where a held neuron leaves a zero behind.

Every channel of every tensor carries a number. Channels that only exist together (the two sides of a residual add, a
convolution and the norm after it) are linked; linked channels form a *wire*. A wire can be cut out of the network
when every layer that reads it (a *sink*) reads a zero there. Zeros are followed step by step for a given set of held
neurons.

Shapes: n channels of one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .layers import Flags, Ids, Port


@dataclass(frozen=True, eq=False)
class Channels:
    """The channel axis of one tensor: `axis` counts from the right, so that broadcasting lines axes up."""

    ids: Ids
    axis: int


@dataclass(frozen=True, eq=False)
class Step:
    """How the zeros of `output` follow from those of `inputs`.

    Rules: "make" (a layer's neurons), "hold" (a norm or depthwise layer: zero in is held at zero out), "keep"
    (f(0) = 0), "lose" (f(0) != 0), "all" (a + b), "any" (a * b), "join" (concatenation), "sink" (a layer reads the
    channels; a wire must be zero here to go).
    """

    rule: str
    inputs: tuple[Channels, ...]
    output: Channels | None = None
    layer: str = ""
    index: np.ndarray | None = None  # "keep", "hold": which input channel each output channel comes from
    where: str = ""


def connected(links: Sequence[tuple[Ids, Ids]], count: int) -> Ids:
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
    links: list[tuple[Ids, Ids]] = field(default_factory=list)
    pins: list[tuple[Ids, str]] = field(default_factory=list)

    def new(self, n: int) -> Ids:
        """Number n fresh channels."""
        self.count += n
        return np.arange(self.count - n, self.count)

    def link(self, a: Ids, b: Ids) -> None:
        """State that channel a[i] and channel b[i] exist only together."""
        if a is not b:
            self.links.append((a, b))

    def pin(self, ids: Ids, reason: str) -> None:
        """State that these channels can never be cut."""
        self.pins.append((ids, reason))

    def wires(self) -> Ids:
        """Return the wire of every channel, int [count]."""
        return connected(self.links, self.count)

    def zeros(self, held: Mapping[str, Flags]) -> Zeros:
        """Follow the zeros that holding `held` (layer -> bool [n], True = held at zero) leaves behind.

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
            inputs = [at.get(c, np.zeros(len(c.ids), dtype=bool)) for c in step.inputs]
            if step.rule == "sink":
                needed[step.inputs[0].ids[~inputs[0]]] = True
                continue
            assert step.output is not None
            size = len(step.output.ids)
            if step.rule == "make":
                out = layers.get(step.layer, np.zeros(size, dtype=bool))
            elif step.rule == "lose":
                out = np.zeros(size, dtype=bool)
            elif step.rule == "join":
                out = np.concatenate(inputs)
            elif step.rule in ("all", "any"):
                out = np.logical_and.reduce(inputs) if step.rule == "all" else np.logical_or.reduce(inputs)
            else:  # keep, hold
                out = inputs[0] if step.index is None else inputs[0][step.index]
            if step.rule == "hold":
                before = layers.setdefault(step.layer, out)
                both = before & out
                given_way |= bool((both != before).any())
                layers[step.layer] = out = both
            at[step.output] = out
        return Zeros(at, needed, layers), given_way


@dataclass(frozen=True)
class Zeros:
    """Result of `Flow.zeros`."""

    at: dict[Channels, Flags]  # zeros of every tensor
    needed: Flags  # bool [count]: channels that some sink reads as non-zero
    held: dict[str, Flags]  # layer or norm -> bool [n], outputs that are held at zero
