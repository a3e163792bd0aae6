"""What others do: low-rank adapters, DeepArc's layers, EWC, LwF, replay.

Shapes: B batch, n samples, C classes known before, k new ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchslice as ts
from torchslice import Slice, TorchsliceError, Training
from torchslice.cut.widen import grow, last_wire
from torchslice.data import Split, Task, joined, limit
from torchslice.graph.activations import Activations, find_activations, reading
from torchslice.graph.neurons import Neurons
from torchslice.graph.record import evaluating
from torchslice.inputs import device_of
from torchslice.maintain import Computed, Partial
from torchslice.maintain.tasks import best_bias
from torchslice.training import CrossEntropy, Objective

from .experiment import inputs_of, neurons_of

BATCH = 128  # samples of one estimate of HSIC
Loss = tuple[Tensor, Tensor, dict[str, Tensor]]


# -- low-rank adapters --------------------------------------------------------------------------------------------
class LowRank(Computed):
    """A network of which only low-rank additions to the weights of its convolutions and linear layers are trained.

    LoRA (arXiv 2106.09685, section 4.1): W + up @ down, with `up` zero at first. The rank is the largest with which at
    most `param_fraction` of the parameters are trained, but at least 1. Norms keep their statistics.
    """

    def __init__(self, model: nn.Module, *, param_fraction: float, seed: int = 0) -> None:
        super().__init__(model)
        self.network.requires_grad_(False)
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
        self.weights = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)]
        shapes = [model.get_parameter(name).flatten(1).shape for name in self.weights]
        whole = sum(p.numel() for p in model.parameters())
        self.rank = max(1, int(param_fraction * whole / sum(map(sum, shapes))))
        device, generator = device_of(model), torch.Generator().manual_seed(seed)
        self.up, self.down = nn.ParameterList(), nn.ParameterList()
        for rows, columns in shapes:
            rank = min(self.rank, rows, columns)
            self.up.append(torch.zeros(rows, rank, device=device))
            self.down.append((torch.randn(rank, columns, generator=generator) / math.sqrt(columns)).to(device))

    def tensors(self) -> dict[str, Tensor]:
        parts = zip(self.weights, map(self.network.get_parameter, self.weights), self.up, self.down, strict=True)
        return {name: weight + (up @ down).view_as(weight) for name, weight, up, down in parts}


# -- DeepArc's layers ---------------------------------------------------------------------------------------------
def unbiased_hsic(a: Tensor, b: Tensor) -> Tensor:
    """Estimate HSIC without bias from two kernel matrices [n, n] of the same n > 3 samples (Song et al., 2012).

    >>> unbiased_hsic(torch.eye(5), torch.eye(5))
    tensor(0.)
    """
    n = len(a)
    a, b = (kernel - kernel.diagonal().diag() for kernel in (a, b))
    traces, sums = (a * b).sum(), a.sum() * b.sum() / ((n - 1) * (n - 2))
    return (traces + sums - 2 / (n - 2) * (a.sum(0) @ b.sum(0))) / (n * (n - 3))


def cka(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the linear CKA of two sets of activations from their kernels [n, n], batch by batch.

    From unbiased estimates of HSIC (arXiv 2010.15327, section 3): about 1 where both are the same up to rotation and
    scale, 0 where they have nothing in common.
    """
    sums = [[unbiased_hsic(*sides).item() for sides in ((a, b), (a, a), (b, b))] for a, b in pairs]
    both, one, other = map(sum, zip(*sums, strict=True))
    return both / math.sqrt(max(one * other, 1e-300))


def kernels(network: nn.Module, where: Activations, inputs: Tensor) -> Iterator[dict[str, Tensor]]:
    """Yield the linear kernel [n, n] of every layer's activations, after norm and activation function, per batch."""
    for batch in inputs.split(BATCH):
        with evaluating(network), reading(network, where) as seen:
            network(batch)
        flat = {layer: values[-1].detach().flatten(1).double() for layer, values in seen.values.items()}
        yield {layer: values @ values.T for layer, values in flat.items()}


def layer_similarity(neurons: Neurons, first: Tensor, other: nn.Module, second: Tensor) -> dict[str, float]:
    """Compare what every layer of a network makes of some inputs with what a copy of it makes of others.

    Inputs are [n, ch, H, W], the same samples in the same order. Returns the CKA of every layer, in forward order.
    """
    where = find_activations(neurons)
    seen = list(zip(kernels(neurons.model, where, first), kernels(other, where, second), strict=True))
    return {layer: cka((one[layer], two[layer]) for one, two in seen) for layer in where.chains}


