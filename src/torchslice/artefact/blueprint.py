"""The blueprint of a network: its modules, their settings and its tensors as plain data, in place of its constructors.

modules     path -> module, a shared one under its first path:
                class           "package.module:Name"
                attributes      name -> value, for all in `vars(module)` that not every nn.Module has
                parameters      name -> name of a tensor, or null
                buffers         likewise
                non_persistent  names of the buffers that are not in the state_dict
                modules         name -> path of a module, or null
tensors     name -> tensor, a shared one under its first name; one in an attribute is called ".constant0" and so on:
                dtype, shape    "float32", [16, 3, 3, 3]
                strides         of a dense tensor that is not contiguous, such as channels_last; null for any other
                parameter, requires_grad
configs     configurations of transformers, each once: class, attributes

Numbers, text, booleans, null and lists stand for themselves. Any other value is an object with one key, its kind:
tuple, set, frozenset, size, dict, ordered_dict, float (nan and infinity), dtype, device, name (of a class or function),
enum, partial, tensor, weakref (to a tensor), module, method (of the module itself), config (its number).
"""

from __future__ import annotations

import enum
import functools
import inspect
import json
import math
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import TorchsliceError
from ..graph.record import check_model
from ..graph.views import HOOKS
from .names import is_config, name_of, resolve

# What every module has is recorded as structure, not as attributes; what nn.Module.compile makes is left out.
OWN = {*vars(nn.Module()), "_compiled_call_impl"}
MODULE = {"class", "attributes", "parameters", "buffers", "non_persistent", "modules"}
MAPPINGS: dict[str, type] = {"dict": dict, "ordered_dict": OrderedDict}
CONTAINERS: dict[str, type] = {"tuple": tuple, "set": set, "frozenset": frozenset, "size": torch.Size, **MAPPINGS}
KIND_OF = {kind: name for name, kind in CONTAINERS.items()}


