"""What extending gives: a network that learned its classes in several tasks, and how each of them is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.find import find_neurons
from ..data import Data, Split
from ..errors import TorchsliceError
from ..slices import Slice
from ..tables import percent, table
from .artefacts import save
from .evaluate import predict_logits
from .extract import extract
from .joined import RULES, Joined, Selected, best_bias
from .widen import Widened


@dataclass(frozen=True)
class Task:
    """Classes that were learned together, the neurons they are answered through (None is all), and their bias."""

    classes: tuple[str, ...]
    part: Slice | None
    bias: float = 0.0  # added to their scores where the task is not given

    def to_plain(self) -> dict[str, Any]:
        """Return the task as JSON-able data."""
        return {"classes": list(self.classes), "slice": self.part and self.part.to_plain(), "bias": self.bias}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Task:
        """Rebuild what `to_plain` wrote."""
        part = plain["slice"]
        return cls(tuple(plain["classes"]), None if part is None else Slice.from_plain(part), plain["bias"])


@dataclass(frozen=True)
class Step:
    """One row of the log: how well which classes are answered on validation images, and what training it took."""

    name: str
    validation_accuracy: float
    param_share: float = 0.0  # share of the parameters that were trained
    best_epoch: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Extended:
    """A network that learned its classes in several tasks; prints as a table.

    Attributes:
        model: one plain network with a score for every class, those of the first task first.
        tasks: what was learned, in order. The last one is answered by the whole network, the others through slices
            whose neurons have not changed since.
        example: two inputs, normalised.
        rule: of `joined`, see `RULES`.
        steps: the log.
    """

    model: nn.Module = field(repr=False)
    tasks: tuple[Task, ...]
    example: Tensor = field(repr=False)
    rule: str = "energy"
    steps: tuple[Step, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, example: Tensor) -> Extended:
        """Rebuild it from a network that was extended, saved and loaded.

        >>> Extended.of(load("ten.safetensors"), data.example).joined()
        """
        plain: Mapping[str, Any] | None = getattr(model, "extension", None)
        if plain is None:
            raise TorchsliceError("this network was not extended; make one that was with extend(...).")
        tasks = tuple(Task.from_plain(task) for task in plain["tasks"])
        return cls(model, tasks, example, plain["rule"], tuple(Step(**step) for step in plain["steps"]))

    @classmethod
    def start(cls, model: nn.Module | Extended, classes: Sequence[str] | None, example: Tensor) -> Extended:
        """Return what a network knows before it learns more; one that was not extended has one task, `classes`."""
        if not isinstance(model, Extended) and getattr(model, "extension", None) is not None:
            model = cls.of(model, example)
        if isinstance(model, Extended):
            if classes is not None and tuple(classes) != model.classes:
                raise TorchsliceError("an extended network knows the names of its classes; leave classes= out.")
            return model
        names = getattr(model, "classes", None) if classes is None else classes
        if names is None:
            raise TorchsliceError(
                "this model does not name its classes; name them in the order of its scores: classes=."
            )
        return cls(model, (Task(tuple(names), None),), example)

    def check(self, critical: Slice) -> None:
        """Raise unless a slice has all neurons that classes of earlier tasks are answered through."""
        for task in self.tasks:
            if task.part is not None and not task.part <= critical:
                raise TorchsliceError(
                    f"the slice leaves out {len(task.part - critical)} neurons through which {', '.join(task.classes)} "
                    "are answered; join it with the slices of all earlier tasks (task.part)."
                )

    def to_plain(self) -> dict[str, Any]:
        """Return all but the network as JSON-able data."""
        steps = [asdict(step) for step in self.steps]
        return {"tasks": [task.to_plain() for task in self.tasks], "rule": self.rule, "steps": steps}

    def save(self, path: str | Path, **record: Any) -> None:
        """Write it to one file, from which `load` and `Extended.of` rebuild it; `record` is as in `artefacts.save`.

        >>> extended.save("ten.safetensors", preprocessing=data.preprocessing)
        """
        save(self.model, path, classes=self.classes, extension=self.to_plain(), **record)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of all classes, in the order of the scores."""
        return tuple(name for task in self.tasks for name in task.classes)

    def network(self, task: int = -1) -> nn.Module:
        """Return the network that answers with the classes of one task, for when the task is given.

        Of an earlier task it is its slice, cut out: bit for bit what it was before later tasks were learned.

        >>> accuracy(extended.network(0), data.restrict(extended.tasks[0].classes))
        """
        return answering(self.model, self.tasks, self.example)[task]

    def joined(self) -> Joined:
        """Return the network that answers with all classes, for when the task is not given."""
        networks = answering(self.model, self.tasks, self.example)
        return Joined(networks, biases=[task.bias for task in self.tasks], rule=self.rule)

    def calibrated(self, known: Data, new: Data) -> Extended:
        """Choose rule and bias of the last task anew, by the validation images of the earlier classes and of its own.

        The choice is that with the best accuracy, the mean over earlier and new images; the task is not given.
        """
        joint, networks = joint_data(known, new), answering(self.model, self.tasks, self.example)
        biases = [task.bias for task in self.tasks[:-1]]
        found = {}
        for rule in RULES:
            sides = Joined(networks[:-1], biases=biases, rule=rule), Joined(networks[-1:], biases=[0.0], rule=rule)
            scores = [predict_logits(side, joint, split="validation") for side in sides]
            found[rule] = best_bias(scores[0], scores[1], joint.validation.labels)
        rule = max(found, key=lambda name: found[name][1])
        last = replace(self.tasks[-1], bias=found[rule][0])
        return replace(self, tasks=(*self.tasks[:-1], last), rule=rule)

    def on(self, model: nn.Module) -> Extended:
        """Return it for another network of the same shape and classes, such as `settle` makes of its model."""
        return replace(self, model=model)

    def within(self, wide: Widened) -> Extended:
        """Return it for the wider network that `widen` made of its model; all tasks are answered as before."""
        tasks = tuple(replace(task, part=task.part and wide.lift(task.part)) for task in self.tasks)
        return replace(self, model=wide.model, tasks=tasks)

    def __str__(self) -> str:
        rows = [(step.name, percent(step.validation_accuracy), percent(step.param_share)) for step in self.steps]
        tasks = [f"{', '.join(task.classes)}: {task.part or 'all neurons'}" for task in self.tasks]
        return "\n".join([table(("step", "validation accuracy", "trained parameters"), rows), *tasks])


