"""Contributions: how much every neuron of a trained model matters to every class.

Shapes: B batch, C classes, N neurons of a layer, M neurons of all layers, P positions, n samples; R rows of a run: the
B samples and, for DeepLIFT, the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import Images, Task, check_task
from ...data.splits import rank_in_class
from ...errors import TorchsliceError
from ...graph.activations import Activations, Seen, by_neuron, find_activations, reading
from ...graph.neurons import Neurons, check_neurons
from ...graph.tied import mean_scores
from ...graph.views import view_of
from ...inputs import Inputs, device_of, join, kept_tokens, map_tensors, tensors, to_device
from ...tables import table
from ...training.progress import progress_bar
from ...training.ranks import current_ranks
from .deeplift import Rescaling, by_row, check_balance, check_rescale
from .metrics import METRICS, Term, reads


@dataclass(frozen=True, eq=False)
class Contributions:
    """Scores of all neurons for all classes; prints as a table.

    Attributes:
        classes: names of the C classes.
        scores: {metric: {layer: float64 [C, N]}}; `contributions["taylor"]` are those of one metric.
        samples: indices of the training samples they come from, int64 [n].
        counts: how many samples of each class, int64 [C].

    >>> scores["taylor"]["features.0.0"].shape
    torch.Size([10, 8])
    """

    classes: tuple[str, ...]
    scores: dict[str, dict[str, Tensor]]
    samples: Tensor
    counts: Tensor

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics there are scores of."""
        return list(self.scores)

    def __getitem__(self, metric: str) -> dict[str, Tensor]:
        return self.scores[self.the_metric(metric)]

    def the_metric(self, name: str | None) -> str:
        """Return the name of a metric there are scores of; without one, that of the only metric."""
        if name is None and len(self.scores) == 1:
            return self.metrics[0]
        if name not in self.scores:
            given = "none is named" if name is None else f"there is no {name!r}"
            raise TorchsliceError(
                f"the contributions are by {', '.join(self.scores)} and {given}: name one of them as the metric, or "
                "measure others with contributions(neurons, task, metric=[...])."
            )
        return name

    def tied(self, neurons: Neurons) -> Contributions:
        """Return them with one score for all neurons that leave together, see `graph.tied.mean_scores`."""
        return replace(self, scores={metric: mean_scores(neurons.sets, of) for metric, of in self.scores.items()})

    def to_plain(self) -> dict[str, Any]:
        """Return the scores as JSON-able data."""
        return {**map_tensors(Tensor.tolist, vars(self)), "classes": list(self.classes)}

    def __repr__(self) -> str:
        rows = []
        for layer, first in self[self.metrics[0]].items():
            scores = torch.stack([of[layer] for of in self.scores.values()])  # [metrics, C, N]
            silent = int((scores == 0).all(0).all(0).sum())
            rows.append((layer, first.shape[1], silent, *(f"{mean:.3g}" for mean in scores.mean((1, 2)).tolist())))
        title = (
            f"Contributions to {len(self.classes)} classes, from {self.counts.min()} to {self.counts.max()} samples "
            "per class; means over neurons and classes. A silent neuron scores 0 throughout."
        )
        return f"{title}\n{table(('layer', 'neurons', 'silent', *self.scores), rows)}"


def check_scores(scores: Any, neurons: Neurons, task: Task | None = None) -> None:
    """Raise unless these are contributions of the neurons, to the classes of a task if it is given."""
    if not isinstance(scores, Contributions):
        raise TorchsliceError(f"scores must be contributions(neurons, task), got {type(scores).__name__}.")
    widths = {layer: of.shape[1] for layer, of in scores[scores.metrics[0]].items()}
    if widths != {name: layer.count for name, layer in neurons.layers.items()}:
        odd = "of other neurons than the model's"
    elif task is not None and scores.classes != task.classes:
        odd = f"to other classes than those of {task.name}"
    else:
        return
    raise TorchsliceError(f"these are contributions {odd}; measure them again: contributions(neurons, task).")


