"""DeepLIFT with the rescale rule (arXiv 1704.02685, section 3.5.1) for all layers of a model in one pass.

The last row of the batch is the baseline. While the mode is on, every nonlinear function f of single activations has
the slope (f(x) - f(x0)) / (x - x0) in place of its gradient, x0 being the baseline's activation at the same place. So
autograd returns DeepLIFT's multipliers m, and m * (a - a0) is what an activation a contributes to a logit.

Shapes: R rows of the batch, the baseline included; B = R - 1 samples; C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...errors import TorchsliceError
from ...graph import functions as known
from ...graph.neurons import Neurons
from ...graph.record import Call, plain_name, record
from ...inputs import describe, paths

TINY = 1e-6  # below this difference from the baseline, the slope is the gradient: the quotient would be rounding
IMBALANCE = 1e-3  # fraction of all contributions by which their sum may miss the change of the logit
OTHERS = "Take another metric: avg, var, ens or taylor."

_COPIES = {
    *("neg", "negative", "positive", "contiguous", "clone", "alias", "zeros_like"),
    *("to", "float", "double", "type", "type_as", "cpu", "cuda"),
}
_LINEAR = (  # in all their arguments together
    {*known.MOVES, *known.CONCATENATIONS, *known.RESIZERS, *_COPIES, "stack", "mean", "sum", "pad"}
    | {*known.ADDITIVE} - {"maximum", "minimum"}
    | {name for name in known.POOLS if "avg" in name}
)
_LINEAR_IN_ONE = {  # in any of their arguments
    *(*known.CONVOLUTIONS, *known.NORMS, *known.MULTIPLICATIVE, "linear", "matmul", "mm", "bmm", "einsum"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}
_DROPOUT = {name for name in known.ZERO_STAYS if "dropout" in name}
_LINEAR_IN_FIRST = {*known.DIVISION, *_DROPOUT}
_MAXIMA = {name for name in known.POOLS if "max" in name}
_RESCALED = (
    {*known.ZERO_STAYS, *known.ZERO_GOES, *known.CLAMPS, "pow", "prelu", "log", "log1p", "expm1", "rsqrt", "reciprocal"}
    - {*_COPIES, *_DROPOUT}
    - {"half", "bfloat16", "detach", "data", "requires_grad"}
)
_LIKE_TRAINING = {*_DROPOUT, *known.NORMS, "rrelu"}  # functions that an argument puts in training mode


def check_rescale(neurons: Neurons) -> None:
    """Raise unless the inputs have a mean and the rescale rule covers every function that the model calls on them."""
    for name, leaf in paths(neurons.example):
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            what = f"{name} is {describe(leaf)}, not of floating point"
            raise TorchsliceError(f"DeepLIFT compares inputs with their mean; {what}. {OTHERS}")
    for call in record(neurons.model, neurons.example, neurons.output).calls:
        if reason := _why_not(call):
            where = f"{call.name} in {call.module!r}" if call.module else call.name
            raise TorchsliceError(f"DeepLIFT's rescale rule does not apply to this model: {where} {reason}. {OTHERS}")


def _why_not(call: Call) -> str:
    """Return why the rescale rule does not cover a call, "" if it does."""
    name, varying = call.name, sum(value.dynamic for value in call.inputs)
    if not varying or name in _LINEAR:
        return ""
    training = [call.kwargs.get(key) for key in ("training", "train", "use_input_stats")]
    if name in _LIKE_TRAINING and any(argument is True for argument in (*training, *call.args)):
        return "works as in training although the model is in eval mode"
    if name in _LINEAR_IN_ONE:
        return "multiplies activations with each other" if varying > 1 else ""
    if name not in _LINEAR_IN_FIRST | _RESCALED | _MAXIMA:
        return "is not a linear function, nor one of single activations"
    return "" if varying == 1 and call.inputs[0].dynamic else "joins activations in a way that is not linear"


class Rescaling(TorchFunctionMode):
    """While on, autograd returns DeepLIFT's multipliers for all rows but the last, which is the baseline.

    >>> with Rescaling(len(task.example)):
    ...     logits = model(task.example)[:-1]
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = plain_name(func)
        if name not in _RESCALED and name not in _MAXIMA:
            return func(*args, **kwargs)
        x, *others = args or (kwargs.pop("input"),)
        if not x.requires_grad:
            return func(x, *others, **kwargs)
        if name in _MAXIMA:
            y, places = getattr(F, f"{name}_with_indices")(x.detach(), *others, **kwargs)
            # The larger one of the two maxima, the sample's and the baseline's, says which place made the change, as in
            # captum. Of overlapping windows, each gives a place its part.
            places = torch.where(y >= y[-1:], places, places[-1:]).flatten(2)
            change = (x - x[-1:]).detach().flatten(2).gather(2, places).view_as(y)
            slopes = torch.where(change.abs() < TINY, 1.0, (y - y[-1:]) / change)
            return with_slope(x.flatten(2).gather(2, places).view_as(y), y, slopes)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            copy = leaf.clone()
            y = func(copy, *others, **kwargs)
            (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        slopes = slope(*(by_row(values, self.rows, "DeepLIFT") for values in (leaf, y, gradient))).view_as(y)
        rescaled = with_slope(x, y.detach(), slopes)
        return x.copy_(rescaled) if y is copy else rescaled  # an in-place function changes what others read


def by_row(values: Tensor, rows: int, who: str) -> Tensor:
    """Give activations [R * k, ...] that somebody reads an axis of the rows, [R, k, ...]."""
    if values.shape[0] % rows:
        raise TorchsliceError(
            f"{who} needs the samples on the first axis of every activation; one is {list(values.shape)} for {rows} "
            "inputs. Wrap the model so that samples come first."
        )
    return values.detach().unflatten(0, (rows, -1))


def with_slope(x: Tensor, y: Tensor, slopes: Tensor) -> Tensor:
    """Return the values y, with slopes as their gradient with respect to x, all of one shape."""
    linear = x * slopes
    return linear + (y - linear).detach()


def slope(x: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    """Return (y - y0) / (x - x0), or the gradient where x - x0 is about 0 (0 if that is infinite), all [R, ...]."""
    x, y = x - x[-1:], y - y[-1:]
    return torch.where(x.abs() < TINY, gradient.nan_to_num(0, 0, 0), y / x)


def check_balance(contribution: Tensor, change: Tensor) -> None:
    """Raise unless the contributions of the inputs [B, ...] add up to the changes of the logits [B], as they must."""
    parts = contribution.flatten(1).double()
    missed = (parts.sum(1) - change.double()).abs()
    if not (missed <= IMBALANCE * parts.abs().sum(1).clamp(min=TINY)).all():
        raise TorchsliceError(
            f"DeepLIFT's contributions miss the change of a logit by {missed.max():.3g}, so some function of the model "
            f"is not what it seems, such as one that mixes samples. {OTHERS}"
        )
