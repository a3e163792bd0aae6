"""From a trained network to the sub-model of some classes: fold its gates, if any, cut, recalibrate, fine-tune.

Shapes: k chosen classes, N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .data import Data
from .errors import TorchsliceError
from .modular import GatedModel, gate_statistics
from .slices import Slice, union
from .use import extract, finetune
from .use.calibrate import calibrate
from .use.evaluate import device_of, predict_logits
from .use.recalibrate import try_recalibration

GATES = ("fold", "drop")


@dataclass(frozen=True)
class Reused:
    """A sub-model, and the networks that it was on the way.

    `classes` are in the order of the logits, `part` is the union of their slices. `networks` maps "extracted",
    "recalibrated" and, if it was asked for, "fine-tuned" to the network after that step; `kept` names the one that is
    best on the validation images. `best_epoch` is the epoch of fine-tuning that was kept (0 is before it, None is
    without it). `model` is the kept network with its scores divided by `temperature` (None
    where the class scores are no layer's output, and stay as they are).
    """

    classes: tuple[str, ...]
    part: Slice
    networks: dict[str, nn.Module] = field(repr=False)
    kept: str
    model: nn.Module = field(repr=False)
    temperature: float | None
    best_epoch: int | None = None


def reuse(
    network: nn.Module,
    data: Data,
    *,
    slices: Mapping[str, Slice],
    classes: Sequence[str],
    gates: str = "fold",
    epochs: int = 0,
    learning_rate: float = 0.01,
    recalibration_images: int = 5000,
    seed: int = 0,
    **running: Any,
) -> Reused:
    """Make the sub-model of some classes from a trained network, which is not changed.

    Gates leave the network, the union of the classes' slices is cut out, and batch-norm statistics are computed again,
    which is undone if it costs accuracy on validation images. With `epochs`, the sub-model is fine-tuned. Last its
    scores are calibrated, see `calibrate`. All this uses images of these classes alone.

    Args:
        network: a trained network, with gates or without.
        data: what it was trained on, all classes.
        slices: one per class, from `modular.class_slices` or `semantic.slice_model`.
        classes: names of at least two classes; the sub-model has them in the order of `data`.
        gates: what becomes of them, see `without_gates`.
        epochs: of fine-tuning; the epoch is chosen on validation images.
        learning_rate: of fine-tuning, at its start.
        recalibration_images: at most so many images give the batch-norm statistics.
        running: device, precision, progress, as in `fit`.

    >>> pets = reuse(gated, data, slices=slices, classes=["cat", "dog"], epochs=5)
    >>> save(pets.model, "pets.safetensors", classes=pets.classes, preprocessing=data.preprocessing)
    """
    indices = sorted(data.class_indices(classes))
    names = [data.classes[i] for i in indices]
    if len(names) < 2:
        raise TorchsliceError(
            f"a sub-model needs at least two classes, got {names[0]!r} alone; add one to tell it from."
        )
    if missing := [name for name in names if name not in slices]:
        raise TorchsliceError(f"there is no slice for class {missing[0]!r}; slices: {', '.join(slices)}.")
    task = data.restrict(names)
    part = union(slices[name] for name in names)
    plain = without_gates(network, task, gates=gates, **running)
    networks = {"extracted": extract(plain, part, data.example.to(device_of(plain)), classes=indices)}
    tried = try_recalibration(networks["extracted"], task, recalibration_images, seed=seed)
    networks["recalibrated"], best, logits = tried
    kept = "recalibrated" if best is networks["recalibrated"] else "extracted"
    best_epoch = None
    if epochs:
        tuned = finetune(networks[kept], task, epochs=epochs, learning_rate=learning_rate, seed=seed, **running)
        networks["fine-tuned"], best_epoch, kept = tuned.model, tuned.best_epoch, "fine-tuned"
        logits = predict_logits(tuned.model, task, split="validation")
    try:
        model, temperature = calibrate(networks[kept], task, logits=logits)
    except TorchsliceError:  # its scores are no layer's output
        model, temperature = networks[kept], None
    return Reused(tuple(names), part, networks, kept, model, temperature, best_epoch)


def without_gates(network: nn.Module, data: Data, *, gates: str = "fold", **running: Any) -> nn.Module:
    """Return a plain copy of a network with gates; a network without any is returned as it is.

    Args:
        data: the classes that the plain network is for.
        gates: "fold" multiplies their mean over the training images of these classes into the weights; "drop" leaves
            them away, as published (arXiv 2306.09376), and costs accuracy.
        running: device, precision, progress, as in `fit`.
    """
    if gates not in GATES:
        raise TorchsliceError(f"gates must be one of {', '.join(GATES)}, got {gates!r}.")
    if not isinstance(network, GatedModel):
        return network
    return network.fold(_mean_gates(network, data, **running) if gates == "fold" else None)


def _mean_gates(gated: GatedModel, task: Data, **running: Any) -> dict[str, Tensor]:
    """Return the mean gate values over all training images of a task, {layer: float64 [N]}."""
    statistics = gate_statistics(gated, task, **{"precision": "fp32", **running})
    share = statistics.samples / statistics.samples.sum()  # [k]
    return {layer: share.double() @ mean for layer, mean in statistics.mean.items()}
