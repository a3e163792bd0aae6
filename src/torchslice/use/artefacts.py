"""A network in one file: safetensors for the numbers, JSON in its metadata for the rest; nothing in it is executed.

The metadata key "torchslice" holds, beside the blueprint of the network (origin, layers, tensors, shared):
    format_version                              1
    classes, preprocessing, slice, metrics      plain data or null
    extension                                   likewise; absent from older files
    versions                                    of torchslice, torch and python
    sha256                                      over all of this and the bytes of every tensor
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ..errors import TorchsliceError
from ..files import atomic_write
from ..slices import Slice
from .blueprint import describe, rebuild, signature

FORMAT_VERSION = 1


def save(
    model: nn.Module,
    path: str | Path,
    *,
    factory: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    slice: Slice | Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    extension: Mapping[str, Any] | None = None,
) -> None:
    """Write a network, cut or not, to one safetensors file from which `load` rebuilds it bit for bit.

    The file is written whole or not at all, and only after the network was rebuilt from its blueprint as a check.

    Args:
        model: a network made by `models.create`, or cut from one; it carries its origin.
        path: file to write; its folder is made if it is missing.
        factory: "package.module:function" that builds the network before it was cut, for a model without an origin.
        arguments: keyword arguments of that factory.
        classes: name of the class behind each logit, in order; a loaded model's own by default.
        preprocessing: how images become inputs, such as `data.preprocessing`; a loaded model's own by default.
        slice: the neurons that were kept, for the record.
        metrics: figures to keep beside the weights.
        extension: tasks and slices of a network that learned classes later (`Extended.to_plain`); a loaded model's own
            by default.

    >>> save(small, "pets.safetensors", classes=["cat", "dog"], preprocessing=data.preprocessing)
    """
    blueprint, tensors = describe(model, factory, arguments)
    classes = getattr(model, "classes", None) if classes is None else classes
    content = {
        "format_version": FORMAT_VERSION,
        **blueprint,
        "classes": None if classes is None else list(classes),
        "preprocessing": getattr(model, "preprocessing", None) if preprocessing is None else preprocessing,
        "slice": slice.to_plain() if isinstance(slice, Slice) else slice,
        "metrics": metrics,
        "extension": getattr(model, "extension", None) if extension is None else extension,
        "versions": {"torchslice": _version(), "torch": torch.__version__, "python": platform.python_version()},
    }
    try:
        record = json.loads(json.dumps(content))
    except (TypeError, ValueError) as error:
        raise TorchsliceError(
            f"cannot save {path}: {error}. Arguments, classes, preprocessing, slice and metrics must be plain data: "
            "text, numbers, true or false, lists and dictionaries."
        ) from error
    try:
        rebuild(record, allow_import=True)
    except TorchsliceError as error:
        raise TorchsliceError(f"cannot save {path}, for it could not be loaded again: {error}") from error
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    record["sha256"] = _digest(record, stored)
    atomic_write(path, to_bytes(stored, {"torchslice": json.dumps(record)}))


def load(path: str | Path, *, allow_import: bool = False) -> nn.Module:
    """Rebuild a saved network on the CPU, in eval mode, with the outputs it had when it was saved.

    Path, shape and dtype of every tensor and the hash over everything are checked. The network carries four plain
    attributes: `.classes` (tuple of names, or None), `.preprocessing` and `.extension` (dict, or None) and `.origin`
    (dict).

    Args:
        path: file written by `save`.
        allow_import: permit a factory "package.module:function". Importing a module runs its code, so a file from
            somebody else could choose what runs; built-in, torchvision and timm networks need no permission.

    >>> small = load("pets.safetensors")
    >>> small.classes
    ('cat', 'dog')
    """
    record, tensors = _read(path)
    if _digest(record, tensors) != record.get("sha256"):
        raise TorchsliceError(f"{path} is damaged: its content does not match its hash; copy it again from its source.")
    try:
        model = rebuild(record, allow_import=allow_import)
    except TorchsliceError as error:
        raise TorchsliceError(f"cannot load {path}: {error}") from error
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state: dict[str, Tensor] = {}
    for name, (_, _, channels_last) in record["tensors"].items():
        tensor = tensors[name].clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        state[name] = nn.Parameter(tensor, tensor.is_floating_point()) if name in parameters else tensor
    state.update({name: state[source] for name, source in record["shared"].items()})
    model.load_state_dict(state, assign=True)
    for name in ("origin", "classes", "preprocessing", "extension"):
        value = record.get(name)
        setattr(model, name, tuple(value) if isinstance(value, list) else value)
    return model.eval()


def read_record(path: str | Path) -> dict[str, Any]:
    """Return all that a file says about its network, as plain data (see the top of this module), without building it.

    >>> read_record("pets.safetensors")["classes"]
    ['cat', 'dog']
    """
    return _read(path)[0]


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the record and the tensors of a file, which must agree in names, dtypes and shapes."""
    if not Path(path).is_file():
        raise TorchsliceError(f"there is no file {path}; give a file that torchslice saved.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise TorchsliceError(f"{path} is not a whole safetensors file ({error}); copy it once more.") from error
    try:
        record = json.loads(metadata["torchslice"])
        written, recorded = int(record["format_version"]), record["tensors"]
    except (KeyError, TypeError, ValueError) as error:
        raise TorchsliceError(
            f"{path} is a safetensors file of another program; torchslice loads only what torchslice saved."
        ) from error
    if written > FORMAT_VERSION:
        raise TorchsliceError(
            f"{path} has format version {written} and this torchslice reads up to {FORMAT_VERSION}; "
            "install a newer torchslice."
        )
    found = {name: signature(tensor)[:2] for name, tensor in tensors.items()}
    for name in sorted({*found, *recorded}):
        if found.get(name) != recorded.get(name, [])[:2]:
            needed, given = (side.get(name, "absent") for side in (recorded, found))
            raise TorchsliceError(f"{path} is damaged: tensor {name!r} should be {needed} and is {given}.")
    return record, tensors


def _digest(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over the record without its hash, and the bytes of all tensors in the order of their names."""
    entries = {key: value for key, value in record.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(entries, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _version() -> str:
    """Return the version of torchslice; it has none where it runs from its sources."""
    try:
        return version("torchslice")
    except PackageNotFoundError:
        return "source"
