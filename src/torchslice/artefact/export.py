"""A network as a program that needs neither torchslice nor its Python code: ONNX, or the pt2 of torch.export.

Shapes: B batch, C classes.
"""

from __future__ import annotations

import io
import json
import re
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..cut.extract import TOLERANCE
from ..errors import TorchsliceError, first_line
from ..files import atomic_write
from ..graph.record import check_model
from ..graph.views import copy_of
from ..imports import import_optional
from ..inputs import Inputs, Output, batch_size, map_leaves, map_tensors, paths, run, take, tensors, to_device
from ..registry import Registry

Program = Callable[[list[Tensor]], Tensor]  # the tensors of some inputs -> logits [B, C]


@dataclass(frozen=True)
class Exported:
    """A file that `export` wrote, and by how much its logits differ from the network's.

    `inputs` are the names of its inputs in order, `difference` is the largest one over all logits of `samples` samples,
    `largest` the largest logit.
    """

    path: Path
    format: str
    inputs: tuple[str, ...]
    size_bytes: int
    samples: int
    difference: float
    largest: float

    def __str__(self) -> str:
        compared = f"differs by {self.difference:.1e} on {self.samples} samples, whose largest logit is"
        return f"{self.path}, {self.size_bytes:,} bytes: {compared} {self.largest:.3g}"


def export(
    thing: Any,
    path: str | Path,
    *,
    samples: Inputs,
    format: str | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    output: Output = None,
) -> Exported:
    """Write a network as one file that ONNX Runtime or PyTorch runs without its code, for batches of any size.

    Texts may be of any length too, where the network does not write its length down.

    The program takes the tensors of the inputs, in order and by name ("input", "input_1", or the key in a dictionary),
    and returns logits. It computes what the network computes on the CPU in eval mode. Before the file is written, the
    program is run on all samples and on one alone; its logits may differ from the network's by 1e-5 of the largest one
    in float32. Class names, preprocessing and the names of the inputs are JSON in the metadata: `metadata_props` of an
    ONNX model, `extra_files` of torch.export.load.

    Args:
        thing: any nn.Module, or a result that has one as `.model`; what is not given below is taken from the result,
            where it has an attribute of that name.
        samples: at least three inputs of the classes that the network knows.
        format: "onnx" or "pt2"; by default what the path ends with.
        classes: name of the class behind each logit, in order.
        preprocessing: how samples become inputs, such as `task.preprocessing`.
        output: how the logits are picked from the network's result.

    Raises TorchsliceError for an operation that cannot be exported, which is named, for a batch size that is written
    down in `forward`, and for a program that differs. Nothing is written then.

    >>> samples = next(iter(task.restrict(["3", "8"]).batches("validation", 16)))[0]
    >>> exported = ts.export(small, folder / "pair.pt2", samples=samples, classes=["3", "8"])
    >>> exported.inputs, exported.difference < 1e-5
    (('input',), True)
    """
    path, format = Path(path), format or Path(path).suffix.lstrip(".")
    write, read = FORMATS[format]
    model = thing if isinstance(thing, nn.Module) else getattr(thing, "model", thing)
    check_model(model)
    count = batch_size(samples)
    if count < 3:
        raise TorchsliceError(f"an export is compared on at least 3 samples, got {count}; give more.")
    classes = getattr(thing, "classes", None) if classes is None else classes
    preprocessing = getattr(thing, "preprocessing", None) if preprocessing is None else preprocessing
    samples = to_device(samples, "cpu")
    plain = copy_of(model, {}).cpu().eval()
    names = _names(samples)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the exporters are about themselves
        expected = run(plain, samples, output)
        _check_names(classes, expected)
        about = _metadata(classes=classes, preprocessing=preprocessing, inputs=names)
        content = _written(write, _Flat(plain, samples, output), tensors(samples), names, about, format)
        program = read(content)
        parts = [(take(samples, rows), expected[rows]) for rows in (slice(None), slice(0, 1))]
        found = [_difference(program, tensors(part), logits, format) for part, logits in parts]
    largest = float(expected.abs().max())
    allowed = TOLERANCE.get(expected.dtype, 1e-5) * max(1.0, largest)
    if not max(found) <= allowed:
        raise TorchsliceError(
            f"the {format} program differs from the network by {max(found):.2g} on {count} samples, {found[1]:.2g} on "
            f"one alone (allowed: {allowed:.2g}); nothing was written. Check that forward gives the same logits every "
            "time: no random numbers, no state of its own."
        )
    atomic_write(path, content)
    return Exported(path, format, tuple(names), len(content), count, max(found), largest)


class _Flat(nn.Module):
    """A network whose inputs are tensors in a row, and whose output is logits."""

    def __init__(self, model: nn.Module, like: Inputs, output: Output) -> None:
        super().__init__()
        self.model, self.like, self.output = model, map_tensors(lambda tensor: _Place, like), output

    def forward(self, *leaves: Tensor) -> Tensor:
        given = iter(leaves)
        return run(self.model, map_leaves(lambda leaf: next(given) if leaf is _Place else leaf, self.like), self.output)


class _Place:
    """Where a tensor goes."""


def _names(samples: Inputs) -> list[str]:
    """Return a name for every tensor of some inputs: its place in words.

    >>> _names({"image": torch.zeros(2, 3), "facts": [torch.zeros(2), torch.zeros(2)]})
    ['image', 'facts_0', 'facts_1']
    """
    named = [name for name, leaf in paths(samples, "") if isinstance(leaf, Tensor)]
    words = ["_".join(re.findall(r"\w+", name)) for name in named]
    return [word if word[:1].isalpha() else f"input_{word}".rstrip("_") for word in words]