def similarity_to_previous(neurons: Neurons, inputs: Tensor) -> dict[str, float]:
    """Return the CKA of every layer's activations with those of the layer before it: so DeepArc compares blocks."""
    where = find_activations(neurons)
    seen = list(kernels(neurons.model, where, inputs))
    return {layer: cka((of[before], of[layer]) for of in seen) for before, layer in pairwise(where.chains)}


def deeparc_slice(similarity: Mapping[str, float], full: Slice, *, blocks: int = 5) -> Slice:
    """Return the neurons of the layers at which the similarity drops most: DeepArc's choice of what to train.

    Layers stand for its blocks. Of a network with fewer than ten, half are taken.
    """
    values = list(similarity.values())
    drops = {layer: before - now for layer, before, now in zip(similarity, [1.0, *values], values, strict=False)}
    return of_layers(full, sorted(drops, key=lambda layer: -drops[layer])[: min(blocks, max(1, len(drops) // 2))])


def redundant_layers(similarity: Mapping[str, float], full: Slice, *, threshold: float = 0.99) -> Slice:
    """Return the neurons of DeepArc's redundant layers: those more similar to the layer before than the threshold.

    If these are fewer than a third of all layers, the third that is most similar is taken, so that small networks have
    something to train.
    """
    ranked = sorted(similarity, key=lambda layer: -similarity[layer])
    alike = [layer for layer in ranked if similarity[layer] > threshold]
    return of_layers(full, max(alike, ranked[: max(1, len(full.layers) // 3)], key=len))


def of_layers(full: Slice, layers: Sequence[str]) -> Slice:
    """Return all neurons of some layers."""
    return Slice({layer: mask & (layer in layers) for layer, mask in full.masks.items()})


# -- objectives that learn new classes ----------------------------------------------------------------------------
def among_new(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Return the cross entropy of logits [B, C + k] among the k classes from `first` on, and which are correct [B]."""
    new, own = logits[:, first:].float(), labels - first
    return F.cross_entropy(new, own), new.argmax(1) == own


@dataclass(frozen=True)
class NewRows:
    """An objective: cross entropy among the new classes only, whose labels begin with C = `first`."""

    first: int

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Loss:
        return *among_new(model(inputs), labels, self.first), {}


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

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Loss:
        loss, correct = among_new(model(inputs), labels, self.first)
        pull = torch.zeros((), device=loss.device)
        for name, parameter in model.named_parameters():
            if name in self.anchors:
                known = parameter[: len(self.anchors[name])]  # the classifier has got more rows
                strength = (self.weight * self.fisher[name]).clamp(max=0.1 / self.learning_rate).to(loss.device)
                pull = pull + (strength * (known - self.anchors[name].to(loss.device)).square()).sum() / 2
        return loss + pull, correct, {"pull": pull}


@dataclass(frozen=True, eq=False)
class Distilling:
    """LwF (arXiv 1606.09282, section 3): on new images, the known classes' logits stay what they were."""

    first: int
    teacher: nn.Module
    weight: float
    temperature: float = 2.0

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Loss:
        logits = model(inputs)
        loss, correct = among_new(logits, labels, self.first)
        with evaluating(self.teacher):
            before = self.teacher(inputs).float()
        known, heat = logits[:, : self.first].float(), self.temperature
        change = F.kl_div((known / heat).log_softmax(1), (before / heat).softmax(1), reduction="batchmean") * heat**2
        return loss + self.weight * change, correct, {"change": change}


def fisher_information(model: nn.Module, task: Task, *, samples: int, seed: int = 0) -> dict[str, Tensor]:
    """Return the diagonal of the Fisher information of what a model trains, for labels drawn from its own predictions.

    The mean, over training samples, of squared gradients of the log probability.
    """
    model = copy.deepcopy(model).eval()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    generator = torch.Generator().manual_seed(seed)
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    inputs = inputs_of(limit(task.train, samples, seed=seed), device_of(model))
    for one in inputs.split(1):
        log_p = model(one).log_softmax(1)[0]
        label = torch.multinomial(log_p.exp().detach().cpu(), 1, generator=generator).item()
        gradients = torch.autograd.grad(log_p[label], list(parameters.values()))
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += gradient.square()
    return {name: total / len(inputs) for name, total in sums.items()}


# -- all of them --------------------------------------------------------------------------------------------------
def best_fit(
    name: str,
    make: Callable[[], nn.Module],
    task: Task,
    rates: Sequence[float],
    *,
    training: Training,
    score: Callable[[nn.Module], float],
    say: Callable[[str], None],
    objectives: Callable[[float], Sequence[Objective | None]] = lambda rate: [None],
) -> nn.Module:
    """Train with every objective for every learning rate; the best epoch of all is kept, what diverges is left out.

    An objective None is that of `fit`.
    """
    options: dict[str, Any] = {"keep": "best", "look": lambda model: {"validation_accuracy": score(model)}}
    tried = []
    for rate in rates:
        for number, objective in enumerate(objectives(rate), start=1):
            say(f"{name}, learning rate {rate:g}, objective {number}")
            model = make()
            try:
                ts.fit(model, task, replace(training, learning_rate=rate), objective=objective, **options)
            except TorchsliceError as error:
                say(str(error))
                continue
            model = model.merged() if isinstance(model, Partial) else model
            tried.append((score(model), model))
    if not tried:
        raise TorchsliceError(f"{name} diverges at every learning rate; lower those of the benchmark.")
    return max(tried, key=lambda found: found[0])[1]


def learned(
    base: nn.Module, known: Task, new: Task, *, settings: Any, training: Training, say: Callable[[str], None]
) -> dict[str, nn.Module]:
    """Teach a network of the known classes the new ones in every way; each gives a network with all rows.

    Of several learning rates, weights of EWC and LwF, and epochs, the best on validation images are taken, by the mean
    accuracy on known and new classes, task given. Without replay only the new rows compete, which forgets less.

    Args:
        settings: `learning_rates` (beside that of the training), `ewc_weights`, `lwf_weights`, `fisher_samples`,
            `similarity_samples`.
    """
    first, seed, neurons = len(known.classes), training.seed, neurons_of(base, known)
    both, only = joined(known, new), mixed(known, new, 0.0, seed)
    rates = (*settings.learning_rates, training.learning_rate)

    def grown() -> nn.Module:
        return grow(neurons, {last_wire(neurons, neurons.head[0]): len(new.classes)}, seed=seed)

    def best(
        name: str,
        objectives: Callable[[float], Sequence[Objective]],
        task: Task = only,
        make: Callable[[], nn.Module] = grown,
    ) -> nn.Module:
        def score(model: nn.Module) -> float:
            logits = ts.judge.predict(model, both, "validation")
            return sum(by_task(logits, both.validation.labels, first))

        return best_fit(name, make, task, rates, training=training, objectives=objectives, score=score, say=say)

    made = {"naive": best("naive", lambda rate: [NewRows(first)])}
    for fraction in (0.1, 1.0):
        name = f"replay {fraction:.0%}"
        made[name] = best(name, lambda rate: [CrossEntropy()], mixed(known, new, fraction, seed))
    fisher = fisher_information(base, known, samples=settings.fisher_samples, seed=seed)
    anchors = {name: base.get_parameter(name).detach().clone() for name in fisher}
    made["EWC"] = best("EWC", lambda rate: [Elastic(first, anchors, fisher, w, rate) for w in settings.ewc_weights])
    made["LwF"] = best("LwF", lambda rate: [Distilling(first, base, w) for w in settings.lwf_weights])
    sample = inputs_of(limit(known.train, settings.similarity_samples, seed=seed), device_of(base))
    redundant = redundant_layers(similarity_to_previous(neurons, sample), neurons.full())
    rows = range(first, first + len(new.classes))

    def layers() -> nn.Module:
        return Partial(neurons_of(grown(), both), redundant, classes=rows, batch_statistics=True)

    made["DeepArc"] = best("DeepArc", lambda rate: [NewRows(first)], make=layers)
    return made


def mixed(known: Task, new: Task, fraction: float, seed: int) -> Task:
    """Return the new samples and a fraction of the known ones, of each split but the test split, with all classes."""
    both = joined(known, new)

    def mix(split: Split) -> Split:
        is_new = split.labels >= len(known.classes)
        old, count = split.take(~is_new), round(fraction * int((~is_new).sum()))
        drawn = limit(old, count, seed=seed) if count else old.take(torch.arange(0))
        return drawn.join(split.take(is_new))

    return replace(both, train=mix(both.train), validation=mix(both.validation))


def with_bias(model: nn.Module, both: Task, first: int) -> tuple[Tensor, float]:
    """Return the logits of all test samples, with the bias on those from class `first` that is best on validation.

    And the accuracy there, the mean over known and new samples.
    """
    held, logits = (ts.judge.predict(model, both, split) for split in ("validation", "test"))
    bias, reached = best_bias(held[:, :first], held[:, first:], both.validation.labels)
    logits[:, first:] += bias
    return logits, reached


def by_task(logits: Tensor, labels: Tensor, first: int) -> tuple[float, float]:
    """Score logits [n, C + k] on the known and on the new classes, each among themselves."""
    is_new = labels >= first
    known = ts.judge.accuracy_of(logits[~is_new, :first], labels[~is_new])
    return known.overall, ts.judge.accuracy_of(logits[is_new, first:], labels[is_new] - first).overall
