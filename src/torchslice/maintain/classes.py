"""One class of a trained network: forget it, or learn it anew; the others are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import Any

from ..cut.extract import extract
from ..data import Split, Task, check_task, hold_out
from ..errors import TorchsliceError
from ..graph.find import find_neurons
from ..graph.neurons import Neurons, check_neurons
from ..slices import Slice, union
from ..training import Outcome, Training, accuracy, finetune
from .compose import Composition, replace
from .readapt import TRAINING, adapt, check_samples


@dataclass(frozen=True, eq=False)
class Removed(Outcome):
    """A network without some of its classes; prints as a table, and `save` needs no more.

    Attributes:
        classes: that are left, in the order of the logits.
        preprocessing: how its inputs are made.
        slice: the neurons of the network that stayed.
    """

    classes: tuple[str, ...] = field(kw_only=True)
    preprocessing: dict[str, Any] | None = field(kw_only=True, repr=False)
    slice: Slice = field(kw_only=True)

    @property
    def metrics(self) -> dict[str, Any]:
        """All but the network, as plain data."""
        return self.to_plain()


def remove(
    neurons: Neurons,
    task: Task,
    slices: Mapping[str, Slice],
    *,
    classes: Sequence[str],
    training: Training | None = None,
) -> Removed:
    """Remove classes from a network: their logits, and the neurons that only they need; optionally tune the rest.

    Whether the network has forgotten them is another question, which `judge.forgetting` answers: what other neurons
    know of a class stays.

    Args:
        task: samples of the classes of the network.
        slices: of all classes. Neurons of the slices of `classes` go that are in no other.
        training: of the tuning on the samples of the other classes.

    Raises TorchsliceError where fewer than two classes would be left.

    >>> removed = remove(neurons, task, slices, classes=["7"], training=quick)
    >>> removed.classes, removed.model(task.example).shape
    (('0', '1', '2', '3', '4', '5', '6', '8', '9'), torch.Size([2, 9]))
    """
    check_neurons(neurons)
    check_task(task)
    left = check_removing(task, classes)
    if missing := [name for name in task.classes if name not in slices]:
        raise TorchsliceError(f"there is no slice of class {missing[0]!r}; give the slices of all classes.")
    kept = ~union(slices[name] for name in classes) | union(slices[name] for name in left)
    rest, indices = task.restrict(left), task.class_indices(left)
    whole, network = (extract(neurons, part, classes=indices) for part in (neurons.full(), kept))
    log = [
        {"step": step, "validation_accuracy": accuracy(model, rest, "validation", output=neurons.output).overall}
        for step, model in {"whole network": whole, "removed": network}.items()
    ]
    if training is not None:
        tuned = finetune(network, rest, training, output=neurons.output)
        network = tuned.model
        log.append({"step": "tuned", "validation_accuracy": tuned.best["validation_accuracy"]})
    about = {"removed_classes": list(classes), "neuron_retention": kept.neuron_retention}
    return Removed(
        network, tuple(log), len(log) - 1, about, classes=tuple(left), preprocessing=task.preprocessing, slice=kept
    )


def check_removing(task: Task, classes: Sequence[str]) -> list[str]:
    """Return the classes that are left; raise where they are too few."""
    task.class_indices(classes)  # says which there are
    left = [name for name in task.classes if name not in classes]
    if len(left) < 2:
        raise TorchsliceError(
            f"without {', '.join(classes)} there is {left[0] if left else 'no class'} left, and a classifier needs at "
            "least two classes; remove fewer."
        )
    return left


def update(
    neurons: Neurons,
    task: Task,
    slice_: Slice,
    new_samples: Split,
    *,
    replay: float = 5.0,
    training: Training = TRAINING,
) -> Composition:
    """Learn one class anew from new samples, through its slice; all other logits stay as they are, bit for bit.

    The slice is cut out and adapted to the new samples, beside old ones of all classes; then it answers for the class,
    see `replace`. The network itself is not trained, so the result costs the network and the slice.

    Args:
        task: what the network was trained on.
        slice_: of the class.
        new_samples: of one class of `task`; a fifth of them helps to choose the epoch and to calibrate.
        replay: samples of the training split of `task` per new sample.

    >>> of_three = task.train.take(task.train.labels == 3)
    >>> darker = ts.data.Images(of_three.images // 2, of_three.labels)
    >>> updated = update(neurons, task, slices["3"], darker, training=quick)
    >>> torch.equal(updated.model(task.example)[:, 4:], model(task.example)[:, 4:])
    True
    """
    check_neurons(neurons)
    check_task(task)
    samples = check_samples(new_samples, task)
    labels = samples.labels.unique().tolist()
    if len(labels) != 1:
        names = ", ".join(task.classes[label] for label in labels)
        raise TorchsliceError(
            f"new samples must be of one class, and these are of {names}; update one after the other."
        )
    if replay <= 0:
        raise TorchsliceError(f"the class must be told from the others, so replay must be above 0, got {replay:g}.")
    new, held = hold_out(samples, 0.2, seed=training.seed)
    part = adapt(extract(neurons, slice_), task, new, replay=replay, training=training, output=neurons.output)
    own = find_neurons(part.model, neurons.example, classes=task.classes)
    both = changed(task, validation=task.validation.join(held))
    return replace(neurons, {task.classes[labels[0]]: own}, both)