def _metadata(**entries: Any) -> dict[str, str]:
    """Return plain data as JSON texts."""
    try:
        return {name: json.dumps(value) for name, value in entries.items()}
    except (TypeError, ValueError) as error:
        raise TorchsliceError(f"cannot keep the preprocessing in the file: {error}. Give plain data.") from error


def _check_names(classes: Sequence[str] | None, logits: Tensor) -> None:
    if classes is not None and (len(classes) != logits.shape[1] or len({*classes}) != len(classes)):
        raise TorchsliceError(
            f"the network has {logits.shape[1]} logits, and {len({*classes})} different classes are named "
            f"({', '.join(classes[:10])}); name each once, in the order of the logits."
        )


def _written(
    write: Any, flat: nn.Module, samples: list[Tensor], names: list[str], about: Mapping[str, str], format: str
) -> bytes:
    """Return the content of the file; the error names what cannot be exported."""
    dims = tuple(_sizes(tensor, torch.export.Dim("batch"), torch.export.Dim.AUTO) for tensor in samples)
    try:
        example = tuple(torch.zeros_like(tensor[:2]) for tensor in samples)  # a pt2 file keeps it; no sample goes there
        program = torch.export.export(flat, example, dynamic_shapes={"leaves": dims})
        return write(program, names, about)
    except TorchsliceError:
        raise
    except Exception as error:  # of many kinds
        raise TorchsliceError(
            f"cannot export the network as {format}: {_reason(error)}. Nothing was written."
        ) from error


def _sizes(tensor: Tensor, batch: Any, length: Any) -> dict[int, Any]:
    """Return the axes of an input that may be of any size: the samples, and the tokens of whole numbers [B, T]."""
    return {0: batch, 1: length} if tensor.dim() == 2 and not tensor.is_floating_point() else {0: batch}


def _reason(error: BaseException) -> str:
    """Return what could not be exported, in words: the operation, or the line of forward."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    texts = [str(link) for link in chain]
    for text in texts:
        if found := re.search(r"OpOverload\(op='([\w.]+)'", text):
            return f"there is no ONNX for the operation {found[1]}; replace it by others, or write a pt2"
    if any("specialized it to be a constant" in text for text in texts):
        return "forward works at one batch size only; let it read sizes as x.shape[0], not len(x)"
    home = str(Path(torch.__file__).parent)
    lines = [frame for frame in traceback.extract_tb(chain[-1].__traceback__) if not frame.filename.startswith(home)]
    where = f", in {lines[-1].filename}, line {lines[-1].lineno}: {lines[-1].line}" if lines else ""
    return f"{first_line(chain[-1])}{where}"


def _difference(program: Program, samples: list[Tensor], expected: Tensor, format: str) -> float:
    """Return by how much a program's logits differ at most."""
    try:
        logits = program(samples)
    except Exception as error:  # of many kinds
        shapes = ", ".join(str(list(tensor.shape)) for tensor in samples)
        raise TorchsliceError(
            f"the {format} program does not run on {shapes} ({first_line(error)}); nothing was written."
        ) from error
    return float((logits - expected).abs().max()) if logits.shape == expected.shape else float("nan")


# -- formats ----------------------------------------------------------------------------------------------------------
def _write_onnx(program: Any, names: list[str], about: Mapping[str, str]) -> bytes:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        import_optional(module, extra="export")
    made = torch.onnx.export(
        program.run_decompositions({torch.ops.aten.adaptive_max_pool2d.default: _largest_of_windows}),
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=names,
        output_names=["logits"],
        dynamic_shapes={"leaves": tuple(_sizes(t, "batch", "length") for t in tensors(program.example_inputs))},
    )
    assert made is not None
    made.model.metadata_props.update(about)
    return made.model_proto.SerializeToString()


def _largest_of_windows(images: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Write adaptive max pooling [..., H, W] -> [..., *size], which ONNX does not have, as maxima of its windows."""
    for axis, count in zip((-2, -1), size, strict=True):
        edges = [(i * images.shape[axis] // count, -(-(i + 1) * images.shape[axis] // count)) for i in range(count)]
        windows = [images.narrow(axis, start, stop - start).amax(axis, keepdim=True) for start, stop in edges]
        images = torch.cat(windows, axis)
    return images, images.long()  # a network that reads the places of the maxima is found to differ


def _read_onnx(content: bytes) -> Program:
    runtime = import_optional("onnxruntime", extra="export")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def logits(samples: list[Tensor]) -> Tensor:
        given = {name: tensor.numpy() for name, tensor in zip(names, samples, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return logits


def _write_pt2(program: Any, names: list[str], about: Mapping[str, str]) -> bytes:
    made = io.BytesIO()
    torch.export.save(program, made, extra_files=dict(about))
    return made.getvalue()


def _read_pt2(content: bytes) -> Program:
    module = torch.export.load(io.BytesIO(content)).module()
    return lambda samples: module(*samples)


#: name -> how it is written, how it is read
FORMATS: Registry[tuple[Callable[..., bytes], Callable[[bytes], Program]]] = Registry("format of exports")
FORMATS.update(onnx=(_write_onnx, _read_onnx), pt2=(_write_pt2, _read_pt2))
