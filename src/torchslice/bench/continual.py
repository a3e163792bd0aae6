"""Rivals of `extend`: other ways to teach a network new classes.

Shapes: n samples, C classes known before, k new ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.find import find_neurons
from ..core.record import evaluating
from ..core.taps import find_taps
from ..core.widen import grow, last_wire
from ..data import Data, Split
from ..errors import TorchsliceError
from ..slices import Slice
from ..training import cross_entropy, fit
from ..training.objectives import Objective
from ..use.evaluate import accuracy_of, device_of, predict_logits
from ..use.extended import joint_data
from ..use.partial import Partial
from .rivals import BATCH, Cka, kernels

Loss = tuple[Tensor, Tensor, dict[str, Tensor]]


def among_new(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Return the cross entropy of logits [B, C + k] among the k classes from `first` on, and which are right [B]."""
    new, own = logits[:, first:].float(), labels - first
    return F.cross_entropy(new, own), new.argmax(1) == own


@dataclass(frozen=True)
class NewRows:
    """An objective: cross entropy among the new classes only, whose labels begin with C = `first`."""

    first: int

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Loss:
        return *among_new(model(images), labels, self.first), {}


@dataclass(frozen=True, eq=False)
class Elastic:
    """EWC (arXiv 1612.00796, equation 3): weights that mattered before are drawn back to where they were.

    The pull on a weight is at most 0.1 / learning_rate, so that a step goes a tenth of the way: more would diverge.
    """

    first: int
    anchors: Mapping[str, Tensor]
    fisher: Mapping[str, Tensor]
    weight: float
    learning_rate: float

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Loss:
        loss, right = among_new(model(images), labels, self.first)
        pull = torch.zeros((), device=loss.device)
        for name, parameter in model.named_parameters():
            if name in self.anchors:
                known = parameter[: len(self.anchors[name])]  # the classifier has got more rows
                strength = (self.weight * self.fisher[name]).clamp(max=0.1 / self.learning_rate).to(loss.device)
                pull = pull + (strength * (known - self.anchors[name].to(loss.device)).square()).sum() / 2
        return loss + pull, right, {"pull": pull}


@dataclass(frozen=True, eq=False)
class Distilling:
    """LwF (arXiv 1606.09282, section 3): on new images, the known classes' scores stay what they were."""

    first: int
    teacher: nn.Module
    weight: float
    temperature: float = 2.0

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Loss:
        logits = model(images)
        loss, right = among_new(logits, labels, self.first)
        with evaluating(self.teacher):
            before = self.teacher(images).float()
        known, heat = logits[:, : self.first].float(), self.temperature
        change = F.kl_div((known / heat).log_softmax(1), (before / heat).softmax(1), reduction="batchmean") * heat**2
        return loss + self.weight * change, right, {"change": change}


def fisher_information(model: nn.Module, data: Data, *, images: int, seed: int = 0) -> dict[str, Tensor]:
    """Return the diagonal of a model's Fisher information, for labels drawn from its own predictions.

    The mean, over `images` training images, of squared gradients of the log probability.
    """
    model = copy.deepcopy(model).eval()
    device, generator = device_of(model), torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    sample = data.normalise(data.train.limit(images, seed=seed).images).to(device)
    for image in sample.split(1):
        scores = model(image).log_softmax(1)[0]
        label = torch.multinomial(scores.exp().detach().cpu(), 1, generator=generator).item()
        for total, gradient in zip(
            sums.values(), torch.autograd.grad(scores[label], list(parameters.values())), strict=True
        ):
            total += gradient.square()
    return {name: total / len(sample) for name, total in sums.items()}


