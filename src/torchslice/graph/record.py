"""Run a model once and write down every tensor function it calls.

Any Python in `forward` is fine. The run is on tensors without values, which takes hardly any time or memory, and on
real ones where that fails. What cannot be followed (control flow on values, scripted or compiled parts) is refused with
the name of the layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import TorchsliceError, first_line
from ..inputs import (
    Inputs,
    Output,
    batch_size,
    call_model,
    describe,
    leaves,
    logits_of,
    map_leaves,
    map_tensors,
    tensors,
)
from .functions import CASTS, CONVOLUTIONS, LEAVES_TORCH, SLOW_WITHOUT_VALUES
from .views import view_of


class Size(int):
    """A number that was read from an attribute of a module, or is a part of one, and of which."""

    module: str
    attribute: str
    place: int | None  # in a tuple
    parts: int  # by which it was divided

    @classmethod
    def of(cls, number: int, module: str, attribute: str, place: int | None = None, parts: int = 1) -> Size:
        """Return a number with its origin."""
        size = cls(number)
        size.module, size.attribute, size.place, size.parts = module, attribute, place, parts
        return size

    def __floordiv__(self, by: Any) -> Any:
        part = int(self) // by
        if not isinstance(by, int) or part * by != self:
            return part
        return Size.of(part, self.module, self.attribute, self.place, self.parts * int(by))


@dataclass(frozen=True, eq=False)
class Value:
    """One tensor at one moment of the run."""

    shape: tuple[int, ...]
    dynamic: bool  # depends on the model's input
    parameter: str | None = None  # full name, if it is a parameter or buffer of the model
    learned: bool = False  # depends on a parameter


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
    module: str  # innermost module that was running, or the layer whose weight it took


@dataclass(frozen=True)
class Assumption:
    """A value that the model read into Python and that depends on its input alone, such as whether a mask is full."""

    module: str
    function: str
    value: Any

    def __str__(self) -> str:
        return f"{self.function} of a value in {self.module or 'its forward'!r} is {self.value}"


@dataclass
class Recording:
    """Everything one run of the model did."""

    calls: list[Call] = field(default_factory=list)
    output: Value | None = None
    module_outputs: dict[str, list[Value]] = field(default_factory=dict)  # what each module returned, call by call
    taken: set[str] = field(default_factory=set)  # layers whose weights other modules took and ran by themselves
    reads: list[Any] = field(default_factory=list)  # all values that were read into Python
    assumptions: list[Assumption] = field(default_factory=list)  # those that depend on the input
    dry: bool = False  # whether it was a run without values
    failure: Exception | None = None  # why the run ended early
    where: str = ""  # in which module it did


def plain_name(function: Callable[..., Any]) -> str:
    """Return the bare name of a torch function: `Tensor.__iadd__`, `Tensor.add_` and `torch.add` are all "add"."""
    parts = (resolve_name(function) or getattr(function, "__name__", "?")).split(".")
    return (parts[-2] if parts[-1] == "__get__" else parts[-1]).strip("_")


def reads_a_value(function: Callable[..., Any], name: str) -> bool:
    """Whether a torch function turns a tensor into Python; `x.int()` stays a tensor, `int(x)` does not."""
    return name in LEAVES_TORCH and (name not in CASTS or function.__name__.startswith("__"))


class _Recorder(TorchFunctionMode):
    """Writes down what a model does; with `replay`, values are not read from tensors but taken from an earlier run."""

    def __init__(self, modules: Mapping[str, nn.Module], replay: Sequence[Any] | None = None) -> None:
        super().__init__()
        self.recording = Recording()
        self.replay = None if replay is None else iter(replay)
        self.stack: list[str] = [""]
        self.names = {id(module): name for name, module in modules.items()}
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        layers = {name: module.weight for name, module in modules.items() if isinstance(module, kinds)}
        # Tensors of the model itself may have been taken by code that will not know a smaller copy.
        self.layers = {name for name, weight in layers.items() if isinstance(weight, Tensor) and weight.is_meta}
        self.known = WeakTensorKeyDictionary()  # tensor -> (its version, Value)
        for path, module in modules.items():
            tensors = {**vars(module), **module._parameters, **module._buffers}  # plain attributes are constants
            for key, tensor in tensors.items():
                if isinstance(tensor, Tensor) and tensor not in self.known:
                    learned = isinstance(tensor, nn.Parameter)
                    name = f"{path}.{key}" if path else key
                    self.learn(tensor, Value(tuple(tensor.shape), False, name, learned))

    def learn(self, tensor: Tensor, value: Value) -> Value:
        self.known[tensor] = (tensor._version, value)
        return value

    def value(self, tensor: Tensor) -> Value:
        """Return the Value a tensor stands for now; a write through an alias shows as a call nothing is known about."""
        if tensor not in self.known:
            raise TorchsliceError(
                f"cannot follow the model: in {self.stack[-1] or 'its forward'!r} a tensor appears that no "
                "visible torch function "
                "made (a scripted or compiled function?). Replace that part by plain torch functions."
            )
        version, value = self.known[tensor]
        if tensor._version != version:
            written = self.learn(tensor, Value(tuple(tensor.shape), value.dynamic, value.parameter, value.learned))
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
        name = plain_name(func)
        dynamic, learned = any(value.dynamic for value in inputs), any(value.learned for value in inputs)
        if inputs and reads_a_value(func, name):
            if dynamic and learned:
                raise TorchsliceError(
                    f"cannot follow the model: {self.stack[-1] or 'its forward'!r} reads a tensor's value into "
                    f"Python ({name}), so what it "
                    "does may change with the data. Replace that branch by tensor functions, or slice the parts "
                    "around it."
                )
            result = func(*args, **kwargs) if self.replay is None else next(self.replay)
            self.recording.reads.append(result)
            if dynamic:
                self.recording.assumptions.append(Assumption(self.stack[-1], name, result))
            return result
        if isinstance(func, torch._ops.OpOverload) and any(tensor.is_meta for tensor, *_ in read):
            raise RuntimeError("what runs below the torch functions is only seen with values")
        result = self.ran(func, name, args, kwargs)
        made = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        if not made:
            if name != "setitem":
                return result
            made = [args[0]]  # x[...] = y changes x
        overwritten = tuple(value for tensor, version, value in read if tensor._version != version)
        outputs = tuple(self.learn(tensor, Value(tuple(tensor.shape), dynamic, None, learned)) for tensor in made)
        module = self.layer_of(name, inputs)
        call = Call(name, func, plain_args, plain_kwargs, tuple(inputs), outputs, overwritten, module)
        self.recording.calls.append(call)
        return result

    def layer_of(self, name: str, inputs: Sequence[Value]) -> str:
        """Return the module that runs, or the layer of which it took the weight to run it by itself."""
        running = self.stack[-1]
        taken = [(value.parameter or "").removesuffix(".weight") for value in inputs[1:2]]
        if (name == "linear" or name in CONVOLUTIONS) and taken[0] != running and taken[0] in self.layers:
            self.recording.taken.add(taken[0])
            return taken[0]
        return running

    def ran(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a function returns; where there are no values, that may be known without running it."""
        x: Any = args[0] if args else kwargs.get("input")
        weight: Any = args[1] if len(args) > 1 else kwargs.get("weight")
        if name == "linear" and x.is_meta and x.shape[-1:] == weight.shape[1:] and x.dtype == weight.dtype:
            return x.new_empty(*x.shape[:-1], len(weight))
        if name not in SLOW_WITHOUT_VALUES or not isinstance(x, Tensor) or not x.is_meta:
            return func(*args, **kwargs)
        return x.zero_() if kwargs.get("inplace") or func.__name__.endswith("_") else torch.empty_like(x)

    def entered(self, module: nn.Module, args: Any) -> None:
        self.stack.append(self.names.get(id(module), type(module).__name__))

    def left(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self.stack.pop()
        if isinstance(output, Tensor) and output in self.known:
            self.recording.module_outputs.setdefault(name, []).append(self.known[output][1])


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in eval mode without gradients, and every module back into its own mode afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()  # also where all are: modules may drop here what they kept of other weights
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.training = mode


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products on a GPU in float32, not in TF32, which has three digits: too few to compare by."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    try:
        convolutions.allow_tf32 = products.allow_tf32 = False
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


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
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if nn.parameter.is_lazy(tensor):
                where = f"{name}.{key}" if name else key
                raise TorchsliceError(f"{where!r} has no shape yet (a lazy layer); run the model on real data first.")


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
    found = dry_run(model, example, output)
    if found.failure is not None:  # it needs values, or says so in other words
        found = run_recorded(view_of(model), example, output)
    if isinstance(found.failure, TorchsliceError):
        raise found.failure
    if found.failure is not None:
        raise TorchsliceError(
            f"the model cannot run on the example ({describe(example)}): {found.where or 'its forward'!r} says: "
            f"{first_line(found.failure)}. "
            "Give an example batch of the structure, shapes, types and device the model was made for."
        ) from found.failure
    return found


def dry_run(
    model: nn.Module, example: Inputs, output: Output = None, *, replay: Sequence[Any] | None = None
) -> Recording:
    """Run a model on tensors without values; what it reads into Python comes from an earlier run, `replay`."""
    empty = map_tensors(lambda tensor: tensor.to("meta"), example)
    found = run_recorded(view_of(model, device="meta"), empty, output, replay=replay)
    found.dry = True
    return found


def run_recorded(view: nn.Module, example: Inputs, output: Output, *, replay: Sequence[Any] | None = None) -> Recording:
    """Run a view of a model, which may be changed, and return what it did, up to a failure."""
    modules = dict(view.named_modules())
    for name, module in modules.items():
        module.__dict__.update(sizes_of(module, name))
    recorder = _Recorder(modules, replay)
    found = recorder.recording
    for tensor in tensors(example):
        recorder.learn(tensor, Value(tuple(tensor.shape), True))
    for module in modules.values():
        module.register_forward_pre_hook(recorder.entered, prepend=True)
        module.register_forward_hook(recorder.left)
    try:
        with evaluating(view), recorder:
            result = call_model(view, example)
        logits = logits_of(result, output)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != batch_size(example):
            raise TorchsliceError(
                f"the model must return logits [B, C] for a batch of {batch_size(example)}; it returned "
                f"{describe(logits)}. Say where they are: output=lambda result: result[0]."
            )
        found.output = recorder.value(logits)
    except Exception as error:
        found.failure, found.where = error, recorder.stack[-1]
    return found


def sizes_of(module: nn.Module, name: str) -> dict[str, Any]:
    """Return the whole numbers among the attributes of a module, alone or in tuples, with their origin.

    Those of PyTorch's own layers are known, see layers.py.
    """
    found: dict[str, Any] = {}
    for key, value in {} if type(module).__module__.startswith("torch.nn.") else vars(module).items():
        if type(value) is int:
            found[key] = Size.of(value, name, key)
        elif type(value) is tuple and value and all(type(item) is int for item in value):
            found[key] = tuple(Size.of(item, name, key, place) for place, item in enumerate(value))
    return found
