"""Make a network small: cut out what is not critical, then remove weights or neurons and retrain, step by step.

A removed weight is a zero of a plain layer, so the weights that are alive are those that are not zero.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ..cut.extract import extract, retention
from ..data import Task, check_task
from ..errors import TorchsliceError
from ..graph.find import find_neurons
from ..graph.neurons import Neurons, check_neurons
from ..graph.plan import plan, weights_of
from ..judge.repair import repair
from ..registry import unknown
from ..slices import Slice
from ..training import Cost, Outcome, Training, accuracy, finetune, latency
from .partial import Computed
from .pruning import PRUNING, checked_scores, removal_order

STRUCTURED = "structured"  # the method that removes neurons; those of PRUNING remove weights
#: how many weights or neurons can go at most, and in one iteration; and what removes so many: it returns a smaller
#: network and the scores of the neurons that are left
Removal = tuple[int, int, Callable[[int], tuple[nn.Module, dict[str, Tensor]]]]


def restructure(
    neurons: Neurons,
    task: Task,
    critical: Slice | None,
    *,
    method: str = "lamp",
    param_retention: float | None = None,
    mac_retention: float | None = None,
    latency_ms: float | None = None,
    latency_batch_size: int = 1,
    scores: Mapping[str, Tensor] | None = None,
    prune_fraction: float = 0.2,
    max_accuracy_loss: float | None = 0.01,
    patience: int = 0,
    recalibration_samples: int = 5000,
    training: Training = Training(epochs=3, learning_rate=0.01),
) -> Outcome:
    """Compress a network: keep the critical neurons, then remove part of the rest and retrain until a target is met.

    The slice is cut out, repaired by `judge.repair`, and trained. Then every iteration removes `prune_fraction` of the
    surviving weights and retrains the others; its best epoch on validation data is kept. The model is not changed, and
    the test split is never looked at. The idea is NeuSemSlice's (arXiv 2407.20281, restructure).

    Args:
        critical: the neurons to keep; None keeps all of them and only compresses.
        method: "lamp", "global", "uniform+", "erk" (remove weights, see PRUNING), or "structured" (cut out the neurons
            with the lowest `scores`).
        param_retention: target, fraction of the parameters that stay, in (0, 1). Give one of the three targets.
        mac_retention: target, fraction of the multiply-accumulates that stay; zero weights count as skipped, which
            dense kernels do not do.
        latency_ms: target of "structured", median time of a forward pass over `latency_batch_size` samples.
        scores: for "structured", how critical each neuron of the model is, {layer: [neurons]}, at least 0.
        max_accuracy_loss: validation accuracy that may be lost to the model, in [0, 1]; None is any.
        patience: how many more trainings each cut or iteration gets to win lost accuracy back.
        recalibration_samples: at most so many training samples give the statistics of the cut network.
        training: settings of every training; each has a seed of its own.

    Returns:
        The smallest network that lost no more accuracy than allowed, plain. The log has a row for "whole" (the model),
        "cut" (what the slice keeps), "cut, retrained", and each iteration. Retentions are fractions of the model,
        `sparsity` is the fraction of zeros among the weights. `about` says the method, the iterations, and what stopped
        it: "target"; "accuracy" where one more iteration lost too much; "size" where nothing more can be cut; "slice"
        where the critical neurons alone lose too much, and the network of these is returned.

    Raises TorchsliceError before any training for a slice that keeps everything, or nothing of a layer, for unsuitable
    settings, and for a target that one neuron per layer would miss.

    >>> small = restructure(neurons, task, critical, param_retention=0.3, max_accuracy_loss=None, training=quick)
    >>> small.best["param_retention"] <= 0.3
    True
    """
    check_neurons(neurons)
    check_task(task, neurons)
    targets = {"param_retention": param_retention, "mac_retention": mac_retention, "latency_ms": latency_ms}
    name, target = check_restructuring(method, targets, prune_fraction, max_accuracy_loss, patience, latency_batch_size)
    if (method == STRUCTURED) != (scores is not None):
        raise TorchsliceError(
            f'method "structured" needs scores={{layer: [N]}}, and no other takes them; got method {method!r} '
            f"{'without' if scores is None else 'with'} scores."
        )
    network, alive = neurons.model, {} if scores is None else checked_scores(neurons, scores)
    if critical is not None:
        if len(critical) == len(neurons):
            raise TorchsliceError("the slice keeps every neuron, so there is nothing to cut out; give critical=None.")
        network, alive = _cut(neurons, critical, alive)
    start = neurons.full() if critical is None else critical
    one_each = Slice({layer: (mask.cumsum(0) == 1) & mask for layer, mask in start.masks.items()})
    least = sum(weight.numel() for weight in weights_of(extract(neurons, one_each), neurons).values())
    size = size_of(neurons.model, neurons)

    def removal() -> Removal:
        if method == STRUCTURED:
            return removal_of_neurons(network, neurons, alive, prune_fraction=prune_fraction)
        return removal_of_weights(network, neurons, method=method, prune_fraction=prune_fraction, least=least)

    def figures(network: nn.Module) -> dict[str, float]:
        weights, small = weights_of(network, neurons).values(), size_of(network, neurons)
        found = {"param_retention": small.parameters / size.parameters, "mac_retention": small.macs / max(1, size.macs)}
        found["sparsity"] = 1 - sum(int(w.count_nonzero()) for w in weights) / max(1, sum(w.numel() for w in weights))
        if name == "latency_ms":
            times = latency(network, neurons.example, batch_sizes=(latency_batch_size,))
            found[name] = times[latency_batch_size].median_ms
        return found

    most, _, remove = removal()
    if (reached := figures(remove(most)[0])[name]) > target:
        raise TorchsliceError(
            f"{name}={target:g} is out of reach: with one neuron per layer, {method} still has {reached:.2g}. Raise "
            "the target, or choose another method or a smaller slice."
        )
    whole = accuracy(neurons.model, task, "validation", output=neurons.output).overall
    enough = -1.0 if max_accuracy_loss is None else whole - max_accuracy_loss - 1e-9
    console = Console(stderr=True, quiet=not training.progress, highlight=False)
    log: list[dict[str, Any]] = []
    started = perf_counter()

    def note(step: str, network: nn.Module, validation: float) -> None:
        """Add a row, with the seconds since the last one."""
        nonlocal started
        seconds = perf_counter() - started
        log.append({"step": step, **figures(network), "validation_accuracy": validation, "seconds": seconds})
        console.print(f"{step}: {log[-1]['param_retention']:.1%} of the parameters, validation {validation:.2%}")
        started = perf_counter()

    def trained(step: str, student: nn.Module) -> nn.Module:
        """Train until enough accuracy is won back, or patience is at its end."""
        for turn in range(1, patience + 2):
            settings = replace(training, seed=training.seed + len(log))
            tuned = finetune(student, task, settings, output=neurons.output)
            student, validation = tuned.model, tuned.best["validation_accuracy"]
            plain = student.merged() if isinstance(student, Sparse) else student
            note(f"{step}, training {turn}" if turn > 1 else step, plain, validation)
            if validation >= enough:
                break
        return plain

    note("whole", neurons.model, whole)
    if critical is not None:
        repaired = repair(neurons, critical, task, samples=recalibration_samples, seed=training.seed)
        network = repaired.model
        note("cut", network, repaired.accuracy[repaired.kept].overall)
        network = trained("cut, retrained", network)
    best, kept, stopped, iteration = network, len(log) - 1, "target", 0
    while log[-1][name] > target:
        iteration += 1
        most, usual, remove = removal()
        if not most:
            stopped = "size"
            break
        if name != "latency_ms":  # no more than the target needs
            usual = bisect_left(range(usual), True, key=lambda count: figures(remove(count)[0])[name] <= target)
        network, alive = remove(usual)
        network = trained(f"iteration {iteration}", network if method == STRUCTURED else Sparse(network, neurons))
        if log[-1]["validation_accuracy"] < enough:
            stopped = "accuracy"
            break
        best, kept = network, len(log) - 1
    if log[kept]["validation_accuracy"] < enough:
        stopped = "slice"
        console.print("the slice alone loses more than max_accuracy_loss; give a larger one, more epochs or patience")
    trainings = sum(row["step"] not in ("whole", "cut") for row in log)
    about = {"method": method, "stopped": stopped, "iterations": trainings}
    return Outcome(copy.deepcopy(best).eval(), tuple(log), kept, about)


def check_restructuring(
    method: str,
    targets: Mapping[str, float | None],
    prune_fraction: float,
    max_accuracy_loss: float | None,
    patience: int,
    latency_batch_size: int = 1,
) -> tuple[str, float]:
    """Return the one target that was given, with its name; raise for what `restructure` refuses of its settings."""
    if not 0 < prune_fraction < 1:
        raise TorchsliceError(f"prune_fraction must be in (0, 1), got {prune_fraction:g}.")
    if max_accuracy_loss is not None and not 0 <= max_accuracy_loss <= 1:
        raise TorchsliceError(f"max_accuracy_loss must be in [0, 1], or None for any loss, got {max_accuracy_loss:g}.")
    for setting, number, least in (("patience", patience, 0), ("latency_batch_size", latency_batch_size, 1)):
        if number < least:
            raise TorchsliceError(f"{setting} must be at least {least}, got {number}.")
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
    if not 0 < value < (math.inf if name == "latency_ms" else 1):
        raise TorchsliceError(f"{name} must be {'above 0' if name == 'latency_ms' else 'in (0, 1)'}, got {value:g}.")
    return name, value


def removal_of_weights(
    network: nn.Module, neurons: Neurons, *, method: str, prune_fraction: float, least: int
) -> Removal:
    """Remove weights by a method of PRUNING, a fraction of those alive in one iteration; `least` weights stay."""
    weights = weights_of(network, neurons)
    alive = sum(int(weight.count_nonzero()) for weight in weights.values())

    def remove(count: int) -> tuple[nn.Module, dict[str, Tensor]]:
        small, masks = copy.deepcopy(network), PRUNING[method](weights, alive - count)
        for name, weight in weights_of(small, neurons).items():
            weight.masked_fill_(~masks[name], 0)
        return small, {}

    most = max(0, alive - least)
    return most, min(most, math.ceil(alive * prune_fraction)), remove


def removal_of_neurons(
    network: nn.Module, neurons: Neurons, scores: Mapping[str, Tensor], *, prune_fraction: float
) -> Removal:
    """Cut out the neurons with the lowest scores, so many in one iteration that a fraction of the parameters goes."""
    if not scores:
        return 0, 0, lambda count: (network, {})
    own = find_neurons(network, neurons.example, output=neurons.output)
    order = removal_order(own, scores)

    def left(count: int) -> Slice:
        return Slice({layer: place >= count for layer, place in order.items()})

    most, wanted = max(int(place.max()) for place in order.values()), 1 - prune_fraction
    usual = bisect_left(range(most), True, key=lambda count: retention(own, left(count)).built_param <= wanted)
    return most, usual, lambda count: _cut(own, left(count), scores)


def _cut(neurons: Neurons, slice_: Slice, scores: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Extract a slice, with the scores of the neurons that are left; none where a layer is down to one neuron."""
    layers = plan(neurons, slice_).layers
    left = {name: score.cpu()[neurons.stay(name, layers[name].outs)] for name, score in scores.items()}
    return extract(neurons, slice_), {name: score for name, score in left.items() if len(score) > 1}


def size_of(network: nn.Module, neurons: Neurons) -> Cost:
    """Count the parameters, and the multiply-accumulates of `weights_of`, without weights that are zero."""
    weights = weights_of(network, neurons)
    alive = {name: int(weight.count_nonzero()) for name, weight in weights.items()}
    others = sum(p.numel() for p in network.parameters()) - sum(weight.numel() for weight in weights.values())
    return Cost(others + sum(alive.values()), sum(neurons.flow.ports[name].positions * n for name, n in alive.items()))


class Sparse(Computed):
    """A network in which the weights that are zero at the start are zero, whatever an optimizer does to them."""

    stored_statistics = False

    def __init__(self, network: nn.Module, neurons: Neurons) -> None:
        super().__init__(network)
        self.names = [f"{name}.weight" for name in weights_of(network, neurons)]
        for number, name in enumerate(self.names):
            self.register_buffer(f"alive_{number}", network.get_parameter(name) != 0)

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights with zeros where they were zero."""
        return {
            name: torch.where(self.get_buffer(f"alive_{number}"), self.network.get_parameter(name), 0.0)
            for number, name in enumerate(self.names)
        }