def similarity_to_previous(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Return the CKA of every layer's activations with those of the layer before it, in forward order.

    So DeepArc compares blocks.

    Args:
        images: normalised, [n, ch, H, W] on the model's device.
    """
    taps = find_taps(model, images[:2])
    found = {pair: Cka() for pair in pairwise(taps.chains)}
    for batch in images.split(BATCH):
        seen = kernels(model, taps, batch)
        for (before, layer), cka in found.items():
            cka.add(seen[before], seen[layer])
    return {layer: cka.value for (_, layer), cka in found.items()}


def redundant_layers(similarity: Mapping[str, float], full: Slice, *, threshold: float = 0.99) -> Slice:
    """Return the neurons of DeepArc's redundant layers: those more similar to the layer before than the threshold.

    That are all but the first of each run of joined blocks; layers stand for its blocks. If there are fewer, the third
    of all layers that are most similar is taken, so that small networks have something to train.
    """
    ranked = sorted(similarity, key=lambda layer: -similarity[layer])
    alike = [layer for layer in ranked if similarity[layer] > threshold]
    chosen = max(alike, ranked[: max(1, len(full.layers) // 3)], key=len)
    return Slice({layer: mask & (layer in chosen) for layer, mask in full.masks.items()})


# -- all of them ------------------------------------------------------------------------------------------------
def learned(
    base: nn.Module,
    known: Data,
    new: Data,
    *,
    rates: Sequence[float],
    ewc_weights: Sequence[float],
    lwf_weights: Sequence[float],
    fisher_images: int,
    similarity_images: int,
    say: Callable[[str], None],
    seed: int,
    learning_rate: float,
    **training: Any,
) -> dict[str, nn.Module]:
    """Teach a network of the known classes the new ones in every way; each gives a network with all rows.

    Of several learning rates, and weights of EWC and LwF, the best on validation images are taken, by the mean accuracy
    on known and new classes, task given. `learning_rate`, that of the first training, is among the rates. Without
    replay only the new rows compete, which forgets less.
    """
    first, example = len(known.classes), new.example.to(device_of(base))
    neurons = find_neurons(base, example)
    joint, only = joint_data(known, new), mixed(known, new, 0.0, seed)
    held = joint.validation.labels

    def grown() -> nn.Module:
        return grow(base, neurons, {last_wire(neurons, neurons.head[0]): len(new.classes)}, seed=seed)

    def best(
        name: str,
        objectives: Callable[[float], Sequence[Objective]],
        data: Data = only,
        make: Callable[[], nn.Module] = grown,
    ) -> nn.Module:
        """Train with every objective for every learning rate; what diverges is left out."""
        tried = []
        for rate in (*rates, learning_rate):
            for number, objective in enumerate(objectives(rate)):
                say(f"{name}, learning rate {rate:g}, objective {number + 1}")
                model = make()
                try:
                    fit(model, data, objective=objective, seed=seed, learning_rate=rate, **training)
                except TorchsliceError as error:
                    say(str(error))
                    continue
                model = model.merged() if isinstance(model, Partial) else model
                tried.append((sum(by_task(predict_logits(model, joint, split="validation"), held, first)), model))
        if not tried:
            raise TorchsliceError(f"{name} diverges at every learning rate; lower the rates of the bench.")
        return max(tried, key=lambda found: found[0])[1]

    made = {"naive": best("naive", lambda rate: [NewRows(first)])}
    for share in (0.05, 0.1, 1.0):
        made[f"replay {share:.0%}"] = best(
            f"replay {share:.0%}", lambda rate: [cross_entropy], mixed(known, new, share, seed)
        )
    anchors = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    fisher = fisher_information(base, known, images=fisher_images, seed=seed)
    made["EWC"] = best("EWC", lambda rate: [Elastic(first, anchors, fisher, w, rate) for w in ewc_weights])
    made["LwF"] = best("LwF", lambda rate: [Distilling(first, base, w) for w in lwf_weights])
    sample = known.normalise(known.train.limit(similarity_images, seed=seed).images).to(example.device)
    part = redundant_layers(similarity_to_previous(base, sample), neurons.full())
    rows = range(first, first + len(new.classes))

    def layers() -> nn.Module:
        return Partial(grown(), part, example, classes=rows, batch_statistics=True)

    made["DeepArc"] = best("DeepArc", lambda rate: [NewRows(first)], make=layers)
    return made


def mixed(known: Data, new: Data, share: float, seed: int) -> Data:
    """Return the new images and a share of the known ones, of each split but the test split, with all classes."""
    joint = joint_data(known, new)

    def part(name: str) -> Split:
        split: Split = getattr(joint, name)
        is_new = split.labels >= len(known.classes)
        old, count = split.take(~is_new), round(share * int((~is_new).sum()))
        fresh = split.take(is_new)
        drawn = old.limit(count, seed=seed) if count else old.take(torch.arange(0))
        return Split(torch.cat([drawn.images, fresh.images]), torch.cat([drawn.labels, fresh.labels]))

    return replace(joint, train=part("train"), validation=part("validation"))


def by_task(logits: Tensor, labels: Tensor, first: int) -> tuple[float, float]:
    """Score logits [n, C + k] on the known and on the new classes, each among themselves."""
    is_new = labels >= first
    known = accuracy_of(logits[~is_new, :first], labels[~is_new])
    return known.overall, accuracy_of(logits[is_new, first:], labels[is_new] - first).overall
