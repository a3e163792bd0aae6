"""Contributions: how much every neuron of a trained model matters to every class.

Shapes: C classes, N neurons of a layer, M neurons of all layers, b samples of a batch that count, n samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import Images, Task
from ...data.splits import rank_in_class
from ...errors import TorchsliceError
from ...graph.activations import find_activations
from ...graph.neurons import Neurons
from ...inputs import Inputs, device_of, map_tensors, tensors
from ...tables import table
from ...training.progress import Bar, progress_bar
from .deeplift import check_rescale
from .metrics import METRICS, Term, reads
from .readings import detached, observe


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

    def check_of(self, neurons: Neurons, task: Task) -> None:
        """Raise unless the scores are of these neurons, for these classes."""
        widths = {layer: of.shape[1] for layer, of in self[self.metrics[0]].items()}
        same_neurons = widths == {name: layer.count for name, layer in neurons.layers.items()}
        if not same_neurons or self.classes != task.classes:
            what = (
                f"to other classes than those of {task.name}" if same_neurons else "of other neurons than the model's"
            )
            raise TorchsliceError(f"these are contributions {what}; measure them again: contributions(neurons, task).")

    def to_plain(self) -> dict[str, Any]:
        """Return the scores as JSON-able data."""
        return {
            "classes": list(self.classes),
            "scores": {m: {layer: s.tolist() for layer, s in layers.items()} for m, layers in self.scores.items()},
            "samples": self.samples.tolist(),
            "counts": self.counts.tolist(),
        }

    def __str__(self) -> str:
        rows, low, high = [], int(self.counts.min()), int(self.counts.max())
        for layer, first in self[self.metrics[0]].items():
            scores = [of[layer] for of in self.scores.values()]
            silent = int(torch.stack([(s == 0).all(0) for s in scores]).all(0).sum())
            rows.append((layer, first.shape[1], silent, *(f"{s.mean().item():.3g}" for s in scores)))
        title = (
            f"Contributions to {len(self.classes)} classes, from {low} to {high} samples per class; means over neurons "
            "and classes. A silent neuron scores 0 throughout."
        )
        return f"{title}\n{table(('layer', 'neurons', 'silent', *self.scores), rows)}"

    __repr__ = __str__


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
    over positions of a neuron's activation after norm and activation function, and all means and variances over the
    samples x of a class:

        avg       mean of abs(s)
        var       population variance of s
        ens       mean of avg and var, each scaled to [0, 1] within layer and class
        taylor    mean of abs(mean over positions of a * dL/da), L = cross entropy on the true class
        deeplift  mean of abs(sum over positions of the DeepLIFT (rescale) contribution to the logit of the class),
                  the baseline is the mean training input

    The model runs in eval mode, where it is, and is left as it was. Sums are kept in float64, so batch size and order
    change rounding only; a neuron that is constant has variance 0, and one that is dead scores 0 everywhere.

    Args:
        task: its training split is used, never another.
        metric: one name or several, which share the pass; see `METRICS`, which also takes new ones.
        samples_per_class: at most so many.
        correct_only: take only samples that the model classifies correctly. If no sample of a class is, misclassified
            ones are used.
        seed: of the choice of the samples.
        batch_size: samples per forward pass.

    Raises:
        TorchsliceError: for a class without a sample, values that are not finite, and with "deeplift" for inputs that
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
    _check_classes(neurons, task)
    terms = list(dict.fromkeys(term for m in chosen.values() for term in m.terms))
    if any("contribution" in reads(term) for term in terms):
        check_rescale(neurons)
    sweep = _Sweep(neurons, task, terms, batch_size)
    order = rank_in_class(task.train.labels, seed).argsort(stable=True)
    candidates = [order[task.train.labels[order] == label] for label in range(len(task.classes))]
    wanted = sum(min(samples_per_class, len(rows)) for rows in candidates)
    with progress_bar(progress, total=math.ceil(wanted / batch_size)) as bar:
        sweep.fill(candidates, samples_per_class, correct_only, bar)
        without = [rows if n == 0 else rows[:0] for rows, n in zip(candidates, sweep.counts.tolist(), strict=True)]
        sweep.fill(without, samples_per_class, False, bar)
    widths = {layer: neurons.layers[layer].count for layer in sweep.where.chains}
    means = {
        term: (sums.cpu() / sweep.counts[:, None]).split([*widths.values()], 1) for term, sums in sweep.sums.items()
    }
    scores: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for name, measure in chosen.items():
        for layer, *columns in zip(widths, *(means[term] for term in measure.terms), strict=True):
            scores[name][layer] = measure.score(*columns)
            _check_scores(scores[name][layer], (len(task.classes), widths[layer]), name, layer)
    return Contributions(task.classes, scores, sweep.samples, sweep.counts)


class _Sweep:
    """Sums of terms over training samples, for all layers, classes and neurons at once."""

    def __init__(self, neurons: Neurons, task: Task, terms: Sequence[Term], batch_size: int) -> None:
        self.task, self.batch_size, self.device = task, batch_size, device_of(neurons.model)
        self.where, self.neurons = find_activations(neurons), neurons.on(detached(neurons.model))
        rescaled = [term for term in terms if "contribution" in reads(term)]
        plain = [term for term in terms if term not in rescaled]
        self.runs = [(rescaled, mean_input(task, self.device))] if rescaled else []
        self.runs += [(plain, None)] if plain else []
        self.sums: dict[Term, Tensor] = {}  # {term: float64 [C, M]}
        self.samples = torch.zeros(0, dtype=torch.int64)

    @property
    def counts(self) -> Tensor:
        """How many samples of each class are in the sums, int64 [C]."""
        return self.task.train.labels[self.samples].bincount(minlength=len(self.task.classes))

    def fill(self, waiting: list[Tensor], samples_per_class: int, correct_only: bool, bar: Bar) -> None:
        """Add up the first `samples_per_class` samples of every class that count, of those that wait.

        They are tried in their order until there are enough. Whether a sample is classified correctly shows in the pass
        itself, and neither batch size nor other classes play a part.
        """
        while True:
            lacking = (samples_per_class - self.counts).tolist()
            rows = torch.cat([own[:k] for own, k in zip(waiting, lacking, strict=True)])
            waiting = [own[k:] for own, k in zip(waiting, lacking, strict=True)]
            if len(rows) == 0:
                return
            batches = rows.split(self.batch_size)
            for batch, inputs in zip(batches, self.task.train.read(batches, device=self.device), strict=True):
                self.add(batch, inputs, correct_only)
                bar.advance("contributions", f"{len(self.samples)} samples")

    def add(self, rows: Tensor, inputs: Inputs, correct_only: bool) -> None:
        """Add up the samples of a batch, or those of them that are classified correctly."""
        labels = self.task.train.labels[rows].to(self.device)
        values: dict[Term, Tensor] = {}
        for terms, baseline in self.runs:
            logits, found = observe(self.neurons, self.where, inputs, labels, terms, baseline)
            values |= found
        counted = (logits.argmax(1) == labels) | (not correct_only)  # [B]
        member = F.one_hot(labels[counted], len(self.task.classes)).double().T  # [C, b]
        for term, value in values.items():
            self.sums[term] = self.sums.get(term, 0) + member @ value[counted]
        self.samples = torch.cat([self.samples, rows[counted.cpu()]])


def mean_input(task: Task, device: torch.device) -> Inputs:
    """Return the mean training input, [1, ...] for every tensor of the inputs."""
    if isinstance(task.train, Images):
        images = task.train.images
        total = torch.stack([part.sum(0, dtype=torch.int64) for part in images.split(1024)]).sum(0)
        return task.train.measured().normalise((total.double() / len(images))[None]).to(device)
    sums: list[Tensor] = []
    batches = torch.arange(len(task.train)).split(256)
    for inputs in task.train.read(batches, device=device):
        found = [tensor.sum(0, keepdim=True, dtype=torch.float64) for tensor in tensors(inputs)]
        sums = [total + more for total, more in zip(sums, found, strict=True)] if sums else found
    means = iter(sums)
    return map_tensors(lambda tensor: (next(means) / len(task.train)).to(tensor.dtype), inputs)


def _check_classes(neurons: Neurons, task: Task) -> None:
    if neurons.num_classes != len(task.classes) or neurons.classes not in (None, task.classes):
        raise TorchsliceError(
            f"the model answers with {neurons.num_classes} classes and {task.name} has {len(task.classes)}; "
            "give the task it was trained on, classes in the same order."
        )
    counts = task.train.labels.bincount(minlength=len(task.classes))
    if not counts.all():
        raise TorchsliceError(
            f"class {task.classes[int(counts.argmin())]!r} of {task.name} has no training sample, so nothing "
            "contributes to it; leave the class out with a model and a task of the others."
        )


def _check_scores(scores: Tensor, shape: tuple[int, int], metric: str, layer: str) -> None:
    if scores.shape != shape or not scores.isfinite().all():
        raise TorchsliceError(
            f"metric {metric!r} must score layer {layer!r} in finite numbers {list(shape)}; got {list(scores.shape)}, "
            f"{int((~scores.isfinite()).sum())} of them NaN or infinite. Check metric, model and samples."
        )
