"""Networks that learned their classes in several tasks: how each task is answered, and one answer from all of them.

Shapes: B batch, n samples, C classes known before, k new classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..cut.extract import extract
from ..data import Task, joined
from ..errors import TorchsliceError
from ..graph.neurons import Neurons, check_neurons
from ..inputs import Output, logits_of
from ..registry import unknown
from ..slices import Slice
from ..training import Outcome, predict

#: name -> how the logits of one network [B, k] are made comparable with those of another
RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "energy": lambda logits: logits,
    "softmax": lambda logits: logits.log_softmax(1),
}


class Joined(nn.Module):
    """Answers with the classes of all its networks: logits [B, sum of their classes].

    The rule "energy" takes the logits as they are, so that each network weighs as much as its logsumexp; "softmax"
    takes log probabilities, so that the surest network wins. A bias per network is added to its logits. In training,
    all networks but the last are only asked: they stay in eval mode.
    """

    def __init__(self, networks: Sequence[nn.Module], *, biases: Sequence[float], rule: str = "energy") -> None:
        super().__init__()
        if rule not in RULES:
            raise unknown("rule", rule, RULES)
        self.networks = nn.ModuleList(networks)
        self.biases, self.rule = tuple(biases), rule

    def train(self, mode: bool = True) -> Joined:
        """Set the mode of the last network."""
        super().train(mode)
        self.networks[:-1].eval()
        return self

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        logits = (RULES[self.rule](logits_of(network(*inputs, **named))) for network in self.networks)
        return torch.cat([found + bias for found, bias in zip(logits, self.biases, strict=True)], dim=1)


class Selected(nn.Module):
    """The logits of some classes (indices) of a network, in this order; `output` picks its logits."""

    def __init__(self, network: nn.Module, classes: Sequence[int], output: Output = None) -> None:
        super().__init__()
        self.network, self.classes, self.output = network, list(classes), output

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        return logits_of(self.network(*inputs, **named), self.output)[:, self.classes]


@dataclass(frozen=True)
class Learned:
    """Classes that were learned together."""

    classes: tuple[str, ...]
    slice_: Slice | None = None  # the neurons they are answered through; None is all
    bias: float = 0.0  # added to their logits where the task is not given

    def to_plain(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        slice_ = None if self.slice_ is None else self.slice_.to_plain()
        return {"classes": list(self.classes), "slice": slice_, "bias": self.bias}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Learned:
        """Rebuild what `to_plain` wrote."""
        classes, slice_, bias = plain["classes"], plain["slice"], plain["bias"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise TypeError(f"classes are {classes!r:.100}")
        return cls(tuple(classes), None if slice_ is None else Slice.from_plain(slice_), float(bias))


@dataclass(frozen=True, eq=False)
class Extended(Outcome):
    """A network that learned its classes in several tasks; prints as a table.

    The model is one plain network with a logit for every class, those of the first task first.

    Attributes:
        neurons: of the model.
        tasks: what was learned, in order. The last one is answered by the whole network, the others through slices
            whose neurons have not changed since.
        rule: of `joined`, see `Joined`.
    """

    neurons: Neurons = field(kw_only=True, repr=False)
    tasks: tuple[Learned, ...] = field(kw_only=True)
    rule: str = field(default="energy", kw_only=True)

    @classmethod
    def start(cls, start: Neurons | Extended, classes: Sequence[str] | None) -> Extended:
        """Return what a network knows before it learns more; one that was not extended knows one task, `classes`."""
        if isinstance(start, Extended):
            return start
        check_neurons(start)
        names = start.classes or classes
        if names is None:
            raise TorchsliceError(
                "this model does not name its classes; name them in the order of its logits: "
                "find_neurons(model, example, classes=[...]), or give the data of the known classes."
            )
        return cls.of(start, {"tasks": [Learned(tuple(names)).to_plain()], "rule": "energy", "log": []})

    @classmethod
    def of(cls, neurons: Neurons, plain: Mapping[str, Any]) -> Extended:
        """Rebuild it from the neurons of its model and the `extension` that an artefact keeps.

        >>> pair = ts.find_neurons(small, task.example, classes=["3", "8"])
        >>> extended = ts.extend(pair, task.restrict(["0", "1"]), pair.random(0.5), training=quick)
        >>> Extended.of(extended.neurons, extended.extension).classes
        ('3', '8', '0', '1')
        """
        try:
            tasks, log, rule = tuple(map(Learned.from_plain, plain["tasks"])), tuple(plain["log"]), plain["rule"]
            for task in tasks:
                neurons.check(task.slice_ or neurons.full())
            if not tasks or rule not in RULES:
                raise KeyError("tasks" if rule in RULES else "rule")
            if not all(isinstance(row, dict) and any(value is not None for value in row.values()) for row in log):
                raise KeyError("log")
        except (KeyError, TypeError, ValueError) as error:
            raise TorchsliceError(f"this is no extension of the network ({error}); extend it again.") from error
        neurons = replace(neurons, classes=tuple(name for task in tasks for name in task.classes))
        return cls(neurons.model, log, max(0, len(log) - 1), neurons=neurons, tasks=tasks, rule=rule)

    @property
    def extension(self) -> dict[str, Any]:
        """All but the network, as JSON-able data."""
        return {"tasks": [task.to_plain() for task in self.tasks], "rule": self.rule, "log": list(self.log)}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of all classes, in the order of the logits."""
        return tuple(name for task in self.tasks for name in task.classes)

    def check(self, critical: Slice) -> None:
        """Raise unless a slice is one of the model, with all neurons that classes of earlier tasks need."""
        self.neurons.check(critical)
        for task in self.tasks:
            if task.slice_ is not None and not task.slice_ <= critical:
                raise TorchsliceError(
                    f"the slice leaves out {len(task.slice_ - critical)} neurons through which "
                    f"{', '.join(task.classes)} are answered; join it with the slices of all earlier tasks."
                )

    def networks(self) -> list[nn.Module]:
        """Return the networks that answer with the classes of each task; together they have all logits of the model.

        An earlier task is answered by its slice, cut out: bit for bit as before later tasks were learned.
        """
        neurons, first, found = self.neurons, 0, []
        for task in self.tasks:
            rows = list(range(first, first + len(task.classes)))
            first += len(rows)
            pair = rows if len(rows) > 1 else sorted({*rows, 0 if rows[0] else 1})  # at least two can be cut out
            network = extract(neurons, neurons.full() if task.slice_ is None else task.slice_, classes=pair)
            if pair != rows or neurons.output is not None:
                network = Selected(network, [pair.index(row) for row in rows], neurons.output)
            found.append(network)
        return found

    def network(self, task: int = -1) -> nn.Module:
        """Return the network that answers with the classes of one task, for when the task is given."""
        return self.networks()[task]

    def joined(self) -> Joined:
        """Return the network that answers with all classes, for when the task is not given."""
        return Joined(self.networks(), biases=[task.bias for task in self.tasks], rule=self.rule)

    def calibrated(self, known: Task, new: Task) -> Extended:
        """Choose rule and bias of the last task anew, by validation data of the earlier classes and of its own.

        The choice is that with the best accuracy, the mean over earlier and new samples; the task is not given.
        """
        both, networks = joined(known, new), self.networks()
        biases, found = [task.bias for task in self.tasks[:-1]], {}
        for rule in RULES:
            sides = Joined(networks[:-1], biases=biases, rule=rule), Joined(networks[-1:], biases=[0.0], rule=rule)
            earlier, last = (predict(side, both, "validation") for side in sides)
            found[rule] = best_bias(earlier, last, both.validation.labels)
        rule = max(found, key=lambda name: found[name][1])
        return replace(self.with_last(bias=found[rule][0]), rule=rule)

    def with_last(self, **changes: Any) -> Extended:
        """Return it with another slice or bias of the last task."""
        return replace(self, tasks=(*self.tasks[:-1], replace(self.tasks[-1], **changes)))

    def on(self, model: nn.Module) -> Extended:
        """Return it for another network of the same structure and classes, such as `settle` makes of its model."""
        return replace(self, model=model, neurons=self.neurons.on(model))

    def __str__(self) -> str:
        tasks = [f"{', '.join(task.classes)}: {task.slice_ or 'all neurons'}" for task in self.tasks]
        return "\n".join([*([super().__str__()] if self.log else []), *tasks])