def contributions(
    neurons: Neurons,
    task: Task,
    *,
    metric: str | Sequence[str] = "taylor",
    samples_per_class: int = 256,
    correct_only: bool = True,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Contributions:
    """Score every neuron of every sliceable layer for every class, in one pass over training samples.

    The metrics are those of NeuSemSlice (arXiv 2407.20281); what they are exactly is our definition. With s(x) the mean
    over positions (pixels, or tokens that are no padding) of a neuron's activation after norm and activation function,
    and all means and variances over the samples x of a class:

        avg       mean of abs(s)
        var       population variance of s
        ens       mean of avg and var, each scaled to [0, 1] within layer and class
        taylor    mean of abs(mean over positions of a * dL/da), L = cross entropy on the true class
        deeplift  mean of abs(sum over positions of the DeepLIFT (rescale) contribution to the logit of the class),
                  the baseline is the mean training input

    The model runs in eval mode, where it is, and is left as it was. Sums are kept in float64, so batch size and order
    change rounding only; a neuron that is constant has variance 0, and one that is dead scores 0 everywhere. Under
    torchrun the processes share the samples.

    Args:
        task: its training split is used, never another.
        metric: one name or several, which share the pass; see `METRICS`, which also takes new ones.
        samples_per_class: at most so many, the first in the order of the `seed`.
        correct_only: take only samples that the model classifies correctly. If no sample of a class is, misclassified
            ones are used.

    Raises TorchsliceError for a class without a sample, values that are not finite, and with "deeplift" for inputs that
    are not numbers of floating point and models that the rescale rule does not cover, such as transformers.

    >>> found = contributions(neurons, task, metric=["avg", "taylor"], samples_per_class=20, progress=False)
    >>> found["avg"]["features.0.0"].shape, found.counts.max()
    (torch.Size([10, 8]), tensor(20))
    """
    names = [metric] if isinstance(metric, str) else list(dict.fromkeys(metric))
    chosen = {name: METRICS[name] for name in names}
    if not chosen or samples_per_class < 1 or batch_size < 1:
        raise TorchsliceError(
            "contributions need at least one metric, samples_per_class >= 1 and batch_size >= 1; "
            f"got {names}, {samples_per_class} and {batch_size}."
        )
    check_neurons(neurons)
    check_task(task, neurons)
    _check_counts(task)
    terms = list(dict.fromkeys(term for m in chosen.values() for term in m.terms))
    if any("contribution" in reads(term) for term in terms):
        check_rescale(neurons)
    ranks, labels, classes = current_ranks(device_of(neurons.model)), task.train.labels, len(task.classes)
    found = _Sums(neurons, task, terms)
    order = rank_in_class(labels, seed).argsort(stable=True)
    candidates = [order[labels[order] == label] for label in range(classes)]
    wanted = sum(min(samples_per_class, len(rows)) for rows in candidates)
    with progress_bar(progress, total=math.ceil(wanted / batch_size / ranks.count)) as bar:
        for only in (correct_only, False):  # the second time for classes of which no sample is classified correctly
            without = (found.counts == 0).tolist()
            waiting = [rows if none else rows[:0] for rows, none in zip(candidates, without, strict=True)]
            while True:
                lacking = (samples_per_class - found.counts).tolist()
                rows = torch.cat([own[:k] for own, k in zip(waiting, lacking, strict=True)])
                waiting = [own[k:] for own, k in zip(waiting, lacking, strict=True)]
                if len(rows) == 0:
                    break
                batches = [batch for batch in ranks.part(rows).split(batch_size) if len(batch)]
                counted = torch.zeros(0, dtype=torch.uint8, device=found.device)
                for batch, inputs in zip(batches, task.train.read(batches, device=found.device), strict=True):
                    counted = torch.cat([counted, found.add(batch, inputs, only)])
                    bar("contributions", f"{len(found.samples) + int(counted.sum())} samples")
                counted = ranks.gathered(counted, len(rows)).bool().cpu()
                found.samples = torch.cat([found.samples, rows[counted]])
    counts, widths = found.counts, {layer: neurons.layers[layer].count for layer in found.where.chains}
    means = {
        t: (ranks.sum(sums).cpu() / counts[:, None]).split([*widths.values()], 1) for t, sums in found.sums.items()
    }
    scores: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for name, measure in chosen.items():
        for layer, *columns in zip(widths, *(means[term] for term in measure.terms), strict=True):
            scores[name][layer] = score = measure.score(*columns)
            if score.shape != (classes, widths[layer]) or not score.isfinite().all():
                raise TorchsliceError(
                    f"metric {name!r} must score layer {layer!r} in finite numbers {[classes, widths[layer]]}; got "
                    f"{list(score.shape)}, {int((~score.isfinite()).sum())} of them NaN or infinite. Check metric, "
                    "model and samples."
                )
    return Contributions(task.classes, scores, found.samples, counts)


def _check_counts(task: Task) -> None:
    counts = task.train.labels.bincount(minlength=len(task.classes))
    if not counts.all():
        raise TorchsliceError(
            f"class {task.classes[int(counts.argmin())]!r} of {task.name} has no training sample, so nothing "
            "contributes to it; leave the class out with a model and a task of the others."
        )


class _Sums:
    """Sums of terms over this process's training samples, for all layers, classes and neurons at once."""

    def __init__(self, neurons: Neurons, task: Task, terms: Sequence[Term]) -> None:
        self.where, self.neurons = find_activations(neurons), neurons.on(detached(neurons.model))
        self.labels, self.classes, self.device = task.train.labels, len(task.classes), device_of(neurons.model)
        rescaled = [term for term in terms if "contribution" in reads(term)]
        plain = [term for term in terms if term not in rescaled]
        self.runs = [(rescaled, mean_input(task, self.device))] if rescaled else []
        self.runs += [(plain, None)] if plain else []
        shape = self.classes, sum(neurons.layers[layer].count for layer in self.where.chains)
        self.sums = {t: torch.zeros(shape, dtype=torch.float64, device=self.device) for t in terms}  # [C, M] each
        self.samples = torch.zeros(0, dtype=torch.int64)  # of all processes

    @property
    def counts(self) -> Tensor:
        """How many samples of each class are in the sums, int64 [C]."""
        return self.labels[self.samples].bincount(minlength=self.classes)

    def add(self, rows: Tensor, inputs: Inputs, correct_only: bool) -> Tensor:
        """Add up the samples of a batch, or those that this very pass classifies correctly; say which, uint8 [B]."""
        labels = self.labels[rows].to(self.device)
        values: dict[Term, Tensor] = {}
        for terms, baseline in self.runs:
            logits, found = observe(self.neurons, self.where, inputs, labels, terms, baseline)
            values |= found
        counted = (logits.argmax(1) == labels) | (not correct_only)  # [B]
        present, place = labels[counted].unique(return_inverse=True)  # [k] classes, of which a batch has few
        member = (place == torch.arange(len(present), device=self.device)[:, None]).double()  # [k, samples that count]
        for term, value in values.items():
            self.sums[term][present] += member @ value[counted]
        return counted.byte()


def mean_input(task: Task, device: torch.device) -> Inputs:
    """Return the mean training input, [1, ...] for every tensor of the inputs; that of images is exact."""
    if isinstance(task.train, Images):
        images = task.train.images
        total = torch.stack([part.sum(0, dtype=torch.int64) for part in images.split(1024)]).sum(0)
        return task.train.measured().normalise((total.double() / len(images))[None]).to(device)
    example, ranks = to_device(task.example, device), current_ranks(device)
    sums = [torch.zeros_like(tensor[:1], dtype=torch.float64) for tensor in tensors(example)]
    batches = [rows for rows in ranks.part(torch.arange(len(task.train))).split(256) if len(rows)]
    for inputs in task.train.read(batches, device=device):
        for total, tensor in zip(sums, tensors(inputs), strict=True):
            total += tensor.sum(0, keepdim=True, dtype=torch.float64)
    means = iter(sums)
    return map_tensors(lambda tensor: (ranks.sum(next(means)) / len(task.train)).to(tensor.dtype), example)


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

    The neurons are of a `detached` model. With a baseline, one input that DeepLIFT compares the others with, terms may
    read contributions, without one gradients.
    """
    count, rescale = len(labels), baseline is not None
    backward = rescale or any("gradient" in reads(term) for term in terms)
    if rescale:
        inputs = map_tensors(Tensor.requires_grad_, join((inputs, baseline)))  # [R, ...]
    neurons.model.requires_grad_(backward and not rescale)  # for gradients also if the inputs are integers
    rescaling = Rescaling(count + 1) if rescale else nullcontext()
    with torch.set_grad_enabled(backward), rescaling, reading(neurons.model, where) as seen:
        logits = neurons.logits(inputs)
        own = logits[:count].gather(1, labels[:, None]).squeeze(1)  # [B]
        target = own.sum() if rescale else F.cross_entropy(logits, labels, reduction="sum")
    if not logits.isfinite().all():
        odd = [layer for layer, uses in seen.values.items() if not all(use.isfinite().all() for use in uses)]
        raise TorchsliceError(
            f"the model computes NaN or infinite values {f'from layer {odd[0]!r} on' if odd else 'in its logits'}, so "
            "nothing can be said about its neurons. Check its weights and the data."
        )
    gradients, of_inputs = _gradients(target, seen, tensors(inputs) if rescale else []) if backward else ({}, [])
    if rescale:
        parts = [(m * (x - x[-1:]))[:-1].flatten(1) for m, x in zip(of_inputs, tensors(inputs), strict=True)]
        check_balance(torch.cat(parts, 1).detach(), (own - logits[-1, labels]).detach())
    values: dict[Term, list[Tensor]] = {term: [] for term in terms}
    tokens = kept_tokens(inputs)
    for layer in where.chains:
        a = by_position(seen.values[layer], layer, where, count + rescale)
        found: dict[str, Any] = {"activation": a[:count], "kept": None}
        uses = seen.values[layer]
        if tokens is not None and all(use.shape[:-1] == tokens.shape for use in uses):
            kept = [tokens[:, :, None].expand(use.shape) for use in uses]
            found["kept"] = by_position(kept, layer, where, count)  # [B, N, P]
        if backward:
            found["gradient"] = m = by_position(gradients[layer], layer, where, count + rescale)
        if rescale:
            found["contribution"] = m[:-1] * (a[:-1] - a[-1:])
        for term in terms:
            value = term(**{name: found[name] for name in reads(term)}).double()
            if value.shape != a[:count].shape[:2]:
                raise TorchsliceError(
                    f"term {term.__name__!r} of a metric must return one value per sample and neuron, "
                    f"{list(a[:count].shape[:2])}; it returned {list(value.shape)}."
                )
            values[term].append(value)
    return logits[:count].detach(), {term: torch.cat(columns, 1) for term, columns in values.items()}


def _gradients(target: Tensor, seen: Seen, inputs: list[Tensor]) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Return the gradients of all uses of all layers, and those of the inputs."""
    for layer, uses in seen.values.items():
        if not all(use.requires_grad for use in uses):
            raise TorchsliceError(
                f"layer {layer!r} has no gradient: the model runs it without one (torch.no_grad or detach). "
                "Remove that from its forward, or take a metric without gradients: avg, var or ens."
            )
    flat = [use for uses in seen.values.values() for use in uses]
    found = iter(torch.autograd.grad(target, [*flat, *inputs], materialize_grads=True))
    return {layer: [next(found) for _ in uses] for layer, uses in seen.values.items()}, [*found]


def by_position(uses: Sequence[Tensor], layer: str, where: Activations, rows: int) -> Tensor:
    """Join the tensors [R * k, ..., rows, ...] of a layer, one per use, to one [R, N, P].

    The rows of a head or another neuron that has several count as positions.
    """
    axis = where.axis[layer]
    split = [by_row(use, rows, f"layer {layer!r}") for use in uses]  # [R, k, ..., N, ...]
    joined = [use.movedim(axis + 1 if axis > 0 else axis, 1).flatten(2) for use in split]
    return by_neuron(joined[0] if len(joined) == 1 else torch.cat(joined, 2), where.rows[layer])
