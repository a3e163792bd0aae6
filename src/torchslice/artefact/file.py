"""A network in one file: safetensors for the numbers, JSON in its metadata for the rest; nothing in it is executed.

The metadata key "torchslice" holds, beside the blueprint of the network (modules, tensors, configs; see `blueprint`):
    format_version                  3
    classes                         names of the logits in their order, or null
    slice                           names of the layers, or null; their masks are tensors called ".slice.LAYER"
    preprocessing, metrics, extension   plain data or null
    versions                        of python, torchslice, torch, and of the other packages that are used
    sha256                          over all of this and the bytes of every tensor
"""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ..errors import TorchsliceError
from ..files import atomic_write, digest_of, plain, read_safetensors
from ..slices import Slice
from .blueprint import describe, is_dense, rebuild

FORMAT_VERSION = 3
PACKAGES = ("torchslice", "torch", "torchvision", "timm", "transformers")
ALLOWED = (
    "Classes must be different names; preprocessing, metrics and extension must be dictionaries of plain data: text, "
    "numbers, true or false, lists and dictionaries."
)


@dataclass(frozen=True, repr=False)
class Artefact:
    """What `load` finds in a file: the network, on the CPU and in eval mode, and what was saved beside it.

    `classes` are the names of the logits in their order, `slice` the neurons that were kept, `preprocessing` says how
    samples become inputs, `extension` holds the tasks of a network that learned classes later.
    """

    model: nn.Module
    classes: tuple[str, ...] | None
    preprocessing: dict[str, Any] | None
    slice: Slice | None
    metrics: dict[str, Any] | None
    extension: dict[str, Any] | None
    versions: dict[str, str]

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.model.parameters())
        classes = f"classes {', '.join(self.classes)}" if self.classes else "no class names"
        return f"Artefact({type(self.model).__name__} with {size:,} parameters, {classes})"


# -- saving -----------------------------------------------------------------------------------------------------------
def save(
    thing: Any,
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    slice: Slice | None = None,
    metrics: Mapping[str, Any] | None = None,
    extension: Mapping[str, Any] | None = None,
) -> None:
    """Write a network, cut or not, to one safetensors file from which `load` rebuilds it bit for bit.

    The file is written whole or not at all, and only after the network was rebuilt from its record as a check. The
    error names what no file can keep: a hook, a function without a name, an object that is no plain data.

    Args:
        thing: any nn.Module, or a result that has one as `.model`; what is not given below is taken from the result,
            where it has an attribute of that name.
        classes: name of the class behind each logit, in order.
        preprocessing: how samples become inputs, such as `task.preprocessing`.
        slice: the neurons that were kept.
        extension: tasks and slices of a network that learned classes later.

    >>> ts.save(small, folder / "pair.safetensors", classes=["3", "8"], preprocessing=task.preprocessing)
    """
    given: dict[str, Any] = dict(classes=classes, preprocessing=preprocessing, metrics=metrics, extension=extension)
    given["slice"] = slice
    model = thing
    if not isinstance(thing, nn.Module):
        model = getattr(thing, "model", thing)
        given = {name: getattr(thing, name, None) if value is None else value for name, value in given.items()}
    kept = given["slice"]
    if not isinstance(kept, Slice | None):
        raise TorchsliceError(f"cannot save {path}: slice must be a Slice, got {type(kept).__name__}.")
    masks = {} if kept is None else {f".slice.{layer}": mask for layer, mask in kept.masks.items()}
    given["slice"] = None if kept is None else [*kept.layers]
    blueprint, tensors = describe(model)
    used = {"python", "torchslice", *(module["class"].partition(".")[0] for module in blueprint["modules"].values())}
    versions = {name: found for name, found in _versions().items() if name in used}
    content = {"format_version": FORMAT_VERSION, **blueprint, **given, "versions": versions}
    try:
        record = json.loads(json.dumps(content))
    except (TypeError, ValueError, RecursionError) as error:
        raise TorchsliceError(f"cannot save {path}: {error}. {ALLOWED}") from error
    _check_loads(record, tensors, masks)
    stored = plain({**tensors, **masks})
    try:
        record["sha256"] = _digest(record, stored)
        whole = to_bytes(stored, {"torchslice": json.dumps(record)})
    except Exception as error:  # of many kinds
        raise TorchsliceError(f"cannot save {path}: safetensors does not take its tensors ({error}).") from error
    atomic_write(path, whole)


