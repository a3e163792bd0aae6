"""From a modular network to the sub-model of some classes: fold the gates, cut, recalibrate, fine-tune.

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
from .slices import Slice
from .use import extract, finetune, recalibrate
from .use.evaluate import device_of

GATES = ("fold", "drop")


@dataclass(frozen=True)
class Reused:
    """A sub-model, and the networks that it was on the way.

    `classes` are in the order of the logits, `part` is the union of their slices. `networks` maps "extracted",
    "recalibrated" and, if it was asked for, "fine-tuned" to the network after that step; `best_epoch` is the epoch of
    fine-tuning that was kept (0 is before it, None is without it).
    """

    classes: tuple[str, ...]
    part: Slice
    networks: dict[str, nn.Module] = field(repr=False)
    best_epoch: int | None = None

    @property
    def model(self) -> nn.Module:
        """The network after the last step."""
        return [*self.networks.values()][-1]


def reuse(
    gated: GatedModel,
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
    """Make the sub-model of some classes from a modular network, which is not changed.

    The gates leave the network, the union of the classes' slices is cut out, batch-norm statistics are computed again
    and, with `epochs`, the sub-model is fine-tuned; all on training images of these classes alone.

    Args:
        gated: the trained network with gates.
        data: what it was trained on, all classes.
        slices: one per class, from `modular.class_slices`.
        classes: names of at least two classes; the sub-model has them in the order of `data`.
        gates: "fold" multiplies the mean gate values of these classes' images into the weights; "drop" leaves the gates
            away, as published (arXiv 2306.09376), and costs accuracy.
        epochs: of fine-tuning; the epoch is chosen on validation images.
        learning_rate: of fine-tuning, at its start.
        recalibration_images: at most so many images give the batch-norm statistics.
        running: device, precision, progress, as in `fit`.

    >>> pets = reuse(gated, data, slices=slices, classes=["cat", "dog"], epochs=5)
    >>> save(pets.model, "pets.safetensors", classes=pets.classes, preprocessing=data.preprocessing)
    """
    if gates not in GATES:
        raise TorchsliceError(f"gates must be one of {', '.join(GATES)}, got {gates!r}.")
    indices = sorted(data.class_indices(classes))
    names = [data.classes[i] for i in indices]
    if len(names) < 2:
        raise TorchsliceError(
            f"a sub-model needs at least two classes, got {names[0]!r} alone; add one to tell it from."
        )
    if missing := [name for name in names if name not in slices]:
        raise TorchsliceError(f"there is no slice for class {missing[0]!r}; slices: {', '.join(slices)}.")
    task = data.restrict(names)
    part = slices[names[0]]
    for name in names[1:]:
        part |= slices[name]
    plain = gated.fold(_mean_gates(gated, task, **running) if gates == "fold" else None)
    networks = {"extracted": extract(plain, part, data.example.to(device_of(plain)), classes=indices)}
    sample = task.normalise(task.train.limit(recalibration_images, seed=seed).images)
    networks["recalibrated"] = recalibrate(networks["extracted"], sample, seed=seed)
    if not epochs:
        return Reused(tuple(names), part, networks)
    tuned = finetune(networks["recalibrated"], task, epochs=epochs, learning_rate=learning_rate, seed=seed, **running)
    return Reused(tuple(names), part, {**networks, "fine-tuned": tuned.model}, tuned.best_epoch)


def _mean_gates(gated: GatedModel, task: Data, **running: Any) -> dict[str, Tensor]:
    """Return the mean gate values over all training images of a task, {layer: float64 [N]}."""
    statistics = gate_statistics(gated, task, **{"precision": "fp32", **running})
    share = statistics.samples / statistics.samples.sum()  # [k]
    return {layer: share.double() @ mean for layer, mean in statistics.mean.items()}
