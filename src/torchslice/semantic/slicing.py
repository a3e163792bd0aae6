"""Slices of any trained network: the critical neurons of each class, of all classes, and of groups of classes.

Shapes: C classes, N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.find import find_neurons
from ..data import Data
from ..errors import TorchsliceError
from ..slices import Slice
from ..training.placement import choose_placement
from .cka import prefix_cka
from .contributions import Contributions
from .grams import Similarity, prefix_similarity
from .merge import complete
from .result import Rule, SemanticSlices
from .selection import balanced, by_mass, prefix_mass, tapered, top_share, up_to

Chosen = tuple[Tensor, Tensor]  # the critical neurons of a layer per class, bool [C, N], and of all classes, bool [N]


def slice_model(
    model: nn.Module,
    data: Data,
    contributions: Contributions,
    *,
    metric: str | None = None,
    slicer: str = "semantic",
    criterion: str = "cka",
    theta: float = 0.95,
    slope: float = 1.0,
    share: float = 0.5,
    taper: float = 0.1,
    positions: str = "all",
    batch_size: int = 128,
    device: str | torch.device = "auto",
    memory_gb: float = 2.0,
    progress: bool = True,
) -> SemanticSlices:
    """Find the critical neurons of every class of a trained network, and those of all classes.

    After NeuSemSlice (arXiv 2407.20281); how much is enough, and how classes are joined, are definitions of torchslice.
    Every slice keeps at least one neuron of every layer. A layer that is constant for a class is kept whole.

    Args:
        model: any network with the classes of `data`; one that was trained with gates goes without them
            (`GatedModel.fold`).
        data: what the contributions were measured on; only training images are looked at.
        contributions: from `contributions(model, data)`.
        metric: which of their metrics; needed when there are several.
        slicer, criterion, theta, slope, share, taper, positions: see `Rule`.
        batch_size: images per forward pass; the result does not depend on it.
        memory_gb: the layers whose matrices do not fit together in so many GiB are done in several runs over the
            samples; 16 N^2 bytes per layer. The widest layer alone has to fit.

    >>> semantic = slice_model(model, data, contributions(model, data), theta=0.95)
    >>> small = extract(model, semantic.by_class["cat"] | semantic.by_class["dog"], data.example, classes=[3, 5])
    """
    place = choose_placement(device, "fp32").device
    neurons = find_neurons(model.to(place), data.example.to(place))
    widths = {name: layer.count for name, layer in neurons.layers.items()}
    rule = Rule(_check(contributions, metric, data, widths), slicer, criterion, theta, slope, share, taper, positions)
    running: dict[str, Any] = {"positions": positions, "batch_size": batch_size, "device": place, "progress": progress}
    chosen: dict[str, Chosen] = {}
    for layers in _that_fit(widths, memory_gb) if rule.by_similarity else [[*widths]]:
        similarity = None
        if rule.by_similarity:
            similarity = prefix_similarity(model, data, contributions, layers=layers, **running)
        chosen |= {layer: _choose(contributions, layer, rule, similarity) for layer in layers}
    return _assemble(rule, contributions.classes, chosen)


def slices_from(contributions: Contributions, rule: Rule, similarity: Similarity | None = None) -> SemanticSlices:
    """Return the slices that follow from contributions, and from similarities where the rule asks for them.

    >>> similarity = prefix_similarity(model, data, scores)
    >>> {theta: slices_from(scores, Rule("taylor", theta=theta), similarity) for theta in (0.90, 0.95, 0.99)}
    """
    scores = contributions[rule.metric]
    if rule.by_similarity and (similarity is None or similarity.positions != rule.positions):
        raise TorchsliceError(
            f"the rule ({rule}) needs prefix_similarity(model, data, contributions, positions={rule.positions!r})."
        )
    chosen = {layer: _choose(contributions, layer, rule, similarity) for layer in scores}
    return _assemble(rule, contributions.classes, chosen)


def _choose(contributions: Contributions, layer: str, rule: Rule, similarity: Similarity | None) -> Chosen:
    scores = contributions[rule.metric][layer]  # [C, N]
    together = scores.mean(0)  # [N]
    if rule.slicer == "global":
        whole = top_share(together, rule.share)
        return whole.expand(len(scores), -1), whole
    if rule.slicer == "budget":
        widths = {name: of.shape[1] for name, of in contributions[rule.metric].items()}
        masks = balanced(scores, tapered(widths, rule.share, rule.taper)[layer])
        return masks, masks.any(0)
    if rule.slicer == "category":
        masks = top_share(scores, rule.share)
        return masks, masks.any(0)
    layers = [*contributions[rule.metric]]
    theta = rule.theta_of(layers.index(layer), len(layers))
    if rule.criterion == "mass":
        masks = torch.stack([by_mass(row, theta) for row in scores])
        curve = partial(prefix_mass, together)
    else:
        assert similarity is not None
        curves = similarity.curves[rule.metric][layer]  # [C, N]
        masks = torch.stack([up_to(row, sims, theta) for row, sims in zip(scores, curves, strict=True)])
        curve = partial(prefix_cka, similarity.pooled[layer])
    return masks, complete(masks.any(0), together, theta, curve)


def _assemble(rule: Rule, classes: Sequence[str], chosen: Mapping[str, Chosen]) -> SemanticSlices:
    by_class = {
        name: Slice({layer: masks[label] for layer, (masks, _) in chosen.items()}) for label, name in enumerate(classes)
    }
    return SemanticSlices.of(rule, by_class, Slice({layer: whole for layer, (_, whole) in chosen.items()}))


def _that_fit(widths: Mapping[str, int], memory_gb: float) -> Iterator[list[str]]:
    """Yield the layers in groups, in order, whose pairs of float64 matrices [N, N] fit into so many GiB."""
    group: list[str] = []
    free = memory_gb * 2**30
    for layer, width in widths.items():
        if group and 16 * width**2 > free:
            yield group
            group, free = [], memory_gb * 2**30
        group.append(layer)
        free -= 16 * width**2
    yield group


def _check(contributions: Contributions, metric: str | None, data: Data, widths: Mapping[str, int]) -> str:
    """Return the metric to go by; raise unless it is clear, and of a model with these layers and these classes."""
    if metric is None and len(contributions.metrics) > 1:
        known = " or ".join(f"metric={name!r}" for name in contributions.metrics)
        raise TorchsliceError(f"there are contributions of several metrics; choose one: {known}.")
    metric = metric or contributions.metrics[0]
    found = {layer: scores.shape[1] for layer, scores in contributions[metric].items()}
    if contributions.classes != data.classes:
        raise TorchsliceError(
            f"these are contributions to other classes than the {len(data.classes)} of {data.name}; "
            "measure them on these data: contributions(model, data)."
        )
    if found != widths:
        odd = next(layer for layer in {**widths, **found} if widths.get(layer) != found.get(layer))
        raise TorchsliceError(
            f"these are contributions of another model: layer {odd!r} has {found.get(odd, 'no')} neurons there and "
            f"{widths.get(odd, 'no')} in the model. Measure them on this model: contributions(model, data)."
        )
    return metric
