"""Run one batch and reduce what terms read of a layer to one value per sample and neuron as soon as it is there.

Shapes: B batch, C classes, N neurons of a layer, M neurons of all layers, P positions; R rows of a run, which are the
B samples and, for DeepLIFT, the baseline.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.taps import Seen, Taps, tapping
from ..errors import TorchsliceError
from .deeplift import Rescaling, check_balance
from .metrics import Term, reads

Values = dict[Term, Tensor]  # {term: float64 [B, M]}


def observe(
    model: nn.Module, taps: Taps, images: Tensor, labels: Tensor, terms: Sequence[Term], baseline: Tensor | None
) -> tuple[Tensor, Values]:
    """Run images [B, ...] of classes [B] and return the logits [B, C] and the value of every term for every neuron.

    Half the batch at a time: activations and slopes are kept beside what autograd keeps, and so the memory stays below
    that of a plain pass over the whole batch. Terms of the contribution, which need the `baseline` [1, ...], get runs
    of their own, whose gradients are others.
    """
    plain = [term for term in terms if "contribution" not in reads(term)]
    rescaled = [term for term in terms if "contribution" in reads(term)]
    halves = [half for half in zip(images.tensor_split(2), labels.tensor_split(2), strict=True) if len(half[0])]
    runs: list[list[tuple[Tensor, Values]]] = []
    if plain:
        runs.append([run_plain(model, taps, *half, plain) for half in halves])
    if rescaled:
        assert baseline is not None
        runs.append([run_rescaled(model, taps, *half, rescaled, baseline) for half in halves])
    values = {term: torch.cat([found[term] for _, found in parts]) for parts in runs for term in parts[0][1]}
    return torch.cat([logits for logits, _ in runs[0]]), values


def run_plain(
    model: nn.Module, taps: Taps, images: Tensor, labels: Tensor, terms: Sequence[Term]
) -> tuple[Tensor, Values]:
    """Let terms read activations and, if they ask for them, gradients of the cross entropy."""
    reduced, backward = Reduced(terms), any("gradient" in reads(term) for term in terms)
    images = images.detach().requires_grad_(backward)
    with torch.set_grad_enabled(backward), tapping(model, taps) as seen:
        logits = _finite(model(images), seen)
        loss = F.cross_entropy(logits, labels, reduction="sum")

    def arrived(layer: str, *tensors: list[Tensor]) -> None:
        found = [by_position(uses, layer, taps, len(images)) for uses in tensors]
        reduced.add(layer, **dict(zip(("activation", "gradient"), found, strict=False)))

    if backward:
        run_backward(loss, images, seen.values, arrived)
    else:
        for layer, uses in seen.values.items():
            arrived(layer, uses)
    return logits.detach(), reduced.joined(taps)


def run_rescaled(
    model: nn.Module, taps: Taps, images: Tensor, labels: Tensor, terms: Sequence[Term], baseline: Tensor
) -> tuple[Tensor, Values]:
    """Let terms read activations and what they contribute, by DeepLIFT, to the logit of the true class."""
    reduced = Reduced(terms)
    both = torch.cat([images, baseline]).requires_grad_()  # [R, ...]
    with torch.enable_grad(), Rescaling(len(both)), tapping(model, taps) as seen:
        logits = _finite(model(both), seen)
        own = logits[:-1].gather(1, labels[:, None]).squeeze(1)  # [B]
        total = own.sum()

    def arrived(layer: str, uses: list[Tensor], multipliers: list[Tensor]) -> None:
        a, m = (by_position(tensors, layer, taps, len(both)) for tensors in (uses, multipliers))
        reduced.add(layer, activation=a[:-1], contribution=m[:-1] * (a[:-1] - a[-1:]))

    multiplier = run_backward(total, both, seen.values, arrived)
    with torch.no_grad():
        check_balance(multiplier[:-1] * (images - baseline), own - logits[-1, labels])
    return logits[:-1].detach(), reduced.joined(taps)


class Reduced:
    """Values of terms, layer by layer, in any order."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.values: dict[Term, dict[str, Tensor]] = {term: {} for term in terms}

    def add(self, layer: str, **readings: Tensor) -> None:
        """Apply all terms to the readings [B, N, P] of a layer."""
        for term, found in self.values.items():
            found[layer] = term(**{name: readings[name] for name in reads(term)}).double()
            if found[layer].shape != readings["activation"].shape[:2]:
                raise TorchsliceError(
                    f"term {term.__name__!r} of a metric must return one value per sample and neuron, "
                    f"{list(readings['activation'].shape[:2])}; it returned {list(found[layer].shape)}."
                )

    def joined(self, taps: Taps) -> Values:
        """Return the values of all layers side by side, in the order of the taps."""
        return {term: torch.cat([found[layer] for layer in taps.axis], 1) for term, found in self.values.items()}


def run_backward(
    target: Tensor, images: Tensor, values: dict[str, list[Tensor]], arrived: Callable[..., None]
) -> Tensor:
    """Call arrived(layer, uses, gradients) as soon as a layer's gradients are there; `values` is emptied.

    So no gradient has to wait for the others. Returns that of the images.
    """
    gradients: dict[str, dict[int, Tensor]] = {layer: {} for layer in values}

    def keep(layer: str, index: int, gradient: Tensor) -> None:
        gradients[layer][index] = gradient
        if len(gradients[layer]) == len(values[layer]):
            deliver(layer)

    def deliver(layer: str) -> None:
        found, uses = gradients.pop(layer), values.pop(layer)
        arrived(layer, uses, [found.get(i, torch.zeros_like(use)) for i, use in enumerate(uses)])

    for layer, uses in values.items():
        for index, use in enumerate(uses):
            if not use.requires_grad:
                raise TorchsliceError(
                    f"layer {layer!r} has no gradient: the model runs it without one (torch.no_grad or detach). "
                    "Remove that from its forward, or take a metric without gradients: avg, var or ens."
                )
            use.register_hook(partial(keep, layer, index))
    (of_images,) = torch.autograd.grad(target, images)
    for layer in list(values):  # the target does not depend on them
        deliver(layer)
    return of_images


def by_position(uses: Sequence[Tensor], layer: str, taps: Taps, rows: int) -> Tensor:
    """Join a layer's tensors [R * k, ..., N, ...], one per use, to one [R, N, P]."""
    axis, joined = taps.axis[layer], []
    for use in uses:
        if use.shape[0] % rows:
            raise TorchsliceError(
                f"layer {layer!r} must have the samples on its first axis; its activations are {list(use.shape)} "
                f"for {rows} inputs. Wrap the model so that samples come first."
            )
        split = use.detach().unflatten(0, (rows, -1))  # [R, k, ..., N, ...]
        joined.append(split.movedim(axis + 1 if axis > 0 else axis, 1).reshape(rows, use.shape[axis], -1))
    return joined[0] if len(joined) == 1 else torch.cat(joined, 2)


def _finite(logits: Tensor, seen: Seen) -> Tensor:
    """Return the logits, or raise where they are NaN or infinite, with the first layer that is."""
    if not logits.isfinite().all():
        odd = [layer for layer, uses in seen.values.items() if not all(use.isfinite().all() for use in uses)]
        where = f"from layer {odd[0]!r} on" if odd else "in its logits"
        raise TorchsliceError(
            f"the model computes NaN or infinite values {where}, so nothing can be said about its neurons. "
            "Check its weights and the data."
        )
    return logits


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of the model require a gradient inside the block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
