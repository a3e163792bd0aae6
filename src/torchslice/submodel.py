"""From a trained network to the sub-model of some classes: fold its gates, if any, cut, recalibrate, fine-tune.

Shapes: k chosen classes, N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .cut.extract import extract
from .data import Task
from .errors import TorchsliceError
from .find.gates import GatedModel, statistics
from .graph.find import find_neurons
from .graph.neurons import Neurons
from .judge import calibrate, predict, try_recalibration
from .registry import unknown
from .slices import Slice, union
from .training import Training, finetune

GATES = ("fold", "drop")


@dataclass(frozen=True)
class Reused:
    """A sub-model, and the networks that it was on the way. `save` needs nothing beside it.

    `classes` are in the order of the logits, `slice` is the union of their slices, of the network that was given.
    `networks` maps "extracted", "recalibrated" and, if it was asked for, "fine-tuned" to the network after that step;
    `kept` names the one that is best on the validation samples, and `best_epoch` the epoch of fine-tuning that was kept
    (0 is before it, None is without it). `model` is the kept network with its logits divided by `temperature` (None
    where the logits are no layer's output, and stay as they are).
    """

    model: nn.Module = field(repr=False)
    classes: tuple[str, ...]
    slice: Slice
    networks: dict[str, nn.Module] = field(repr=False)
    kept: str
    temperature: float | None
    best_epoch: int | None
    preprocessing: dict[str, Any] | None = field(repr=False)


def reuse(
    network: Neurons | GatedModel,
    task: Task,
    slices: Mapping[str, Slice],
    *,
    classes: Sequence[str],
    gates: str = "fold",
    training: Training | None = None,
    recalibration_samples: int = 5000,
    seed: int = 0,
) -> Reused:
    """Make the sub-model of some classes from a trained network, which is not changed.

    Gates leave the network, the union of the classes' slices is cut out, and batch-norm statistics are computed again,
    which is undone if it costs accuracy on validation samples. With `training`, the sub-model is fine-tuned. Last its
    logits are calibrated, see `judge.calibrate`. All this uses samples of these classes alone.

    Args:
        network: the neurons of a trained network, or a trained network with gates.
        task: what it was trained on, all classes.
        slices: one per class, from `gates.class_slices` or `semantic.class_slices`.
        classes: names of at least two; the sub-model has them in the order of `task`.
        gates: what becomes of them, see `without_gates`.
        training: of fine-tuning, whose epoch is chosen on validation samples.
        recalibration_samples: at most so many training samples, drawn by the `seed`, give the batch-norm statistics.

    >>> pair = reuse(neurons, task, slices, classes=["3", "8"], training=quick)
    >>> pair.classes
    ('3', '8')
    >>> ts.save(pair, folder / "pair.safetensors")
    """
    indices = sorted(task.class_indices(classes))
    names = [task.classes[i] for i in indices]
    if len(names) < 2:
        raise TorchsliceError(f"a sub-model needs at least two classes, got {names[0]!r} alone; add one to it.")
    if missing := [name for name in names if name not in slices]:
        raise TorchsliceError(f"there is no slice for class {missing[0]!r}; slices: {', '.join(slices)}.")
    sub_task, slice_ = task.restrict(names), union(slices[name] for name in names)
    plain = without_gates(network, sub_task, gates=gates)
    extracted = extract(plain, slice_, classes=indices)
    recalibrated, best, logits = try_recalibration(
        extracted, sub_task, samples=recalibration_samples, seed=seed, output=plain.output
    )
    networks = {"extracted": extracted, "recalibrated": recalibrated}
    kept, best_epoch = "recalibrated" if best is recalibrated else "extracted", None
    if training:
        tuned = finetune(best, sub_task, training, output=plain.output)
        networks["fine-tuned"], best_epoch, kept = tuned.model, tuned.kept, "fine-tuned"
        logits = predict(tuned.model, sub_task, "validation", output=plain.output)
    model, temperature = networks[kept], None
    with suppress(TorchsliceError):  # raised where the logits are no layer's output
        neurons = find_neurons(model, plain.example, classes=names, output=plain.output)
        model, temperature = calibrate(neurons, sub_task, logits=logits)
    return Reused(model, tuple(names), slice_, networks, kept, temperature, best_epoch, task.preprocessing)


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