def best_bias(known: Tensor, new: Tensor, labels: Tensor, *, least: float = 0.0) -> tuple[float, float]:
    """Find what to add to the new classes' logits, and the accuracy it gives, the mean over known and new samples.

    `known` and `new` are logits [n, C] and [n, k], labels int64 [n] in 0..C + k - 1, of both kinds. The accuracy on
    known samples is `least` or more, if there is a bias with which it is.
    """
    is_new = labels >= known.shape[1]
    if is_new.all() or not is_new.any():
        raise TorchsliceError("a bias is chosen by samples of known and of new classes; one of them is missing.")
    correct_known = ~is_new & (known.argmax(1) == labels)
    correct_new = is_new & (new.argmax(1) + known.shape[1] == labels)
    weight = torch.where(is_new, 0.5 / is_new.sum(), 0.5 / (~is_new).sum()).double()
    margin, order = (known.max(1).values - new.max(1).values).double().sort()  # a bias above it answers "new"
    as_new = (correct_new * weight)[order].cumsum(0)  # [n]
    as_known = (correct_known * weight)[order]
    zero = as_new.new_zeros(1)
    known_left = as_known.sum() - torch.cat([zero, as_known.cumsum(0)])  # [n + 1]
    score = torch.cat([zero, as_new]) + known_left
    edges = torch.cat([margin[:1] - 1, margin, margin[-1:] + 1])
    allowed = (edges[1:] > edges[:-1]) & (2 * known_left >= least - 1e-9)
    best = int((score * allowed).argmax())
    return float((edges[best] + edges[best + 1]) / 2), float(score[best])
