"""Make a network small: cut out what is not critical, then remove weights or neurons and retrain, step by step.

Shapes: N neurons of a layer.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from ..core.find import find_neurons
from ..core.neurons import Neurons
from ..data import Data
from ..errors import TorchsliceError
from ..registry import unknown
from ..slices import Slice
from .costs import Cost, latency
from .evaluate import accuracy, accuracy_of, device_of
from .extract import extract
from .finetune import finetune
from .pruning import PRUNING
from .recalibrate import try_recalibration
from .restructured import Restructured, Step
from .shrink import (
    Removal,
    cut_with_scores,
    finetune_sparse,
    removal_of_neurons,
    removal_of_weights,
    size_of,
    weights_of,
)

STRUCTURED = "structured"  # the method that removes neurons; those of PRUNING remove weights


def restructure(
    model: nn.Module,
    critical: Slice | None,
    data: Data,
    *,
    method: str = "lamp",
    param_retention: float | None = None,
    mac_retention: float | None = None,
    latency_ms: float | None = None,
    latency_batch_size: int = 1,
    scores: Mapping[str, Tensor] | None = None,
    rate: float = 0.2,
    epochs_per_iteration: int = 3,
    max_accuracy_loss: float | None = 0.01,
    patience: int = 0,
    learning_rate: float = 0.01,
    recalibration_images: int = 5000,
    seed: int = 0,
    **training: Any,
) -> Restructured:
    """Compress a network: keep the critical neurons, then remove part of the rest and retrain until a target is met.

    The slice is cut out, its batch-norm statistics are computed again if that helps, and it is trained. Then every
    iteration removes the share `rate` of the surviving weights and retrains the others; its best epoch on validation
    images is kept. It ends at the target, or when too much validation accuracy is lost. The model is not changed, and
    the test split is never looked at. The idea is NeuSemSlice's (arXiv 2407.20281, restructure).

    Args:
        model: a trained network with the classes of `data`.
        critical: the neurons to keep; None keeps all of them and only compresses.
        method: "lamp", "global", "uniform+", "erk" (remove weights, see PRUNING), or "structured" (cut the neurons with
            the lowest `scores` out).
        param_retention: target, share of the parameters that stay, in (0, 1). Give one of the three targets.
        mac_retention: target, share of the multiply-accumulates that stay; zero weights count as skipped, which dense
            kernels do not do.
        latency_ms: target of "structured", median time of a forward pass over `latency_batch_size` images.
        scores: for "structured", how critical each neuron of `model` is, {layer: [N]}, such as the mean over classes of
            `semantic.contributions(...)["taylor"]`.
        rate: share of the surviving weights that an iteration removes, in (0, 1).
        epochs_per_iteration: of every training.
        max_accuracy_loss: validation accuracy that may be lost to `model`, in [0, 1]; None is any.
        patience: how many more trainings each cut or iteration gets to win lost accuracy back.
        learning_rate: of every training, at its start.
        recalibration_images: at most so many training images give the statistics of the cut network.
        seed: of every training.
        training: further settings of `finetune`: batch_size, weight_decay, device, precision, progress, ...

    Raises TorchsliceError before any training for a slice that keeps everything, or nothing of a layer, for unsuitable
    settings, and for a target that one neuron per layer would miss.

    >>> small = restructure(model, semantic.critical, data, method="lamp", param_retention=0.05)
    >>> print(small)
    """
    targets = {"param_retention": param_retention, "mac_retention": mac_retention, "latency_ms": latency_ms}
    _check_settings(method, targets, rate, max_accuracy_loss, patience, latency_batch_size)
    example = data.example.to(device_of(model))
    neurons = find_neurons(model, example)
    goal = _Goal(targets, data, neurons, size_of(model, neurons), latency_batch_size)
    network, alive = model, _checked_scores(method, scores, neurons)
    if critical is not None:
        neurons.check(critical)
        if len(critical) == len(neurons):
            raise TorchsliceError("the slice keeps every neuron, so there is nothing to cut out; give critical=None.")
        network, alive = cut_with_scores(model, critical, example, neurons, alive)
    least = _weights_of_one_each(model, critical or neurons.full(), neurons, example)

    def removal() -> Removal:
        if method == STRUCTURED:
            return removal_of_neurons(network, neurons, example, alive, rate=rate)
        return removal_of_weights(network, neurons, method=method, rate=rate, least=least)

    goal.check(removal(), method)
    console = Console(stderr=True, quiet=not training.get("progress", True), highlight=False)
    steps: list[Step] = []

    def log(name: str, network: nn.Module, started: float, right: float) -> None:
        steps.append(goal.step(name, network, perf_counter() - started, right))
        console.print(str(steps[-1]))

    log("whole", model, perf_counter(), accuracy(model, data, split="validation").overall)
    enough = -1.0 if max_accuracy_loss is None else steps[0].validation_accuracy - max_accuracy_loss - 1e-9
    settings = {"epochs": epochs_per_iteration, "learning_rate": learning_rate, **training}

    def trained(name: str, network: nn.Module, started: float, *, sparse: bool) -> nn.Module:
        tune = partial(finetune_sparse, neurons=neurons) if sparse else finetune
        for turn in range(1, patience + 2):
            tuned = tune(network, data, seed=seed + len(steps), **settings)
            network, right = tuned.model, tuned.validation_accuracy[tuned.best_epoch]
            log(f"{name}, training {turn}" if turn > 1 else name, network, started, right)
            if right >= enough:
                break
            started = perf_counter()
        return network

    if critical is not None:
        started = perf_counter()
        _, network, logits = try_recalibration(network, data, recalibration_images, seed=seed)
        log("cut", network, started, accuracy_of(logits, data.validation.labels.cpu()).overall)
        network = trained("cut, retrained", network, perf_counter(), sparse=False)
    kept, best, stopped, iteration = network, steps[-1].name, "target", 0
    while not goal.met(asdict(steps[-1])):
        started, iteration, step = perf_counter(), iteration + 1, removal()
        if not step.most:
            stopped = "size"
            break
        removed = bisect_left(range(step.usual), True, key=lambda n: goal.met(goal.shares(step.size(n))))
        network, alive = step.apply(removed)
        network = trained(f"iteration {iteration}", network, started, sparse=method != STRUCTURED)
        if steps[-1].validation_accuracy < enough:
            stopped = "accuracy"
            break
        kept, best = network, steps[-1].name
    return Restructured(copy.deepcopy(kept).eval(), method, tuple(steps), best, stopped)


@dataclass(frozen=True)
class _Goal:
    """The one target that was given, and what measuring it takes."""

    targets: Mapping[str, float | None]
    data: Data
    neurons: Neurons
    whole: Cost
    latency_batch_size: int

    def met(self, figures: Mapping[str, Any]) -> bool:
        """Whether figures that are named like the targets meet the one that was given; None does not."""
        return all(t is None or (figures[n] is not None and figures[n] <= t) for n, t in self.targets.items())

    def shares(self, size: Cost) -> dict[str, float | None]:
        parameters, macs = size.parameters / self.whole.parameters, size.macs / max(1, self.whole.macs)
        return {"param_retention": parameters, "mac_retention": macs, "latency_ms": None}

    def time(self, network: nn.Module) -> float | None:
        if self.targets["latency_ms"] is None:
            return None
        batch = self.latency_batch_size
        return latency(network, self.data.example[:1], batch_sizes=(batch,))[batch].median_ms

    def step(self, name: str, network: nn.Module, seconds: float, right: float) -> Step:
        weights = weights_of(network, self.neurons).values()
        zeros = 1 - sum(int(w.count_nonzero()) for w in weights) / max(1, sum(w.numel() for w in weights))
        shares = {**self.shares(size_of(network, self.neurons)), "latency_ms": self.time(network)}
        return Step(name, **shares, sparsity=zeros, validation_accuracy=right, seconds=seconds)  # type: ignore[arg-type]

    def check(self, removal: Removal, method: str) -> None:
        """Raise for a target that is missed even where all is removed that can be."""
        least = self.shares(removal.size(removal.most))
        if self.targets["latency_ms"] is not None:
            least["latency_ms"] = self.time(removal.apply(removal.most)[0])
        if not self.met(least):
            name, value = next((name, value) for name, value in self.targets.items() if value is not None)
            raise TorchsliceError(
                f"{name}={value:g} is out of reach: with one neuron per layer, {method} still has {least[name]:.2g}. "
                "Raise the target, or choose another method or a smaller slice."
            )


def _weights_of_one_each(model: nn.Module, part: Slice, neurons: Neurons, example: Tensor) -> int:
    """Count the weights of the network that has the first neuron of `part` in every layer."""
    first = {layer: (mask.cumsum(0) == 1) & mask for layer, mask in part.masks.items()}
    smallest = extract(model, Slice(first), example, neurons=neurons)
    return sum(weight.numel() for weight in weights_of(smallest, neurons).values())


def _checked_scores(method: str, scores: Mapping[str, Tensor] | None, neurons: Neurons) -> dict[str, Tensor]:
    if (method == STRUCTURED) != (scores is not None):
        raise TorchsliceError(
            f'method "structured" needs scores={{layer: [N]}}, and no other takes them; got method {method!r} '
            f"{'without' if scores is None else 'with'} scores."
        )
    scores = dict(scores or {})
    for name, layer in neurons.layers.items() if scores else ():
        score = scores.get(name)
        if score is None or score.shape != (layer.count,) or not (score >= 0).all():
            given = "none" if score is None else f"{list(score.shape)}, least {score.min().item():g}"
            raise TorchsliceError(
                f"layer {name!r} needs scores [{layer.count}] of at least 0, one for each neuron; got {given}."
            )
    return {name: scores[name] for name in neurons.layers} if scores else {}


def _check_settings(
    method: str, targets: Mapping[str, float | None], rate: float, loss: float | None, patience: int, batch_size: int
) -> None:
    if method not in (*PRUNING.names(), STRUCTURED):
        raise unknown("pruning method", method, (*PRUNING.names(), STRUCTURED))
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise TorchsliceError(f"give one target of {', '.join(targets)}; got {', '.join(given) or 'none'}.")
    (name, value), *_ = given.items()
    if name == "latency_ms" and method != STRUCTURED:
        raise TorchsliceError(
            f"zeros do not make a network faster, so latency_ms needs method='structured', not {method!r}."
        )
    if not (0 < value < (float("inf") if name == "latency_ms" else 1)):
        raise TorchsliceError(f"{name} must be {'above 0' if name == 'latency_ms' else 'in (0, 1)'}, got {value:g}.")
    if not 0 < rate < 1:
        raise TorchsliceError(f"rate must be in (0, 1), got {rate:g}.")
    if loss is not None and not 0 <= loss <= 1:
        raise TorchsliceError(f"max_accuracy_loss must be in [0, 1], or None for any loss, got {loss:g}.")
    if patience < 0 or batch_size < 1:
        raise TorchsliceError(
            f"patience must be at least 0 and latency_batch_size at least 1, got {patience} and {batch_size}."
        )
