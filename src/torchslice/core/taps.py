"""Read the activations of a model's neurons while it runs: after the norm and the activation function that follow them.

Hooks on modules cannot do this in general: activation functions may be plain functions, and in-place functions
overwrite what a hook saw. So the layer's result is followed from function to function.

Shapes: B batch, N neurons of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .find import find_neurons
from .functions import ACTIVATIONS, CONVOLUTIONS, NORMS
from .neurons import Neurons
from .record import Call, Value, plain_name, record


@dataclass(frozen=True)
class Taps:
    """Where to read each layer: the functions its result goes through, such as ("conv2d", "batch_norm", "relu").

    A layer that is used several times is read after the functions that follow all its uses alike. `copied` are layers
    whose activations a later function overwrites; `axis` is the axis that counts the neurons, 1 or -1.
    """

    chains: dict[str, tuple[str, ...]]
    copied: frozenset[str]
    axis: dict[str, int]


@dataclass
class Seen:
    """Activations of the last forward pass: for each layer a list of tensors [B, ..., N, ...], one per use."""

    values: dict[str, list[Tensor]] = field(default_factory=dict)


def find_taps(model: nn.Module, example: Tensor, neurons: Neurons | None = None) -> Taps:
    """Find where the neurons of every sliceable layer can be read, by one run on `example` [B, ...].

    >>> find_taps(model, example).chains["layer1.0.conv1"]
    ('conv2d', 'batch_norm', 'relu')
    """
    neurons = neurons or find_neurons(model, example)
    calls = record(model, example).calls
    readers: dict[Value, list[Call]] = {}
    for call in calls:
        for value in dict.fromkeys(call.inputs):
            readers.setdefault(value, []).append(call)
    chains: dict[str, tuple[str, ...]] = {}
    copied = set()
    for call in calls:
        if call.module not in neurons.layers or call.name not in (*CONVOLUTIONS, "linear"):
            continue
        chain, end = _follow(call, readers)
        before = chains.get(call.module, chain)
        chains[call.module] = tuple(name for name, other in zip(chain, before, strict=False) if name == other)
        if any(end in reader.overwritten for reader in readers.get(end, [])):
            copied.add(call.module)
    return Taps(chains, frozenset(copied), {name: neurons.layers[name].axis for name in chains})


def _follow(call: Call, readers: dict[Value, list[Call]]) -> tuple[tuple[str, ...], Value]:
    """Follow a layer's result through one norm and one activation function, as long as nothing else reads it."""
    chain: tuple[str, ...] = (call.name,)
    value = call.outputs[0]
    for kind in (NORMS, ACTIVATIONS):
        following = readers.get(value, [])
        if len(following) == 1 and following[0].name in kind and following[0].inputs[0] is value:
            chain, value = (*chain, following[0].name), following[0].outputs[0]
    return chain, value


class _Tapping(TorchFunctionMode):
    def __init__(self, model: nn.Module, taps: Taps) -> None:
        super().__init__()
        self.taps, self.seen = taps, Seen()
        self.layer_of = {id(model.get_submodule(layer).weight): layer for layer in taps.chains}
        self.followed: dict[int, tuple[Tensor, str, int]] = {}  # id(tensor) -> tensor, layer, place in its chain

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        name = plain_name(func)
        source = args[0] if args else kwargs.get("input")
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if id(weight) in self.layer_of and (name in CONVOLUTIONS or name == "linear"):
            return self._arrived(self.layer_of[id(weight)], 0, result)
        known = self.followed.get(id(source))
        if known is not None and known[0] is source:
            _, layer, place = known
            if self.taps.chains[layer][place + 1] == name:
                del self.followed[id(source)]
                return self._arrived(layer, place + 1, result)
        return result

    def _arrived(self, layer: str, place: int, result: Tensor) -> Tensor:
        if place < len(self.taps.chains[layer]) - 1:
            self.followed[id(result)] = (result, layer, place)
            return result
        self.seen.values.setdefault(layer, []).append(result)
        return result.clone() if layer in self.taps.copied else result  # the model goes on with what it may overwrite


@contextlib.contextmanager
def tapping(model: nn.Module, taps: Taps) -> Iterator[Seen]:
    """Collect the activations of every layer whenever `model` runs inside the block.

    They belong to the autograd graph, so gradients with respect to them can be taken, and stay as they were read. What
    is collected are the values of the last forward pass.

    >>> with tapping(model, taps) as seen:
    ...     loss = cross_entropy(model(images), labels)
    ...     gradients = torch.autograd.grad(loss, seen.values["layer1.0.conv1"])
    """
    mode = _Tapping(model, taps)

    def begin(module: nn.Module, inputs: object) -> None:
        mode.seen.values = {}
        mode.followed = {}

    handle = model.register_forward_pre_hook(begin)
    try:
        with mode:
            yield mode.seen
    finally:
        handle.remove()