def _check_loads(record: Mapping[str, Any], tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Load a record as `load` will, but without the numbers of the network, and compare."""
    if absent := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise TorchsliceError(f"cannot save the network: {absent[0]!r} is on the meta device and has no values.")
    empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    try:
        again, _ = describe(_rebuilt(record, {**empty, **masks}, allow_import=True).model)
    except Exception as error:
        raise TorchsliceError(f"cannot save the network: it could not be loaded again ({error}).") from error
    for part in ("modules", "tensors"):
        for name, entry in record[part].items():
            if again[part].get(name) != entry:
                raise TorchsliceError(f"cannot save the network: {name!r} would come back as {again[part].get(name)}.")
    if again["configs"] != record["configs"]:
        raise TorchsliceError("cannot save the network: its configuration would come back as another one.")


# -- loading ----------------------------------------------------------------------------------------------------------
def load(path: str | Path, *, allow_import: bool = False) -> Artefact:
    """Rebuild a saved network on the CPU, in eval mode, with the outputs it had when it was saved.

    No constructor runs and no memory is taken but for the tensors of the file, which are checked with all the rest
    against a hash.

    Args:
        path: file written by `save`.
        allow_import: permit classes and functions outside of torch, torchvision, timm, transformers and torchslice.
            Importing a module runs its code, so a file from somebody else could choose what runs.

    >>> ts.save(small, folder / "pair.safetensors", classes=["3", "8"])
    >>> pair = ts.load(folder / "pair.safetensors")
    >>> pair.classes, torch.equal(pair.model(task.example), small(task.example))
    (('3', '8'), True)
    """
    record, tensors = _read(path)
    try:
        return _rebuilt(record, tensors, allow_import=allow_import)
    except Exception as error:  # a record that `save` did not write can be wrong in any way
        text = f"its record is not one that torchslice writes ({type(error).__name__}: {error})."
        text = str(error) if isinstance(error, TorchsliceError) else text
        raise TorchsliceError(f"cannot load {path}: {text}{_version_note(record)}") from error


def read_record(path: str | Path) -> dict[str, Any]:
    """Return all that a file says about its network, as plain data (see the top of this module), without building it.

    >>> ts.save(small, folder / "pair.safetensors", classes=["3", "8"])
    >>> read_record(folder / "pair.safetensors")["classes"]
    ['3', '8']
    """
    return _read(path)[0]


def read_header(path: str | Path) -> dict[str, Any]:
    """Return what `read_record` returns, without reading the tensors: whether they match the hash is not known.

    >>> ts.save(small, folder / "pair.safetensors", classes=["3", "8"])
    >>> read_header(folder / "pair.safetensors") == read_record(folder / "pair.safetensors")
    True
    """
    return _record(path, read_safetensors(path, tensors=False)[0])


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the record and the tensors of a file, which must be whole and match its hash."""
    if not Path(path).is_file():
        raise TorchsliceError(f"there is no file {path}; give a file that torchslice saved.")
    metadata, tensors = read_safetensors(path)
    record = _record(path, metadata)
    try:
        whole = _digest(record, tensors) == record.get("sha256")
    except (TypeError, ValueError, RecursionError):
        whole = False
    if not whole:
        raise TorchsliceError(f"{path} is damaged: its content does not match its hash; copy it again from its source.")
    return record, tensors


def _record(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the record in the metadata of a file, which must have the format of this version."""
    try:
        record = json.loads(metadata["torchslice"])
        written = record["format_version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise TorchsliceError(
            f"{path} is a safetensors file of another program; torchslice loads only what torchslice saved."
        ) from error
    if written != FORMAT_VERSION:
        raise TorchsliceError(
            f"{path} has format version {written!r}, and this torchslice reads {FORMAT_VERSION}; load it with the "
            "torchslice that saved it."
        )
    return record


def _rebuilt(record: Mapping[str, Any], tensors: dict[str, Tensor], *, allow_import: bool) -> Artefact:
    """Return the content of a file; a record that `save` did not write can raise any kind of error."""
    about = {name: record[name] for name in ("preprocessing", "metrics", "extension")}
    for name, value in about.items():
        if not isinstance(value, dict | None):
            raise TorchsliceError(f"{name} is {value!r:.100}. {ALLOWED}")
    classes = record["classes"]
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if classes is not None and not (named and len({*classes}) == len(classes)):
        raise TorchsliceError(f"classes are {classes!s:.100}. {ALLOWED}")
    masks = None if record["slice"] is None else {layer: tensors.pop(f".slice.{layer}") for layer in record["slice"]}
    given = {name: [str(tensor.dtype).removeprefix("torch."), [*tensor.shape]] for name, tensor in tensors.items()}
    needed = {name: [entry["dtype"], entry["shape"]] for name, entry in record["tensors"].items()}
    for name in sorted({*given, *needed}):
        texts = [str(side.get(name, "absent")) for side in (needed, given)]  # as text, where True is not 1
        if texts[0] != texts[1]:
            raise TorchsliceError(f"tensor {name!r} should be {texts[0]} and is {texts[1]}.")
    laid_out = {name: _laid_out(tensor, record["tensors"][name]["strides"]) for name, tensor in tensors.items()}
    return Artefact(
        model=rebuild(record, laid_out, allow_import=allow_import),
        classes=None if classes is None else tuple(classes),
        slice=None if masks is None else Slice(masks),
        versions={name: str(found) for name, found in record["versions"].items()},
        **about,
    )


def _laid_out(tensor: Tensor, strides: list[int] | None) -> Tensor:
    """Return a copy with the recorded strides; a tensor of the file itself would change with the file."""
    if strides is None:
        return tensor.clone()
    if not is_dense(tensor.shape, tuple(strides)):
        raise TorchsliceError(f"a tensor of shape {list(tensor.shape)} cannot have the strides {strides}.")
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


# -- both -------------------------------------------------------------------------------------------------------------
def _digest(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over the record without its hash, and the tensors."""
    return digest_of(tensors, json.dumps({key: record[key] for key in record if key != "sha256"}, sort_keys=True))


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the packages whose classes need no permission."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _version_note(record: Mapping[str, Any]) -> str:
    """Return a sentence about versions that are others here, which may be why a file cannot be loaded."""
    saved = record["versions"] if isinstance(record.get("versions"), dict) else {}
    pairs = [(name, saved[name], here) for name, here in _versions().items() if name in saved]
    other = ", ".join(f"{name} {then} (here {here})" for name, then, here in pairs if then != here)
    return f" It was saved with {other}." if other else ""
