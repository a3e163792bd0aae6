"""After a cut, what remains makes up for what left: layers are fitted by least squares, without labels or training.

Shapes: n samples, R rows (a position of a sample each), K numbers that an output is computed from, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cut.extract import extract
from ..data import Task, check_task, limit
from ..errors import TorchsliceError
from ..graph.neurons import Neurons
from ..graph.plan import plan, weights_of
from ..graph.record import evaluating, full_precision
from ..graph.views import view_of
from ..inputs import call_model, device_of, tensors
from ..slices import Slice

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d  # what can be fitted
RIDGE = 0.03  # of the mean square of what a layer reads
ROWS = 8000  # by which a layer is fitted, at most
KEPT = 2.5e8  # outputs of the whole model that are kept in memory, at most
NUMBERS = 5e7  # in all inputs, at most


def compensate(
    neurons: Neurons,
    slice_: Slice,
    task: Task,
    *,
    classes: Sequence[str | int] | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> nn.Module:
    """Return what `extract` returns, with weights that make up for the neurons that are gone.

    Linear and convolutional layers are fitted one after another, each on what it reads in the smaller network, to give
    what it gives in the whole one: linear regression of the difference, with a small ridge, at random positions of
    training samples. Labels are not used. All else, convolutions in groups among it, stays as it was cut. Source: He,
    Zhang & Sun (arXiv 1707.06168, section 3.1), who fit the layer after each that they prune.

    Args:
        task: whose training samples are looked at: those that the sub-model will see, as `task.restrict` has them.
        classes: names or indices of at least two classes of the model; only their logits remain.
        samples: how many are drawn at most, by the `seed`; fewer where they are large. They are one batch.

    >>> pair = ["3", "8"]
    >>> small = ts.judge.compensate(neurons, slices["3"] | slices["8"], task.restrict(pair), classes=pair)
    >>> small(task.example).shape
    torch.Size([2, 2])
    """
    check_task(task)
    if samples < 1:
        raise TorchsliceError(f"samples must be at least 1, got {samples}.")
    small, whole = extract(neurons, slice_, classes=classes), view_of(neurons.model)
    stays = plan(neurons, slice_, None if classes is None else neurons.class_indices(classes)).layers
    names = [name for name in weights_of(small, neurons) if _fits(small.get_submodule(name))]
    rows = min(ROWS, int(KEPT / max(1, sum(int(stays[name].outs.sum()) for name in names))))
    most = NUMBERS / sum(tensor[0].numel() for tensor in tensors(task.example))
    drawn = limit(task.train, max(1, min(samples, int(most))), seed=seed)
    [inputs] = drawn.read([torch.arange(len(drawn))], device=device_of(small))
    generator = torch.Generator().manual_seed(seed)
    targets: dict[str, _Target] = {}

    def keep(name: str, layer: Layer, args: tuple[Tensor, ...], output: Tensor) -> None:
        if name not in targets and args:
            given = output if isinstance(layer, nn.Linear) else output.movedim(1, -1)
            places = torch.randperm(given[..., 0].numel(), generator=generator)[:rows].to(given.device)
            at, outs = torch.unravel_index(places, given.shape[:-1]), torch.from_numpy(stays[name].outs)
            targets[name] = _Target(_sizes(layer, args[0]), at, given[at][:, outs.to(given.device)])

    def fit(name: str, layer: Layer, args: tuple[Tensor, ...]) -> None:
        target = targets.pop(name, None)  # so where it is called more than once, the first call counts
        if target and args and _sizes(layer, args[0]) == target.sizes:
            _fit(layer, _read(layer, args[0], target.at), target.outputs)

    with evaluating(whole, small), full_precision():
        for name in names:
            whole.get_submodule(name).register_forward_hook(partial(keep, name))
        call_model(whole, inputs)
        hooks = [small.get_submodule(name).register_forward_pre_hook(partial(fit, name)) for name in names]
        call_model(small, inputs)
    for hook in hooks:
        hook.remove()
    return small


class _Target(NamedTuple):
    """What a layer of the whole model gives."""

    sizes: list[int]  # of what it read, see `_sizes`
    at: tuple[Tensor, ...]  # [R] each: the sample and the position of a row
    outputs: Tensor  # [R, O], those that stay


def correction(read: Tensor, missing: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """Return the weights [K, O] by which numbers [R, K] come nearest to what is missing [R, O], float64.

    Ridge regression, whose penalty is `ridge` times the mean square of what is read, times R.

    >>> correction(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0], [4.0]]), ridge=0.0)
    tensor([[3.],
            [2.]], dtype=torch.float64)
    """
    penalty = max(ridge * float(read.square().sum()) / read.shape[1], torch.finfo(torch.float32).tiny)

    def solved(gram: Tensor, right: Tensor) -> Tensor:
        gram.diagonal().add_(penalty)
        return torch.linalg.solve(gram, right)

    if len(read) < read.shape[1]:  # the same weights, of the smaller system
        return read.T.double() @ solved((read @ read.T).double(), missing.double())
    return solved((read.T @ read).double(), (read.T @ missing).double())


def _fit(layer: Layer, read: Tensor, target: Tensor) -> None:
    """Change weight and bias of a layer, in place, so that its outputs come nearest to a target."""
    kind = torch.promote_types(read.dtype, torch.float32)
    read, weight, bias = read.to(kind), layer.weight.flatten(1).to(kind), layer.bias
    missing = target.to(kind) - F.linear(read, weight, bias if bias is None else bias.to(kind))
    middle, left = read.mean(0), missing.mean(0)  # what the bias sees to
    if bias is None:
        middle, left = torch.zeros_like(middle), torch.zeros_like(left)
    found = correction(read - middle, missing - left)
    if found.isfinite().all():
        layer.weight += found.T.reshape(layer.weight.shape)
        if bias is not None:
            bias += left - middle.double() @ found


def _fits(layer: nn.Module) -> bool:
    """Return whether a layer can be fitted: it is of a kind that can, and not in groups."""
    return isinstance(layer, Layer) and getattr(layer, "groups", 1) == 1


def _sizes(layer: Layer, inputs: Tensor) -> list[int]:
    """Return the sizes of all axes of an input but the channels'; a layer may be given other samples after a cut."""
    channels = inputs.dim() - 1 if isinstance(layer, nn.Linear) else 1
    return [*inputs.shape[:channels], *inputs.shape[channels + 1 :]]


def _read(layer: Layer, inputs: Tensor, at: Sequence[Tensor]) -> Tensor:
    """Return what the outputs at some places are computed from, [R, K]; a place is a sample and its position."""
    if isinstance(layer, nn.Linear):
        return inputs[tuple(at)]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    sample, *place = at
    ones = [1] * len(place)
    index: list[Any] = [sample.view(-1, *ones), slice(None)]
    for axis, where in enumerate(place):  # [R] and the width of the kernel there, to [R, 1, width, 1]
        taps = torch.arange(layer.kernel_size[axis], device=where.device) * layer.dilation[axis]
        shape = [-1 if axis == other else 1 for other in range(len(place))]
        index.append((where * layer.stride[axis]).view(-1, *ones) + taps.view(shape))
    return padded[tuple(index)].movedim(-1, 1).flatten(1)  # the channels come last
