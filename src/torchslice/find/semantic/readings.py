"""Run one batch and reduce what terms read of every layer to one value per sample and neuron.

Shapes: B batch, C classes, N neurons of a layer, M neurons of all layers, P positions; R rows of a run, which are the
B samples and, for DeepLIFT, the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import TorchsliceError
from ...graph.activations import Activations, Seen, reading
from ...graph.neurons import Neurons
from ...graph.views import view_of
from ...inputs import Inputs, join, map_tensors, tensors
from .deeplift import Rescaling, check_balance
from .metrics import Term, reads

Readings = Callable[[str], dict[str, Tensor]]  # layer -> what can be read of it, {name: [B, N, P]}


def detached(model: nn.Module) -> nn.Module:
    """Return a view of a model, in eval mode, with parameters of its own in the memory of the model's.

    So gradients can be asked for whatever of the model is frozen, and nothing of the model changes.
    """
    view = view_of(model).eval()
    own = {p: nn.Parameter(p.detach(), requires_grad=False) for p in view.parameters()}
    for module in view.modules():
        module._parameters.update({name: own[p] for name, p in module._parameters.items() if p is not None})
    return view


def observe(
    neurons: Neurons, where: Activations, inputs: Inputs, labels: Tensor, terms: Sequence[Term], baseline: Inputs = None
) -> tuple[Tensor, dict[Term, Tensor]]:
    """Run inputs of classes [B] and return the logits [B, C] and the value of every term, {term: float64 [B, M]}.

    Args:
        neurons: of a `detached` model.
        terms: of the contribution if there is a baseline, else the others.
        baseline: one input, which DeepLIFT compares the others with.
    """
    if baseline is None:
        backward = any("gradient" in reads(term) for term in terms)
        logits, readings = _run_plain(neurons, where, inputs, labels, backward=backward)
    else:
        logits, readings = _run_rescaled(neurons, where, inputs, labels, baseline)
    values: dict[Term, list[Tensor]] = {term: [] for term in terms}
    for layer in where.chains:
        found = readings(layer)
        for term in terms:
            value = term(**{name: found[name] for name in reads(term)}).double()
            if value.shape != found["activation"].shape[:2]:
                raise TorchsliceError(
                    f"term {term.__name__!r} of a metric must return one value per sample and neuron, "
                    f"{list(found['activation'].shape[:2])}; it returned {list(value.shape)}."
                )
            values[term].append(value)
    return logits, {term: torch.cat(columns, 1) for term, columns in values.items()}


def _run_plain(
    neurons: Neurons, where: Activations, inputs: Inputs, labels: Tensor, *, backward: bool
) -> tuple[Tensor, Readings]:
    """Read activations and, with `backward`, the gradients of the cross entropy."""
    neurons.model.requires_grad_(backward)  # so activations have gradients, also if the inputs are integers
    with torch.set_grad_enabled(backward), reading(neurons.model, where) as seen:
        logits = _finite(neurons.logits(inputs), seen)
        loss = F.cross_entropy(logits, labels, reduction="sum")
    found = {"activation": seen.values}
    if backward:
        found["gradient"], _ = _gradients(loss, seen, [])
    return logits.detach(), lambda layer: {
        name: by_position(uses[layer], layer, where, len(labels)) for name, uses in found.items()
    }


def _run_rescaled(
    neurons: Neurons, where: Activations, inputs: Inputs, labels: Tensor, baseline: Inputs
) -> tuple[Tensor, Readings]:
    """Read activations and what they contribute, by DeepLIFT, to the logit of the true class."""
    neurons.model.requires_grad_(False)
    both = map_tensors(Tensor.requires_grad_, join((inputs, baseline)))  # [R, ...]
    with torch.enable_grad(), Rescaling(len(labels) + 1), reading(neurons.model, where) as seen:
        logits = _finite(neurons.logits(both), seen)
        own = logits[:-1].gather(1, labels[:, None]).squeeze(1)  # [B]
        total = own.sum()
    multipliers, of_inputs = _gradients(total, seen, tensors(both))
    with torch.no_grad():
        parts = [(m * (x - x[-1:]))[:-1].flatten(1) for m, x in zip(of_inputs, tensors(both), strict=True)]
        check_balance(torch.cat(parts, 1), own - logits[-1, labels])

    def readings(layer: str) -> dict[str, Tensor]:
        a, m = (by_position(found[layer], layer, where, len(logits)) for found in (seen.values, multipliers))
        return {"activation": a[:-1], "contribution": m[:-1] * (a[:-1] - a[-1:])}

    return logits[:-1].detach(), readings


def by_position(uses: Sequence[Tensor], layer: str, where: Activations, rows: int) -> Tensor:
    """Join the tensors [R * k, ..., N, ...] of a layer, one per use, to one [R, N, P]."""
    axis, joined = where.axis[layer], []
    for use in uses:
        if use.shape[0] % rows:
            raise TorchsliceError(
                f"layer {layer!r} must have the samples on its first axis; its activations are {list(use.shape)} "
                f"for {rows} inputs. Wrap the model so that samples come first."
            )
        split = use.detach().unflatten(0, (rows, -1))  # [R, k, ..., N, ...]
        joined.append(split.movedim(axis + 1 if axis > 0 else axis, 1).reshape(rows, use.shape[axis], -1))
    return joined[0] if len(joined) == 1 else torch.cat(joined, 2)


def _gradients(
    target: Tensor, seen: Seen, inputs: Sequence[Tensor]
) -> tuple[dict[str, list[Tensor]], tuple[Tensor, ...]]:
    """Return the gradients of all uses of all layers, and those of the inputs."""
    for layer, uses in seen.values.items():
        if not all(use.requires_grad for use in uses):
            raise TorchsliceError(
                f"layer {layer!r} has no gradient: the model runs it without one (torch.no_grad or detach). "
                "Remove that from its forward, or take a metric without gradients: avg, var or ens."
            )
    flat = [use for uses in seen.values.values() for use in uses]
    found = torch.autograd.grad(target, [*flat, *inputs], materialize_grads=True)
    of_uses = iter(found)
    return {layer: [next(of_uses) for _ in uses] for layer, uses in seen.values.items()}, found[len(flat) :]


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
