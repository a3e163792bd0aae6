"""Contributions: how much every neuron of a trained model matters to every class.

Shapes: C classes, N neurons of a layer, M neurons of all layers, n samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.find import find_neurons
from ..core.taps import find_taps
from ..data import Data
from ..errors import TorchsliceError
from ..tables import table
from ..training.placement import choose_placement
from .deeplift import check_rescale
from .metrics import METRICS, reads
from .sweep import sweep


@dataclass(frozen=True, eq=False)
class Contributions:
    """Scores of all neurons for all classes, `contributions["taylor"]["conv1"]` -> float64 [C, N].

    `samples` are the training images they come from, by index, int64 [n]; `counts` how many of each class, int64 [C].
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
        if metric not in self.scores:
            raise TorchsliceError(
                f"there are no scores of metric {metric!r}, only of {', '.join(self.scores)}; "
                f"ask for them: contributions(..., metric={metric!r})."
            )
        return self.scores[metric]

    def to_plain(self) -> dict[str, Any]:
        """Return the scores as JSON-able data."""
        scores = {m: {layer: s.tolist() for layer, s in layers.items()} for m, layers in self.scores.items()}
        return {
            "classes": list(self.classes),
            "scores": scores,
            "samples": self.samples.tolist(),
            "counts": self.counts.tolist(),
        }

    def __str__(self) -> str:
        layers = {layer: s.shape[1] for layer, s in next(iter(self.scores.values())).items()}
        rows = []
        for layer, count in layers.items():
            scores = [self.scores[metric][layer] for metric in self.scores]
            silent = int(torch.stack([(s == 0).all(0) for s in scores]).all(0).sum())
            rows.append((layer, count, silent, *(f"{s.mean().item():.3g}" for s in scores)))
        title = (
            f"Contributions of {sum(layers.values())} neurons to {len(self.classes)} classes, from "
            f"{int(self.counts.min())} to {int(self.counts.max())} images per class; means over neurons and classes. "
            "A silent neuron scores 0 throughout."
        )
        return f"{title}\n{table(('layer', 'neurons', 'silent', *self.scores), rows)}"

    __repr__ = __str__


def contributions(
    model: nn.Module,
    data: Data,
    *,
    metric: str | Sequence[str] = "taylor",
    samples_per_class: int = 256,
    correct_only: bool = True,
    seed: int = 0,
    batch_size: int = 128,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> Contributions:
    """Score every neuron of every sliceable layer for every class, in one pass over training images.

    The metrics are those of NeuSemSlice (arXiv 2407.20281); what they are exactly is our definition. With s(x) the mean
    over positions of a neuron's activation after norm and activation function, and all means and variances over the
    samples x of a class:

        avg       mean of abs(s)
        var       population variance of s
        ens       mean of avg and var, each scaled to [0, 1] within layer and class
        taylor    mean of abs(mean over positions of a * dL/da), L = cross entropy on the true class
        deeplift  mean of abs(sum over positions of the DeepLIFT (rescale) contribution to the logit of the class),
                  the baseline is the mean training image

    The model is run in eval mode and left as it was. Sums are kept in float64, so batch size and order play no part but
    for rounding; a neuron that is constant has variance 0, and one that is dead scores 0 everywhere. Raises
    TorchsliceError for a class without a sample, values that are not finite, and with "deeplift" for models that the
    rescale rule does not cover, such as transformers.

    Args:
        data: its training split is used, never another.
        metric: one name or several, which share the pass; see `METRICS`, which also takes new ones.
        samples_per_class: images per class at most.
        correct_only: take only images that the model classifies correctly; of a class of which it gets none right, any.
        seed: of the choice of the images.
        batch_size: images per forward pass.

    >>> scores = contributions(model, data, metric=["avg", "taylor"])
    >>> scores["taylor"]["conv1"]  # float64 [C, N]
    """
    names = [metric] if isinstance(metric, str) else list(dict.fromkeys(metric))
    chosen = {name: METRICS[name] for name in names}
    if not chosen or samples_per_class < 1 or batch_size < 1:
        raise TorchsliceError(
            "contributions need at least one metric, samples_per_class >= 1 and batch_size >= 1; "
            f"got {names}, {samples_per_class} and {batch_size}."
        )
    place = choose_placement(device, "fp32").device
    model.to(place)
    example = data.example.to(place)
    neurons = find_neurons(model, example)
    if neurons.classes != len(data.classes):
        raise TorchsliceError(
            f"the model answers with {neurons.classes} classes and {data.name} has {len(data.classes)}; "
            "give the data set it was trained on, classes in the same order."
        )
    taps = find_taps(model, example, neurons)
    terms = list(dict.fromkeys(term for m in chosen.values() for term in m.terms))
    if any("contribution" in reads(term) for term in terms):
        check_rescale(model, example)
    totals, samples = sweep(
        model,
        data,
        taps,
        terms,
        samples_per_class=samples_per_class,
        correct_only=correct_only,
        seed=seed,
        batch_size=batch_size,
        device=place,
        progress=progress,
    )
    counts = data.train.labels[samples].bincount(minlength=len(data.classes))
    if not counts.all():
        raise TorchsliceError(
            f"class {data.classes[int(counts.argmin())]!r} of {data.name} has no training image, so nothing "
            "contributes to it; leave the class out with a model and data of the others."
        )
    widths = {layer: neurons.layers[layer].count for layer in taps.axis}
    means = {term: (total / counts[:, None]).split([*widths.values()], 1) for term, total in totals.items()}
    scores: dict[str, dict[str, Tensor]] = {}
    for name, found in chosen.items():
        by_layer = zip(widths, *(means[term] for term in found.terms), strict=True)
        scores[name] = {layer: found.score(*columns) for layer, *columns in by_layer}
        for layer, width in widths.items():
            _check_scores(scores[name][layer], (len(counts), width), name, layer, data.classes)
    return Contributions(data.classes, scores, samples, counts)


def _check_scores(scores: Tensor, shape: tuple[int, int], metric: str, layer: str, classes: Sequence[str]) -> None:
    if scores.shape != shape:
        raise TorchsliceError(
            f"metric {metric!r} must score layer {layer!r} as {list(shape)}, got {list(scores.shape)}."
        )
    if not scores.isfinite().all():
        odd = classes[int((~scores.isfinite()).any(1).int().argmax())]
        raise TorchsliceError(
            f"metric {metric!r} is NaN or infinite in layer {layer!r} for class {odd!r}: its activations or gradients "
            "are. Check the model's weights and the data."
        )
