"""One class of a trained network: forget it, or learn it anew; the others are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace as changed

from torch import nn

from ..cut.extract import extract
from ..data import Split, Task, check_task, hold_out
from ..errors import TorchsliceError
from ..graph.find import find_neurons
from ..graph.neurons import Neurons, check_neurons
from ..registry import unknown
from ..slices import Slice, union
from ..training import Training
from .compose import Composition, replace
from .readapt import TRAINING, adapt, check_samples


def remove(neurons: Neurons, slices: Mapping[str, Slice], *, classes: Sequence[str]) -> nn.Module:
    """Return the network without some classes: without their logits, and the neurons that only they need.

    Whether it has forgotten them is another question, which `judge.forgetting` answers: what other neurons know of a
    class stays.

    Args:
        slices: of all classes, by name; in the order of the logits where `neurons` do not name them. Neurons of the
            slices of `classes` go that are in no other.

    Raises TorchsliceError where fewer than two classes would be left.

    >>> nine = remove(neurons, slices, classes=["7"])
    >>> nine(task.example).shape
    torch.Size([2, 9])
    """
    check_neurons(neurons)
    if not isinstance(slices, Mapping) or len(slices) != neurons.num_classes:
        raise TorchsliceError(
            f"give the slices of all {neurons.num_classes} classes by name, in the order of the logits."
        )
    known = neurons.classes or tuple(slices)
    if odd := [name for name in slices if name not in known]:
        raise unknown("class", odd[0], known)
    left = classes_left(known, classes)
    kept = ~union(slices[name] for name in classes) | union(slices[name] for name in left)
    return extract(neurons, kept, classes=[known.index(name) for name in left])


def classes_left(known: Sequence[str], removed: Sequence[str]) -> list[str]:
    """Return the classes that are left; raise where they are too few, and for one that is not known."""
    for name in removed:
        if name not in known:
            raise unknown("class", name, known)
    left = [name for name in known if name not in removed]
    if not removed or len(left) < 2:
        names = ", ".join(removed) or "nothing"
        raise TorchsliceError(
            f"without {names} there would be {len(left)} of {len(known)} classes left; remove one, and leave two."
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
    check_task(task, neurons)
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
