"""Run a model once and write down every tensor function it calls.

The model runs as it is, on real tensors, so any Python in `forward` is fine; what cannot be followed (control flow on
values, scripted or compiled parts) is refused with the name of the layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from ..errors import TorchsliceError, first_line
from ..inputs import Inputs, Output, batch_size, call_model, describe, leaves, logits_of, map_leaves, tensors
from .functions import LEAVES_TORCH
from .views import view_of


@dataclass(frozen=True, eq=False)
class Value:
    """One tensor at one moment of the run."""

    shape: tuple[int, ...]
    dynamic: bool  # depends on the model's input
    parameter: str | None = None  # full name, if it is a parameter or buffer of the model


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a tensor function; tensors in `args` and `kwargs` are replaced by their Values."""

    name: str  # last part of the function's name, without underscores: "conv2d", "add", "getitem"
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Value, ...]  # the Values among args and kwargs
    outputs: tuple[Value, ...]
    overwritten: tuple[Value, ...]  # the inputs that were changed in place
    module: str  # innermost module that was running


@dataclass
class Recording:
    """Everything one run of the model did."""

    calls: list[Call] = field(default_factory=list)
    output: Value | None = None
    module_outputs: dict[str, list[Value]] = field(default_factory=dict)  # what each module returned, call by call


def plain_name(function: Callable[..., Any]) -> str:
    """Return the bare name of a torch function: `Tensor.__iadd__`, `Tensor.add_` and `torch.add` are all "add"."""
    parts = (resolve_name(function) or getattr(function, "__name__", "?")).split(".")
    return (parts[-2] if parts[-1] == "__get__" else parts[-1]).strip("_")


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.recording = Recording()
        self.stack: list[str] = [""]
        self.names = {id(module): name for name, module in model.named_modules()}
        # id(tensor) -> (tensor, its version, Value); the tensor is kept so that its id stays its own
        self.known: dict[int, tuple[Tensor, int, Value]] = {}
        for path, module in model.named_modules():
            tensors = {**vars(module), **module._parameters, **module._buffers}  # plain attributes are constants
            for key, tensor in tensors.items():
                if isinstance(tensor, Tensor) and id(tensor) not in self.known:
                    self.learn(tensor, Value(tuple(tensor.shape), False, f"{path}.{key}" if path else key))

    def learn(self, tensor: Tensor, value: Value) -> Value:
        self.known[id(tensor)] = (tensor, tensor._version, value)
        return value

    def value(self, tensor: Tensor) -> Value:
        """Return the Value a tensor stands for now; a write through an alias shows as a call nothing is known about."""
        if id(tensor) not in self.known:
            raise TorchsliceError(
                f"cannot follow the model: in {self.stack[-1] or 'its forward'!r} a tensor appears that no "
                "visible torch function "
                "made (a scripted or compiled function?). Replace that part by plain torch functions."
            )
        _, version, value = self.known[id(tensor)]
        if tensor._version != version:
            written = self.learn(tensor, Value(tuple(tensor.shape), value.dynamic, value.parameter))
            self.recording.calls.append(
                Call("write through a view", torch.clone, (value,), {}, (value,), (written,), (value,), self.stack[-1])
            )
            return written
        return value

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs: list[Value] = []
        read: list[tuple[Tensor, int, Value]] = []

        def note(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            inputs.append(self.value(leaf))
            read.append((leaf, leaf._version, inputs[-1]))
            return inputs[-1]

        plain_args, plain_kwargs = map_leaves(note, args), map_leaves(note, kwargs)
        result = func(*args, **kwargs)
        name = plain_name(func)
        dynamic = any(value.dynamic for value in inputs)
        made = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        if not made:
            if dynamic and name in LEAVES_TORCH:
                raise TorchsliceError(
                    f"cannot follow the model: {self.stack[-1] or 'its forward'!r} reads a tensor's value into "
                    f"Python ({name}), so what it "
                    "does may change with the data. Replace that branch by tensor functions, or slice the parts "
                    "around it."
                )
            if name != "setitem":
                return result
            made = [args[0]]  # x[...] = y changes x
        overwritten = tuple(value for tensor, version, value in read if tensor._version != version)
        outputs = tuple(self.learn(tensor, Value(tuple(tensor.shape), dynamic)) for tensor in made)
        call = Call(name, func, plain_args, plain_kwargs, tuple(inputs), outputs, overwritten, self.stack[-1])
        self.recording.calls.append(call)
        return result

    def entered(self, module: nn.Module, args: Any) -> None:
        self.stack.append(self.names.get(id(module), type(module).__name__))

    def left(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self.stack.pop()
        if isinstance(output, Tensor) and id(output) in self.known:
            self.recording.module_outputs.setdefault(name, []).append(self.known[id(output)][2])


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in eval mode without gradients, and every module back into its own mode afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_model(model: nn.Module) -> None:
    """Raise for what is not a plain nn.Module, with the way to unwrap it."""
    if not isinstance(model, nn.Module):
        raise TorchsliceError(f"expected an nn.Module, got {type(model).__name__}.")
    kind = type(model).__name__
    unwrap = {
        "DistributedDataParallel": "model.module",
        "FullyShardedDataParallel": "the unsharded model",
        "DataParallel": "model.module",
        "OptimizedModule": "model._orig_mod",
    }
    if kind in unwrap:
        raise TorchsliceError(f"the model is wrapped ({kind}); pass {unwrap[kind]} instead.")
    if isinstance(model, torch.jit.ScriptModule):
        raise TorchsliceError(
            "the model is a ScriptModule, which cannot be cut into plain layers; pass the nn.Module it was made from."
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise TorchsliceError(f"{name!r} has no shape yet (a lazy layer); run the model once on real data first.")


def record(model: nn.Module, example: Inputs, output: Output = None) -> Recording:
    """Run a view of `model` in eval mode on an example and return what it did; the model is left alone.

    Raises TorchsliceError for wrapped models, an example that the model cannot take, control flow on values, and an
    output that is not [B, C].
    """
    check_model(model)
    if torch.is_inference_mode_enabled():
        raise TorchsliceError("a model cannot be looked at inside torch.inference_mode(); leave that block first.")
    size = batch_size(example)
    if size == 0:
        raise TorchsliceError("the example has no samples; give a batch of one at least.")
    view = view_of(model)
    recorder = _Recorder(view)
    for tensor in tensors(example):
        recorder.learn(tensor, Value(tuple(tensor.shape), True))
    for module in view.modules():
        module.register_forward_pre_hook(recorder.entered, prepend=True)
        module.register_forward_hook(recorder.left)
    try:
        with evaluating(view), recorder:
            result = call_model(view, example)
    except TorchsliceError:
        raise
    except Exception as error:
        where = recorder.stack[-1] or "its forward"
        raise TorchsliceError(
            f"the model cannot run on the example ({describe(example)}): {where!r} says: {first_line(error)}. "
            "Give an example batch of the structure, shapes, types and device the model was made for."
        ) from error
    logits = logits_of(result, output)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != size:
        raise TorchsliceError(
            f"the model must return logits [B, C] for a batch of {size}; it returned {describe(logits)}. "
            "Say where they are: output=lambda result: result[0]."
        )
    recorder.recording.output = recorder.value(logits)
    return recorder.recording