def answering(model: nn.Module, tasks: Sequence[Task], example: Tensor) -> list[nn.Module]:
    """Return the networks that answer with the classes of each task; together they have all rows of the model."""
    neurons, first, found = find_neurons(model, example), 0, []
    for task in tasks:
        rows, part = list(range(first, first + len(task.classes))), task.part or neurons.full()
        first += len(rows)
        pair = rows if len(rows) > 1 else sorted({*rows, 0 if rows[0] else 1})  # at least two can be cut out
        network = extract(model, part, example, classes=pair, neurons=neurons)
        found.append(network if pair == rows else Selected(network, [pair.index(rows[0])]))
    return found


def remembered(known: Data, share: float, *, seed: int = 0) -> Data:
    """Return a random share in (0, 1] of the training and validation images, to be replayed."""
    counts = {part: max(1, round(share * len(getattr(known, part)))) for part in ("train", "validation")}
    return known.limit(**counts, seed=seed)


def joint_data(known: Data, new: Data) -> Data:
    """Return the data of both, the known classes first, normalised as the known ones."""
    if known.train.images.shape[1:] != new.train.images.shape[1:]:
        sizes = ("x".join(map(str, data.train.images.shape[1:])) for data in (known, new))
        raise TorchsliceError("images of known classes are {}, those of new classes {}.".format(*sizes))

    def both(part: str) -> Split:
        one, other = getattr(known, part), getattr(new, part)
        labels = torch.cat([one.labels, other.labels + len(known.classes)])
        return Split(torch.cat([one.images, other.images]), labels)

    splits: dict[str, Any] = {part: both(part) for part in ("train", "validation", "test")}
    return replace(known, name=f"{known.name} and {new.name}", classes=(*known.classes, *new.classes), **splits)
