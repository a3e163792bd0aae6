"""From a trained network to the sub-model of some classes: choose neurons, cut, compensate, tune, calibrate.

Shapes: k chosen classes, N neurons of a layer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .budget import check_budget, fit_budget, the_budget
from .cut.extract import extract
from .data import Task, check_task
from .errors import TorchsliceError
from .find.gates import GatedModel, statistics
from .find.semantic import Contributions, contributions
from .find.semantic.contributions import check_scores
from .graph.find import find_neurons
from .graph.neurons import Neurons
from .inputs import device_of
from .judge import calibrate, predict, repair
from .judge.calibrate import HOTTEST
from .rankings import POWERS, Ranking, by_best_rank, by_mean_score
from .registry import unknown
from .reused import Reused, warnings_of
from .slices import Slice, union
from .training import Training, accuracy_of, cost, finetune
from .training import latency_ms as measured

GATES = ("fold", "drop")
EPOCHS = 20  # of tuning, at most
RATE = 0.05  # the learning rate of tuning
CAREFUL = 0.01  # that of networks without batch norm, which a high one would destroy
REPEATS = 7  # measurements of a latency
MINUTE = 3.2e12  # multiply-accumulates that a core of 2024 does in a minute of training, one of 2025 in half of it
GPU = 30  # times as many are done by a GPU, at least


def reuse(
    network: Neurons | GatedModel,
    task: Task,
    by: Contributions | Mapping[str, Ranking] | Mapping[str, Slice] | None = None,
    *,
    classes: Sequence[str],
    mac_retention: float | None = None,
    param_retention: float | None = None,
    latency_ms: float | None = None,
    round_to: int = 8,
    gates: str = "fold",
    tune: bool = True,
    training: Training | None = None,
    recalibration_samples: int = 5000,
    seed: int = 0,
    progress: bool = True,
) -> Reused:
    """Make the sub-model of some classes from a trained network, which is not changed.

    Gates leave the network, its most useful neurons for these classes are cut out, and what remains makes up for what
    left, see `judge.repair`. Then the sub-model is tuned, about a minute on one core, and the best epoch on
    validation samples is kept. Last its logits are calibrated, see `judge.calibrate`. All this uses samples of these
    classes alone.

    Args:
        network: the neurons of a trained network, or a trained network with gates.
        task: what it was trained on, all classes.
        by: what says which neurons the classes need. With a budget contributions, which are measured if there are none,
            or the class rankings of sub-task training; without one the class slices, whose union is cut out.
        classes: names of at least two; the sub-model has them in the order of `task`.
        mac_retention, param_retention, latency_ms, round_to: the budget, see `budget.fit_budget`.
        gates: what becomes of them, see `without_gates`.
        tune: False leaves the tuning out.
        training: of the tuning, by default `a_minute`.
        recalibration_samples: at most so many training samples, drawn by the `seed`, give the batch-norm statistics.
        seed: also of the default tuning, and of the samples that contributions are measured on.

    Raises TorchsliceError for one class alone, one without training samples, a budget that these classes cannot meet,
    and class slices with a budget: they have no order.

    >>> pair = reuse(neurons, task, classes=["3", "8"], mac_retention=0.5, training=quick, progress=False)
    >>> pair.classes, pair.costs["sub-model"].macs <= 0.5 * pair.costs["whole"].macs
    (('3', '8'), True)
    >>> ts.save(pair, folder / "pair.safetensors")
    """
    check_task(task, getattr(network, "neurons", network))
    started = time.perf_counter()
    if training is not None and not tune:
        raise TorchsliceError("training= plays no part with tune=False; leave one of them out.")
    indices = task.sub_task_labels(classes)
    names = [task.classes[i] for i in indices]
    if absent := [name for name, i in zip(names, indices, strict=True) if not (task.train.labels == i).any()]:
        raise TorchsliceError(f"class {absent[0]!r} has no training sample in {task.name}; leave it out.")
    if budget := any(most is not None for most in (mac_retention, param_retention, latency_ms)):
        the_budget(mac_retention, param_retention, latency_ms)  # says what is wrong with it
    sub_task = task.restrict(names)
    plain = without_gates(network, sub_task, gates=gates)
    if budget:
        limits: dict[str, Any] = {
            "classes": indices,
            "mac_retention": mac_retention,
            "param_retention": param_retention,
            "latency_ms": latency_ms,
            "powers": POWERS if isinstance(by, Mapping) else (1.0, 1.0),  # as they were trained
            "round_to": round_to,
        }
        if by is None and latency_ms is None:  # what would be measured in vain
            check_budget(plain, **limits)
        slice_ = fit_budget(plain, _ranking(plain, task, by, indices, seed=seed, progress=progress), **limits)
    else:
        slice_ = union(_slices(by, names))
    labels, best_epoch = sub_task.validation.labels, None
    networks, answers, scores, kept = repair(
        plain, slice_, sub_task, classes=indices, samples=recalibration_samples, seed=seed
    )
    if tune:
        best = networks[kept]
        if training is None:
            training = a_minute(best, cost(best, plain.example).macs, len(sub_task.train))
            training = replace(training, seed=seed, progress=progress, device=str(device_of(best)))
        tuned = finetune(best, sub_task, training, output=plain.output)
        networks["fine-tuned"], best_epoch, kept = tuned.model, tuned.kept, "fine-tuned"
        answers[kept] = predict(tuned.model, sub_task, "validation", output=plain.output)
        scores[kept] = accuracy_of(answers[kept], labels)
    model, temperature = networks[kept], None
    with suppress(TorchsliceError):  # raised where the logits are no layer's output
        neurons = find_neurons(model, plain.example, classes=names, output=plain.output)
        model, temperature = calibrate(neurons, sub_task, logits=answers[kept])
    unsure = temperature is not None and temperature > 0.99 * HOTTEST
    seconds = time.perf_counter() - started
    original = network.model if isinstance(network, Neurons) else network
    whole = accuracy_of(predict(original, sub_task, "validation", output=plain.output)[:, indices], labels)
    both = {"whole": plain.model, "sub-model": model}
    remedies = ("a larger budget" if budget else "larger slices", "more epochs of tuning" if tune else "tuning")
    return Reused(
        model=model,
        classes=tuple(names),
        slice=slice_,
        networks=networks,
        kept=kept,
        temperature=temperature,
        best_epoch=best_epoch,
        preprocessing=task.preprocessing,
        accuracy={"whole": whole, **scores},
        costs={name: cost(net, plain.example) for name, net in both.items()},
        latency=measured(both, plain.example, repeats=REPEATS),
        seconds=seconds,
        warnings=warnings_of(sub_task.classes, whole, scores[kept], labels, remedies, unsure),
    )


def a_minute(model: nn.Module, macs: int, samples: int) -> Training:
    """Return a training of so many samples that takes a core about a minute, where that is 1 to 20 epochs.

    On a GPU it has 30 times as many epochs, but no more than 20. Forward and back, a sample takes three times the
    `macs` of a forward pass. All else is as `fit` has it, but for the learning rate, which is lower, and lowest where
    there is no batch norm.

    >>> a_minute(small, macs=5_000_000, samples=20_000).epochs, a_minute(small, macs=10**9, samples=20_000).epochs
    (11, 1)
    """
    minute = MINUTE * (GPU if device_of(model).type == "cuda" else 1)
    epochs = min(EPOCHS, max(1, round(minute / (3 * macs * samples))))
    normed = any(isinstance(module, _BatchNorm) for module in model.modules())
    return Training(epochs=epochs, learning_rate=RATE if normed else CAREFUL)


def _slices(by: object, names: Sequence[str]) -> list[Slice]:
    """Return the slices of some classes."""
    found = _of_classes(by, names) if isinstance(by, Mapping) else []
    if not found or not all(isinstance(of, Slice) for of in found):
        raise TorchsliceError(
            "how much is to be kept? Give a budget, such as mac_retention=0.2, or the slices of the classes."
        )
    return found


def _ranking(neurons: Neurons, task: Task, by: object, indices: list[int], *, seed: int, progress: bool) -> Ranking:
    """Return the order in which the neurons serve some classes."""
    names = [task.classes[i] for i in indices]
    if isinstance(by, Mapping):
        found = _of_classes(by, names)
        if not all(isinstance(of, Ranking) for of in found):
            raise TorchsliceError(
                "class slices have no order by which a budget could choose; give contributions(neurons, task), the "
                "class rankings of sub-task training, or nothing."
            )
        return by_best_rank(found)
    if by is None:
        whole = extract(neurons, neurons.full(), classes=indices).eval()
        neurons, task = find_neurons(whole, neurons.example, output=neurons.output), task.restrict(names)
        by = contributions(neurons, task, correct_only=False, seed=seed, progress=progress)
        indices = [*range(len(names))]
    if not isinstance(by, Contributions):
        raise TorchsliceError(f"a budget needs contributions or class rankings, got {type(by).__name__}.")
    check_scores(by, neurons, task)
    by = by.tied(neurons)
    scores = by["taylor"] if "taylor" in by.metrics else by[by.the_metric(None)]
    return by_mean_score({layer: of[indices] for layer, of in scores.items()})


def _of_classes(by: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    if missing := [name for name in names if name not in by]:
        raise TorchsliceError(f"there is nothing for class {missing[0]!r}; there is for {', '.join(by)}.")
    return [by[name] for name in names]


def without_gates(network: Neurons | GatedModel, task: Task, *, gates: str = "fold") -> Neurons:
    """Return the neurons of a plain copy of a network with gates; the neurons of a network without any as they are.

    Args:
        task: the classes that the plain network is for.
        gates: "fold" multiplies their mean over the training samples of these classes into the weights; "drop" leaves
            them away, as published (arXiv 2306.09376), and costs accuracy.

    >>> plain = without_gates(gated, task.restrict(["3", "8"]))
    """
    if gates not in GATES:
        raise unknown("treatment of gates:", gates, GATES)
    if isinstance(network, Neurons):
        return network
    if not isinstance(network, GatedModel):
        given = type(network).__name__
        raise TorchsliceError(
            f"needed are neurons or a model with gates, got {given}; give find_neurons(model, example)."
        )
    if gates == "drop":
        return network.neurons.on(network.fold())
    found = statistics(network, task, progress=False)
    weights = found.samples / found.samples.sum()  # [k]
    return network.neurons.on(network.fold({layer: weights.double() @ mean for layer, mean in found.mean.items()}))