# -- describing -------------------------------------------------------------------------------------------------------
def describe(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the blueprint of a network and its tensors by name, or raise an error that names what has no record.

    >>> blueprint, tensors = describe(nn.Linear(3, 2))
    >>> blueprint["modules"][""]["attributes"], list(tensors)
    ({'in_features': 3, 'out_features': 2}, ['weight', 'bias'])
    """
    check_model(model)
    describer = _Describer(model)
    signatures = {name: _signature(tensor) for name, tensor in describer.tensors.items()}
    return {"modules": describer.modules, "tensors": signatures, "configs": describer.configs}, describer.tensors


class _Describer:
    """The modules and tensors of one network, each recorded once."""

    def __init__(self, model: nn.Module) -> None:
        modules = dict(nn.Module.named_modules(model))
        self.paths = {id(module): path for path, module in modules.items()}
        self.tensors: dict[str, Tensor] = {}
        self.configs: list[dict[str, Any]] = []
        self._numbers: dict[int, int] = {}  # id of a configuration -> its place among them
        self._names: dict[tuple[Any, ...], str] = {}
        called = {path: f"module {path!r} ({type(module).__name__})" for path, module in modules.items() if path}
        called[""] = f"the {type(model).__name__}"
        self.modules = {path: self.structure(path, module, called[path]) for path, module in modules.items()}
        for path, module in modules.items():  # now that all tensors have their names
            self.modules[path]["attributes"] = {
                name: self.attribute(module, name, value, f"attribute {name!r} of {called[path]}")
                for name, value in vars(module).items()
                if name not in OWN
            }

    def structure(self, path: str, module: nn.Module, where: str) -> dict[str, Any]:
        """Return the record of a module without its attributes."""
        if parametrize.is_parametrized(module):
            remedy = "torch.nn.utils.parametrize.remove_parametrizations(module, name)"
            raise TorchsliceError(f"cannot save {where}: it is parametrized. Call {remedy} for it first.")
        # Hooks of state_dict and load_state_dict are not kept: they change files, not what the network computes.
        if hooked := [name for name in HOOKS if vars(module).get(name)]:
            raise TorchsliceError(
                f"cannot save {where}: it has a hook in {hooked[0]}, code that is outside of its class. Remove it "
                "first: handle.remove(), or remove_weight_norm, remove_spectral_norm or prune.remove."
            )
        prefix = path and f"{path}."
        return {
            "class": name_of(type(module), f"the class of {where}"),
            "attributes": {},
            "parameters": {name: self.tensor(t, prefix + name) for name, t in module._parameters.items()},
            "buffers": {name: self.tensor(t, prefix + name) for name, t in module._buffers.items()},
            "non_persistent": sorted(module._non_persistent_buffers_set),
            "modules": {_checked(n): None if m is None else self.paths[id(m)] for n, m in module._modules.items()},
        }

    def tensor(self, tensor: Tensor | None, name: str, where: str = "") -> str | None:
        """Return the name of a tensor, which is `name` if it has none yet."""
        if tensor is None:
            return None
        key = _identity(tensor)
        if key not in self._names:
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
                raise TorchsliceError(
                    f"cannot save {where or f'tensor {name!r}'}: it is a {type(tensor).__name__} of {tensor.layout} "
                    f"and {tensor.dtype}; an artefact keeps plain dense tensors. Convert it first."
                )
            self._names[key], self.tensors[name] = name, tensor
        return self._names[key]

    def attribute(self, module: nn.Module, name: str, value: Any, where: str) -> Any:
        """Return the plain data of an attribute of a module; only a method may take the place of a method."""
        own = isinstance(value, types.MethodType) and value.__self__ is module
        if own and value.__func__ is getattr(type(module), value.__name__, None):
            return {"method": value.__name__}
        if inspect.isroutine(getattr(type(module), name, None)):
            remedy = "Write a class that has this code as its method."
            raise TorchsliceError(f"cannot save {where}: it replaces the method of the class by other code. {remedy}")
        try:
            return self.value(value, where)
        except RecursionError as error:
            raise TorchsliceError(f"cannot save {where}: it is nested too deep, or holds itself.") from error

    def value(self, value: Any, where: str) -> Any:
        """Return the plain data of a value."""
        kind = type(value)
        if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
            return value
        if kind is list:
            return [self.value(item, where) for item in value]
        if kind in KIND_OF:
            items = self.value([[*pair] for pair in value.items()] if isinstance(value, dict) else [*value], where)
            return {KIND_OF[kind]: sorted(items, key=json.dumps) if isinstance(value, set | frozenset) else items}
        if kind is float:
            return {"float": repr(value)}
        if kind in (torch.dtype, torch.device):
            return {kind.__name__: str(value).removeprefix("torch.")}
        if isinstance(value, numpy.generic) and isinstance(value.item(), bool | int | float | str):
            return self.value(value.item(), where)
        if isinstance(value, enum.Enum):
            return {"enum": [name_of(kind, where), value.name]}
        if kind is functools.partial:
            return {"partial": self.value([value.func, [*value.args], value.keywords], where)}
        if isinstance(value, Tensor):
            return {"tensor": self.tensor(value, f".constant{len(self.tensors)}", where)}
        if kind is weakref.ref and isinstance(value(), Tensor | None):
            return {"weakref": self._names.get(_identity(value()))}
        if isinstance(value, nn.Module) and id(value) in self.paths:
            return {"module": self.paths[id(value)]}
        if is_config(kind):
            return {"config": self.config(value, where)}
        if isinstance(value, type) or (inspect.isroutine(value) and not isinstance(value, types.MethodType)):
            return {"name": name_of(value, where)}
        raise TorchsliceError(
            f"cannot save {where}: it holds a {kind.__module__}.{kind.__qualname__}, and an artefact keeps numbers, "
            "text, tensors, sub-modules, containers of these, and classes and functions by name. Replace it by such "
            "data, or remove it."
        )

    def config(self, value: Any, where: str) -> int:
        """Return the number of a configuration of transformers, which many modules share."""
        if id(value) not in self._numbers:
            record: dict[str, Any] = {"class": name_of(type(value), f"the class of {where}")}
            self._numbers[id(value)] = len(self.configs)
            self.configs.append(record)
            items = vars(value).items()
            record["attributes"] = {name: self.value(entry, f"{where}, {name!r}") for name, entry in items}
        return self._numbers[id(value)]


def _identity(tensor: Tensor | None) -> tuple[Any, ...]:
    """Return what two tensors have in common if they are the same, or the same view of one memory."""
    if tensor is None or tensor.layout != torch.strided or not tensor.data_ptr():
        return (id(tensor),)
    place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    return (*place, type(tensor), tensor.requires_grad)


def _signature(tensor: Tensor) -> dict[str, Any]:
    """Return the record of a tensor; its memory layout decides which kernel runs, and so the last bits of results."""
    contiguous = torch.empty(tensor.shape, device="meta").stride()
    special = tensor.stride() != contiguous and is_dense(tensor.shape, tensor.stride())
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "strides": list(tensor.stride()) if special else None,
        "parameter": isinstance(tensor, nn.Parameter),
        "requires_grad": tensor.requires_grad and tensor.is_leaf,
    }


def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a tensor with these strides has its elements side by side, none twice and no gap."""
    size = 1
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length != 1 and stride != size:
            return False
        size *= length
    return all(0 < stride <= size for stride in strides)


# -- rebuilding -------------------------------------------------------------------------------------------------------
def rebuild(blueprint: Mapping[str, Any], tensors: Mapping[str, Tensor], *, allow_import: bool) -> nn.Module:
    """Return the network of a blueprint, in eval mode. No constructor runs, and the given tensors become its own.

    The tensors must have the recorded dtypes, shapes and strides. A blueprint that `describe` did not make can raise
    any kind of error; it neither takes memory nor, without `allow_import`, runs code of other packages.
    """
    builder = _Builder(blueprint, tensors, allow_import)
    model = builder.module("")
    builder.make_configs(blueprint["configs"])
    for path, module in builder.modules.items():
        for name, value in builder.records[path]["attributes"].items():
            vars(module)[_checked(name)] = builder.attribute(module, name, value)
    if unused := builder.records.keys() - builder.modules.keys() or builder.unused:
        raise TorchsliceError(f"no module holds {sorted(unused)[:3]}.")
    return model


class _Builder:
    def __init__(self, blueprint: Mapping[str, Any], tensors: Mapping[str, Tensor], allow_import: bool) -> None:
        self.records = blueprint["modules"]
        self.tensors = {}
        for name, entry in blueprint["tensors"].items():
            make = nn.Parameter if _of(bool, entry["parameter"]) else Tensor.requires_grad_
            self.tensors[name] = make(tensors[name], _of(bool, entry["requires_grad"]))
        self.unused = {*self.tensors}
        self.configs: list[Any] = []
        self.modules: dict[str, nn.Module] = {}  # those that are complete, but for their attributes
        self.resolve = functools.cache(functools.partial(resolve, allow_import=allow_import))

    def module(self, path: str) -> nn.Module:
        """Build a module and those below it, without attributes."""
        record = self.records[path]
        names = [_checked(name) for table in ("parameters", "buffers", "modules") for name in record[table]]
        if record.keys() != MODULE or len({*names}) != len(names):
            raise TorchsliceError(f"module {path!r} has the entries {[*record]}, and holds {names}.")
        module = object.__new__(self.subclass(nn.Module, record["class"]))
        nn.Module.__init__(module)
        module.training = False
        for table, kind in (("parameters", nn.Parameter), ("buffers", Tensor)):
            held = {n: None if t is None else self.tensor(t, kind) for n, t in record[table].items()}
            vars(module)[f"_{table}"].update(held)
        module._non_persistent_buffers_set.update(map(_checked, _of(list, record["non_persistent"])))
        for name, target in record["modules"].items():
            # Either a child of its own or, shared, one that is complete: so no module can hold itself.
            build = self.module if target == (path and f"{path}.") + name else self.modules.__getitem__
            module._modules[name] = None if target is None else build(target)
        self.modules[path] = module
        return module

    def make_configs(self, records: Any) -> None:
        """Make the configurations of transformers; they may hold each other."""
        kinds = [self.subclass(object, record["class"]) for record in _of(list, records)]
        if wrong := [kind for kind in kinds if not is_config(kind)]:
            raise TorchsliceError(f"{wrong[0].__name__} is no configuration of transformers.")
        self.configs = [object.__new__(kind) for kind in kinds]
        for config, record in zip(self.configs, records, strict=True):
            for name, value in record["attributes"].items():
                if name.startswith("__") or inspect.isroutine(getattr(type(config), name, None)):
                    raise TorchsliceError(f"{name!r} cannot be an attribute of a {type(config).__name__}.")
                vars(config)[name] = self.value(value)

    def subclass(self, base: type, name: str) -> Any:
        found = self.resolve(name)
        if not (isinstance(found, type) and issubclass(found, base)):
            raise TorchsliceError(f"{name!r} is no sub-class of {base.__name__}.")
        return found

    def tensor(self, name: str, kind: type = Tensor) -> Any:
        self.unused.discard(name)
        return _of(kind, self.tensors[name], name)

    def attribute(self, module: nn.Module, name: str, value: Any) -> Any:
        if isinstance(value, dict) and value.keys() == {"method"}:
            own = _checked(value["method"])
            function = getattr(type(module), own)
            if not inspect.isfunction(function) or function is getattr(nn.Module, own, None):
                raise TorchsliceError(f"{own!r} is no method of {type(module).__name__} itself.")
            return types.MethodType(function, module)
        if inspect.isroutine(getattr(type(module), name, None)):
            raise TorchsliceError(f"{name!r} is a method of {type(module).__name__}, which no value may replace.")
        return self.value(value)

    def value(self, value: Any) -> Any:
        """Return the Python value of plain data."""
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind in CONTAINERS:
            items = [_of(list, item) if kind in MAPPINGS else item for item in _of(list, content)]
            made = CONTAINERS[kind](self.value(items))
            if len(made) != len(items):
                raise TorchsliceError(f"a {kind} has two equal entries.")
            return made
        if kind == "enum":
            return self.subclass(enum.Enum, content[0]).__members__[content[1]]
        if kind == "partial":
            function, arguments, keywords = self.value(_of(list, content))
            return functools.partial(function, *_of(list, arguments), **keywords)
        if kind == "weakref":  # to nothing, if its tensor was gone
            return weakref.ref(torch.empty(0) if content is None else self.tensors[content])
        read: dict[str, Callable[[Any], Any]] = {
            "float": {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.__getitem__,
            "dtype": lambda name: _of(torch.dtype, getattr(torch, name), name),
            "device": torch.device,
            "name": self.resolve,
            "tensor": self.tensor,
            "module": self.modules.__getitem__,
            "config": self.configs.__getitem__,
        }
        return read[kind](content)


def _of(kind: type, value: Any, name: Any = None) -> Any:
    """Return a value, called `name`, which must be of a kind."""
    if not isinstance(value, kind):
        raise TorchsliceError(f"{value if name is None else name!r:.100} is no {kind.__name__}.")
    return value


def _checked(name: Any) -> str:
    """Return the name of an attribute, tensor or sub-module, which is refused where Python or torch uses it itself."""
    if type(name) is not str or not name or "." in name or name.startswith("__") or name in OWN:
        raise TorchsliceError(f"{name!r} cannot be the name of an attribute, tensor or sub-module; choose another.")
    return name
