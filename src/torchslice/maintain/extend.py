"""Teach a network new classes by training the neurons that those it knows do not need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..cut.widen import grow, last_wire
from ..cut.widen import widen as widen_network
from ..data import Task, check_task, joined
from ..errors import TorchsliceError
from ..graph.find import find_neurons
from ..graph.neurons import Neurons
from ..graph.plan import plan, zero_out
from ..judge.baselines import reinitialised
from ..slices import Slice, union
from ..training import Outcome, Training, accuracy, finetune
from .partial import Partial
from .tasks import Extended, Joined, Learned, Selected

SETTLING = Training(epochs=5, learning_rate=0.02)


def settle(start: Neurons | Extended, task: Task, critical: Slice, *, training: Training = SETTLING) -> Outcome:
    """Train critical neurons, and the rows of the classifier for `task`, while all other neurons are held at zero.

    A slice that was found in a trained network loses accuracy when it answers alone; this regains it before `extend`
    freezes the slice. The result is a whole network of the same structure: other neurons keep their values, and its
    slice `critical` answers as the log says. Epoch 0 is the slice as found.

    Args:
        start: neurons of a trained model with the classes of `task`; or an extension: then `task` has the classes of
            its last task, and the neurons of earlier tasks stay as they are.
        critical: the neurons that will answer, at least one in every layer.

    >>> settled = ts.maintain.settle(neurons, task, critical, training=quick)
    >>> alone = ts.extract(neurons.on(settled.model), critical)
    """
    start = Extended.start(start, task.classes)
    *earlier, last = start.tasks
    if last.classes != task.classes:
        raise TorchsliceError(
            f"the last task is {', '.join(last.classes)}; give its data alone, not those of {', '.join(task.classes)}."
        )
    if len(last.classes) < 2:
        raise TorchsliceError(f"there is a single class, {last.classes[0]!r}, and nothing to tell it from.")
    start.check(critical)
    neurons = start.neurons
    own = critical - union([neurons.none(), *(task.slice_ for task in earlier if task.slice_ is not None)])
    rows = range(neurons.num_classes - len(last.classes), neurons.num_classes)
    student = Partial(neurons, own, classes=rows, batch_statistics=True)
    zero_out(student.network, plan(neurons, critical))
    tuned = finetune(Selected(student, rows, neurons.output), task, training)
    trained: Any = tuned.model
    trained.network.network.load_state_dict(neurons.model.state_dict())  # what was zero meanwhile
    return replace(tuned, model=trained.network.merged())


settle_network = settle  # `extend` has an option of this name


def extend(
    start: Neurons | Extended,
    new: Task,
    critical: Slice,
    *,
    known: Task | None = None,
    replay: float = 0.0,
    settle: int = 0,
    widen: float | None = None,
    restart: bool = True,
    batch_statistics: bool = True,
    training: Training = Training(),
) -> Extended:
    """Teach a network new classes by training its non-critical neurons and a row of the classifier for each new class.

    The rows of the known classes and the critical neurons stay as they are, bit for bit, so the known classes are
    answered through the slice `critical` as before. The model is not changed, and the test split is never looked at.
    After NeuSemSlice (arXiv 2407.20281, incremental development): the mask is applied for known classes, not for new.

    Args:
        start: neurons of a trained model; or an earlier extension, whose slices must be in `critical`.
        new: the new classes alone, at least two without replay.
        known: data of the known classes; new inputs are then prepared as these are. It names the classes of a model
            whose neurons do not.
        replay: fraction of the known training and validation samples that is used, in [0, 1]. New logits then learn to
            stand beside the known ones, and bias and rule of `joined` are chosen. With 0, nothing compares the two.
        settle: epochs in which the critical neurons first learn to answer the last known task alone, see `settle`.
        widen: factor above 1 by which every layer gets fresh neurons, after settling.
        restart: draw the neurons that learn anew first, instead of going on from what they learned before.

    Raises TorchsliceError, before anything is trained, where no neuron is critical or none is not, for new classes that
    are known already, and for data that do not fit.

    >>> five = ts.find_neurons(ts.models.create("convnet", 5, channels=1, width=0.25), task.example)
    >>> old, new = task.restrict(list("01234")), task.restrict(list("567"))
    >>> extended = extend(five, new, five.random(0.5), known=old, replay=0.1, training=quick)
    >>> extended.classes, len(extended.joined()(task.example)[0])
    (('0', '1', '2', '3', '4', '5', '6', '7'), 8)
    """
    start = Extended.start(start, None if known is None else known.classes)
    check_extension(start, new, known=known, replay=replay, settle=settle, widen=widen)
    start.check(critical)
    if not ~critical and widen is None:
        raise TorchsliceError(
            "every neuron is critical, so none is left to train. Add fresh ones with widen=1.25, or choose a smaller "
            "slice."
        )
    memory, both, log = None, new, list(start.log)

    def note(step: str, network: nn.Module, task: Task, **figures: Any) -> None:
        log.append({"step": step, "validation_accuracy": accuracy(network, task, "validation").overall, **figures})

    if known is not None:
        known, new = known.restrict(start.classes), new.like(known.preprocessing)
        both = new
        if replay:
            sizes = {name: max(1, round(replay * len(known.split(name)))) for name in ("train", "validation")}
            memory = known.limit(**sizes, seed=training.seed)
            both = joined(memory, new)
        if settle:
            last = known.restrict(start.tasks[-1].classes)
            settings = replace(training, epochs=settle, learning_rate=SETTLING.learning_rate)
            settled = settle_network(start, last, critical, training=settings)
            start = start.on(settled.model)
            log.append({"step": "known classes, settled", "validation_accuracy": settled.best["validation_accuracy"]})
    if widen is not None:
        wide = widen_network(start.neurons, factor=widen, seed=training.seed)
        lifted = tuple(replace(t, slice_=None if t.slice_ is None else wide.lift(t.slice_)) for t in start.tasks)
        start = replace(start, model=wide.model, neurons=wide.neurons, tasks=lifted)
        critical = wide.lift(critical)
    start = start.with_last(slice_=critical)  # the last task is answered through it from now on
    before, neurons, classes = start.networks(), start.neurons, (*start.classes, *new.classes)
    rows = range(len(start.classes), len(classes))
    grown = grow(neurons, {last_wire(neurons, neurons.head[0]): len(rows)}, seed=training.seed)
    found = find_neurons(grown, neurons.example, classes=classes, output=neurons.output)
    partial = Partial(found, ~critical, classes=rows, batch_statistics=batch_statistics)
    if restart:
        partial.take(reinitialised(grown, seed=training.seed))
    students: list[nn.Module] = [Selected(partial, rows, neurons.output)]
    if memory is not None:
        earlier = Joined(before, biases=[task.bias for task in start.tasks], rule=start.rule)
        whole = Selected(neurons.model, range(len(start.classes)), neurons.output)
        note("known classes, whole network", whole, memory)
        note("known classes, their slice", earlier, memory)
        students.insert(0, earlier.requires_grad_(False))
    tuned = finetune(Joined(students, biases=[0.0] * len(students)), both, training)
    trained: Any = tuned.model
    merged = trained.networks[-1].network.merged()
    tasks = (*start.tasks, Learned(new.classes))
    extended = Extended(merged, (), 0, neurons=found.on(merged), tasks=tasks, rule=start.rule)
    for one, other in zip(before, extended.networks(), strict=False):  # the last one is new
        pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), "a frozen value moved"
    seconds = sum(row["seconds"] for row in tuned.log)
    figures = {"param_fraction": partial.param_fraction, "best_epoch": tuned.kept, "seconds": seconds}
    note("new classes", extended.network(), new, **figures)
    if memory is not None:
        extended = extended.calibrated(memory, new)
        note("all classes, task not given", extended.joined(), both)
    return replace(extended, log=tuple(log), kept=len(log) - 1)


def check_extending(*, replay: float, settle: int, widen: float | None) -> None:
    """Raise for settings that `extend` refuses, whatever the network is."""
    if not 0 <= replay <= 1 or settle < 0:
        raise TorchsliceError(f"replay must be in [0, 1] and settle at least 0, got {replay:g} and {settle}.")
    if widen is not None and not 1 < widen < 100:
        raise TorchsliceError(f"widen must be above 1 (and below 100), got {widen}.")


def check_extension(
    start: Extended, new: Task, *, known: Task | None, replay: float, settle: int, widen: float | None
) -> None:
    """Raise for what `extend` refuses, whatever is critical."""
    check_extending(replay=replay, settle=settle, widen=widen)
    check_task(new)
    if not start.neurons.head:
        raise TorchsliceError("the logits do not come straight from a layer, so no rows can be added for new classes.")
    if start.neurons.num_classes < 2:
        raise TorchsliceError("the model has a single logit; train it on two classes at least.")
    if twice := [name for name in new.classes if name in start.classes]:
        raise TorchsliceError(
            f"the model knows {', '.join(map(repr, twice))} already; give data of new classes alone. For new samples "
            "of known classes use readapt."
        )
    if known is None and (replay or settle):
        raise TorchsliceError("replay and settle need data of the known classes: known=.")
    if len(new.classes) < 2 and not replay:
        raise TorchsliceError(
            f"a single new class ({new.classes[0]!r}) can only be told from the known ones by samples of them, so it "
            "needs replay= above 0."
        )
    if known is not None:
        new.like(known.preprocessing)  # raises where samples have another shape
    if widen is not None:
        widen_network(start.neurons, factor=widen)  # raises where it cannot be done
