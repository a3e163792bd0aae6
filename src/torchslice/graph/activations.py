"""Read the activations of a model's neurons while it runs: after the norm and the activation function that follow them.

Hooks on modules cannot do this in general: activation functions may be plain functions, and in-place functions
overwrite what a hook saw. So the layer's result is followed from function to function.

Shapes: B batch, N neurons of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .functions import ACTIVATIONS, CONVOLUTIONS, NORMS, PRODUCTS, TRANSPOSED
from .neurons import Neurons, check_neurons
from .record import Call, Value, plain_name, record

PRODUCERS = {*CONVOLUTIONS, *TRANSPOSED, *PRODUCTS, "linear", "addmm"}


@dataclass(frozen=True)
class Activations:
    """Where to read each layer: the functions its result goes through, such as ("conv2d", "batch_norm", "relu").

    A layer that is used several times is read after the functions that follow all its uses alike. `copied` are layers
    whose activations a later function overwrites; `axis` is the axis that counts the rows of the layer, 1 or -1; `rows`
    are the places on it that belong to each neuron, see `by_neuron`.
    """

    chains: dict[str, tuple[str, ...]]
    copied: frozenset[str]
    axis: dict[str, int]
    rows: dict[str, Tensor]


@dataclass
class Seen:
    """Activations of the last forward pass: for each layer a list of tensors [B, ..., N, ...], one per use."""

    values: dict[str, list[Tensor]] = field(default_factory=dict)


def find_activations(neurons: Neurons, layers: Sequence[str] | None = None) -> Activations:
    """Find where the neurons of the layers (by default all that can be sliced) can be read, by one run.

    >>> find_activations(neurons).chains["features.0.0"]
    ('conv2d', 'batch_norm', 'relu')
    """
    check_neurons(neurons)
    wanted = neurons.layers if layers is None else set(layers)
    calls = record(neurons.model, neurons.example, neurons.output).calls
    readers: dict[Value, list[Call]] = {}
    for call in calls:
        for value in dict.fromkeys(call.inputs):
            readers.setdefault(value, []).append(call)
    chains: dict[str, tuple[str, ...]] = {}
    copied = set()
    for call in calls:
        if call.module not in wanted or call.name not in PRODUCERS:
            continue
        chain, end = _follow(call, readers)
        before = chains.get(call.module, chain)
        chains[call.module] = tuple(name for name, other in zip(chain, before, strict=False) if name == other)
        if any(end in reader.overwritten for reader in readers.get(end, [])):
            copied.add(call.module)
    axis = {name: neurons.layers[name].axis for name in chains}
    return Activations(chains, frozenset(copied), axis, {name: neurons.places(name) for name in chains})


def by_neuron(values: Tensor, rows: Tensor) -> Tensor:
    """Join the rows of every neuron of a layer, [R, rows, P] -> [R, N, k * P], by their places [N, k] (-1 is none)."""
    if rows.shape[1] == 1 and len(rows) == values.shape[1]:
        return values
    found = values[:, rows.to(values.device)]  # [R, N, k, P]
    return found.masked_fill((rows < 0).to(values.device)[..., None], 0).flatten(2)


def _follow(call: Call, readers: dict[Value, list[Call]]) -> tuple[tuple[str, ...], Value]:
    """Follow a layer's result through one norm and one activation function, as long as nothing else reads it."""
    chain: tuple[str, ...] = (call.name,)
    value = call.outputs[0]
    for kind in (NORMS, ACTIVATIONS):
        following = readers.get(value, [])
        if len(following) == 1 and following[0].name in kind and following[0].inputs[0] is value:
            chain, value = (*chain, following[0].name), following[0].outputs[0]
    return chain, value


class _Reading(TorchFunctionMode):
    def __init__(self, model: nn.Module, where: Activations) -> None:
        super().__init__()
        self.where, self.seen = where, Seen()
        self.layer_of = {id(model.get_submodule(layer).weight): layer for layer in where.chains}
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
        if name in PRODUCERS:
            for given in (*args, *kwargs.values()):
                if id(given) in self.layer_of:
                    return self._arrived(self.layer_of[id(given)], 0, result)
        known = self.followed.get(id(source))
        if known is not None and known[0] is source:
            _, layer, place = known
            if self.where.chains[layer][place + 1] == name:
                del self.followed[id(source)]
                return self._arrived(layer, place + 1, result)
        return result

    def _arrived(self, layer: str, place: int, result: Tensor) -> Tensor:
        if place < len(self.where.chains[layer]) - 1:
            self.followed[id(result)] = (result, layer, place)
            return result
        self.seen.values.setdefault(layer, []).append(result)
        return result.clone() if layer in self.where.copied else result  # the model goes on with what it may overwrite


@contextlib.contextmanager
def reading(model: nn.Module, where: Activations) -> Iterator[Seen]:
    """Collect the activations of every layer when `model` runs, once, inside the block.

    They belong to the autograd graph, so gradients with respect to them can be taken, and stay as they were read.

    >>> with reading(model, find_activations(neurons)) as seen:
    ...     logits = model(task.example)
    >>> seen.values["features.0.0"][0].shape
    torch.Size([2, 8, 8, 8])
    """
    mode = _Reading(model, where)
    with mode:
        yield mode.seen
