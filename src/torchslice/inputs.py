"""What goes into a model and what comes out: inputs are a tensor, or a tuple, list or dictionary of inputs.

A tensor is given to a model as `model(x)`, a tuple or list as `model(*x)`, a dictionary as `model(**x)`. Every tensor
has the samples on its first axis.

Shapes: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .errors import TorchsliceError

Inputs = Any
Output = Callable[[Any], Tensor] | None


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to everything in nested tuples, lists and dictionaries.

    >>> map_leaves(lambda number: 2 * number, {"a": (1, [2])})
    {'a': (2, [4])}
    """
    if isinstance(tree, tuple | list):
        kind = list if isinstance(tree, list) else tuple
        return kind(map_leaves(function, item) for item in tree)
    if isinstance(tree, dict):
        return {key: map_leaves(function, item) for key, item in tree.items()}
    return function(tree)


def paths(tree: Any, name: str = "inputs") -> list[tuple[str, Any]]:
    """List everything in nested tuples, lists and dictionaries with its place, such as ("inputs['pixels']", tensor)."""
    if isinstance(tree, tuple | list | dict):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return [found for key, item in items for found in paths(item, f"{name}[{key!r}]")]
    return [(name, tree)]


def leaves(tree: Any) -> list[Any]:
    """List everything in nested tuples, lists and dictionaries, in order."""
    return [leaf for _, leaf in paths(tree)]


def map_tensors(function: Callable[[Tensor], Any], inputs: Inputs) -> Inputs:
    """Apply a function to every tensor of some inputs; whatever else is in them stays as it is."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, inputs)


def tensors(inputs: Inputs) -> list[Tensor]:
    """List the tensors of some inputs, in order."""
    return [leaf for leaf in leaves(inputs) if isinstance(leaf, Tensor)]


def batch_size(inputs: Inputs) -> int:
    """Return B, the length of the first tensor; raise if there is no tensor, or if the others differ.

    >>> batch_size({"pixels": torch.zeros(4, 3, 8, 8), "age": torch.zeros(4)})
    4
    """
    named = [(name, leaf) for name, leaf in paths(inputs) if isinstance(leaf, Tensor)]
    if not named or any(leaf.dim() == 0 for _, leaf in named):
        raise TorchsliceError(
            "inputs must be tensors with the samples on their first axis: a tensor, a tuple or a dictionary of "
            f"tensors; got {describe(inputs)}."
        )
    first, size = named[0][0], len(named[0][1])
    for name, leaf in named:
        if len(leaf) != size:
            raise TorchsliceError(
                f"all inputs of a batch need the same number of samples; {first} has {size}, {name} has {len(leaf)}."
            )
    return size


def take(inputs: Inputs, rows: Any) -> Inputs:
    """Return the samples that an index tensor, a bool mask or a range selects, from every tensor."""
    return map_tensors(lambda tensor: tensor[rows], inputs)


def kept_tokens(inputs: Inputs) -> Tensor | None:
    """Return which tokens are no padding, bool [B, T]: the `attention_mask` of a dictionary of inputs; None without.

    >>> kept_tokens({"attention_mask": torch.tensor([[1, 1, 0]])})
    tensor([[ True,  True, False]])
    """
    mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def to_device(inputs: Inputs, device: torch.device | str) -> Inputs:
    """Move every tensor to a device."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), inputs)


def join(parts: Sequence[Inputs]) -> Inputs:
    """Put batches of the same structure one after the other.

    >>> join([(torch.zeros(2, 3),), (torch.ones(1, 3),)])[0].shape
    torch.Size([3, 3])
    """
    first = parts[0]
    for part in parts[1:]:
        check_like(part, first)
    columns = zip(*(leaves(part) for part in parts), strict=True)
    joined = iter([torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns])
    return map_leaves(lambda _: next(joined), first)


def check_like(given: Inputs, expected: Inputs, *, padded: bool = False) -> None:
    """Raise unless inputs have the structure, kinds of numbers and sizes per sample of others; names the leaf.

    Where samples are `padded` batch by batch, whole numbers such as token ids may be of any length.
    """
    mine, theirs = dict(paths(given)), dict(paths(expected))
    for name in {**theirs, **mine}:
        if name not in mine or name not in theirs:
            what = "is missing" if name not in mine else "is not expected"
            raise TorchsliceError(f"{name} {what}: expected are {describe(expected)}, given {describe(given)}.")
        pair = (mine[name], theirs[name])
        kinds = [isinstance(leaf, Tensor) and _kind(leaf, padded) for leaf in pair]
        if kinds[0] != kinds[1]:
            raise TorchsliceError(f"{name} must be like {describe(theirs[name])}, got {describe(mine[name])}.")


def _kind(tensor: Tensor, padded: bool) -> tuple[Any, ...]:
    numbers = tensor.is_floating_point()
    return (tensor.dim() if padded and not numbers else tensor.shape[1:], numbers)


def describe(thing: Any) -> str:
    """Say in a few words what something is.

    >>> describe({"pixels": torch.zeros(2, 3), "age": torch.zeros(2)})
    "{'pixels': a tensor float32 [2, 3], 'age': a tensor float32 [2]}"
    """
    if isinstance(thing, Tensor):
        return f"a tensor {str(thing.dtype).removeprefix('torch.')} {list(thing.shape)}"
    if isinstance(thing, dict):
        return "{" + ", ".join(f"{key!r}: {describe(item)}" for key, item in thing.items()) + "}"
    if isinstance(thing, tuple | list):
        return "(" + ", ".join(describe(item) for item in thing) + ")"
    return f"{type(thing).__name__} {thing}" if isinstance(thing, str | int | float | bool) else type(thing).__name__


def call_model(model: Callable[..., Any], inputs: Inputs) -> Any:
    """Call a model on inputs: a tensor as it is, a tuple or list as arguments, a dictionary as keyword arguments."""
    if isinstance(inputs, dict):
        _check_length(model, inputs)
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def _check_length(model: Any, inputs: dict[str, Any]) -> None:
    """Raise for texts of more tokens than a network of transformers has places for."""
    tokens = inputs.get("input_ids")
    if isinstance(tokens, Tensor) and isinstance(model, nn.Module):
        configs = (module.config for module in model.modules() if hasattr(module, "config"))
        most = getattr(next(configs, None), "max_position_embeddings", None)
        if most is not None and tokens.shape[-1] > most:
            raise TorchsliceError(
                f"a batch has texts of {tokens.shape[-1]} tokens, and the model takes {most} at most. Shorten them "
                "where they are tokenised (truncation=True, max_length=...)."
            )


def logits_of(result: Any, output: Output = None) -> Tensor:
    """Return the logits in what a model returned: what `output` picks, else the result itself or its `logits`."""
    if output is not None:
        return output(result)
    if isinstance(result, Tensor):
        return result
    found = result.get("logits") if isinstance(result, dict) else getattr(result, "logits", None)
    if not isinstance(found, Tensor):
        raise TorchsliceError(
            f"the model returned {describe(result)}, in which the logits [B, C] are not known. "
            "Say where they are: output=lambda result: result[0]."
        )
    return found


def run(model: Callable[..., Any], inputs: Inputs, output: Output = None) -> Tensor:
    """Run a model on inputs and return its logits, [B, C]."""
    return logits_of(call_model(model, inputs), output)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer; the CPU for a model that has none."""
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))
