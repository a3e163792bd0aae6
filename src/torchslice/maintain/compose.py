"""Put parts of several networks together: a better one for a weak class, or one classifier from parts of any parents.

Shapes: n samples, C classes, K logits of all networks, side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Task, check_task
from ..errors import TorchsliceError, first_line
from ..graph.neurons import Neurons, check_neurons
from ..graph.record import check_model, evaluating
from ..graph.views import copy_of
from ..inputs import describe, device_of, run, to_device
from ..judge.calibrate import likeliest
from ..judge.outside import SCORES, threshold
from ..models.composed import Composed, renormalised
from ..training import Cost, Outcome, accuracy_of, cost, predict
from ..training.outcome import Row
from .tasks import best_bias


@dataclass(frozen=True, eq=False)
class Composition(Outcome):
    """A network that asks several, what it is worth and what it costs; prints as a table, and `save` needs no more.

    Attributes:
        classes: in the order of the logits.
        preprocessing: how its inputs are made.
        costs: of every network that it asks, and "together": their sum, and the layer that joins their logits.
        thresholds: of "none of my classes", by score, see `judge.SCORES`: 95 % of the validation samples reach them.
    """

    classes: tuple[str, ...] = field(kw_only=True)
    preprocessing: dict[str, Any] | None = field(kw_only=True, repr=False)
    costs: dict[str, Cost] = field(kw_only=True)
    thresholds: dict[str, float] = field(kw_only=True)

    @property
    def metrics(self) -> dict[str, Any]:
        """All but the network, as plain data."""
        costs = {name: asdict(of) for name, of in self.costs.items()}
        return {**self.to_plain(), "costs": costs, "thresholds": self.thresholds}

    def __str__(self) -> str:
        none = " or ".join(f"{score} below {least:.3g}" for score, least in self.thresholds.items())
        costs = [f"{name}: {of}" for name, of in self.costs.items()]
        return "\n".join([super().__str__(), *costs, f"none of its classes: {none}"])


def replace(neurons: Neurons, parts: Mapping[str, Any], task: Task, *, renormalise: bool = False) -> Composition:
    """Let parts of other networks answer for classes that a network is weak at; its other logits stay bit for bit.

    Network and parts are asked side by side, as in MODA (arXiv 2411.01074): a new row of a linear layer makes the logit
    of a replaced class from the logits of all. The rows are those that make the labels of the validation samples
    likeliest; then one bias is chosen there, by the mean of the accuracies on replaced and on other classes, of those
    with which the others lose none.

    Args:
        parts: by class; see `compose`. A part also knows classes that it tells this one from, at least one.
        task: samples of the classes of the network.
        renormalise: see `compose`.

    Raises TorchsliceError for a class that network or part do not know, where no class is left, and for parts that do
    not fit, see `compose`.

    >>> whole = ts.find_neurons(model, task.example, classes=task.classes)
    >>> better = replace(neurons, {"3": whole, "8": whole}, task)
    >>> logits, others = better.model(task.example), [0, 1, 2, 4, 5, 6, 7, 9]
    >>> torch.equal(logits[:, others], model(task.example)[:, others])
    True
    """
    check_neurons(neurons)
    check_task(task)
    task = task if neurons.classes is None else task.restrict(neurons.classes)
    indices, count = task.class_indices(list(parts)), len(task.classes)
    if len(indices) == count:
        raise TorchsliceError("parts replace all classes of the network, and none is left; compose the parts instead.")
    for name, part in parts.items():
        if name not in (known := getattr(part, "classes", None) or ()) or len(known) < 2:
            raise TorchsliceError(
                f"the part for {name!r} must know it, and another class to tell it from; it knows "
                f"{', '.join(known) or 'no names'}."
            )
    named = {"network": neurons} | {f"part for {name}": part for name, part in parts.items()}
    asked = {id(part): name for name, part in reversed(named.items())}  # one that is named twice is asked once
    networks = {name: _network(named[name], name, task, renormalise) for name in named if name in asked.values()}
    own, labels = torch.tensor(indices), task.validation.labels
    if torch.isin(labels, own).all():
        raise TorchsliceError(f"{task.name} has no validation sample of the other classes; give some, to hold them by.")
    logits = _side_by_side(networks, task)
    width = logits.shape[1]

    def rows(values: Tensor) -> tuple[Tensor, Tensor]:
        found = values.view(len(own), width + 1)
        weight, bias = torch.eye(count, width).to(found), torch.zeros(count).to(found)
        return weight.index_copy(0, own, found[:, :width]), bias.index_copy(0, own, found[:, width])

    joint = likeliest(rows, torch.eye(count, width + 1)[own].flatten(), logits, labels)
    others = torch.tensor([i for i in range(count) if i not in indices])
    before, after = logits[:, :count], joint(logits).detach()
    order = torch.cat([others, own])
    least = _figures(before, labels, own)["others_accuracy"]
    bias, _ = best_bias(after[:, others], after[:, own], order.argsort()[labels], least=least)
    with torch.no_grad():
        joint.bias[own] += bias
    steps = {"before": before, "replaced": joint(logits).detach()}
    log = [{"step": step, **_figures(of, labels, own)} for step, of in steps.items()]
    return _composition(networks, joint, task, log, steps["replaced"])


def compose(parts: Sequence[Any], task: Task, *, renormalise: bool = False) -> Composition:
    """Make one classifier of parts with different classes: of any parents, architectures and data sets.

    All are asked, side by side. A linear layer scales the logits of each part, and adds to all of them what says that
    the sample is one of its: a linear function of all logits. It is the likeliest one on validation samples.

    Args:
        parts: networks that name their classes: what `reuse` or `load` return, or neurons with classes.
        task: samples of all classes, see `data.joined`; as its inputs are, so are those of the composed network.
        renormalise: let every part normalise images as it was trained, where it says how in its `preprocessing`.

    Raises TorchsliceError for classes of two parts, and for a part that does not take the inputs of the task or wants
    them prepared in another way: the error names what differs.

    >>> pair = ts.find_neurons(small, task.example, classes=["3", "8"])
    >>> rest = ts.find_neurons(ts.models.create("lenet", 3, channels=1), task.example, classes=["0", "1", "2"])
    >>> both = compose([pair, rest], task)
    >>> both.classes, both.costs["together"].macs - both.costs["part 1"].macs - both.costs["part 2"].macs
    (('3', '8', '0', '1', '2'), 25)
    """
    check_task(task)
    if len(parts) < 2:
        raise TorchsliceError(f"a network is composed of at least two parts, got {len(parts)}.")
    names = [name for part in parts for name in getattr(part, "classes", None) or ()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TorchsliceError(f"more than one part knows {', '.join(map(repr, twice))}; give every class to one part.")
    task = task.restrict(names)
    if unseen := sorted({*range(len(names))} - {*task.validation.labels.tolist()}):
        raise TorchsliceError(
            f"{task.name} has no validation sample of {names[unseen[0]]!r}; give some of every class."
        )
    networks = {f"part {n}": _network(part, f"part {n}", task, renormalise) for n, part in enumerate(parts, start=1)}
    logits, labels = _side_by_side(networks, task), task.validation.labels
    sizes = torch.tensor([len(part.classes) for part in parts])

    def shifted(values: Tensor) -> tuple[Tensor, Tensor]:
        scale, *slopes, shift = values.view(len(parts), -1).repeat_interleave(sizes, 0).T  # each [C]
        return scale.diag() + torch.stack(slopes, 1), shift

    joint = likeliest(shifted, torch.eye(1, len(names) + 2).repeat(len(parts), 1).flatten(), logits, labels)
    composed = joint(logits).detach()
    log: list[Row] = []
    for columns in torch.arange(len(names)).split(sizes.tolist()):
        mine = torch.isin(labels, columns)
        score = accuracy_of(logits[mine][:, columns], labels[mine] - columns[0])
        log.append({"step": f"part {len(log) + 1}, its classes alone", "validation_accuracy": score.overall})
    log.append({"step": "composed", "validation_accuracy": accuracy_of(composed, labels).overall})
    return _composition(networks, joint, task, log, composed)


def _network(part: Any, name: str, task: Task, renormalise: bool) -> nn.Module:
    """Return a copy of the network of a part, which takes the inputs of a task; raise where there is none."""
    model, classes = getattr(part, "model", None), getattr(part, "classes", None) or task.classes
    if getattr(part, "output", None) is not None:
        raise TorchsliceError(f"{name} has output=, which is not kept in a file; give a model that returns its logits.")
    if not isinstance(model, nn.Module):
        raise TorchsliceError(
            f"{name} must be a network with its classes, whose result is logits: what reuse or load returns, or "
            f"find_neurons(model, example, classes=[...]); got {type(part).__name__}."
        )
    check_model(model)
    network, given = copy_of(model, {}), task.preprocessing or {}
    own = getattr(part, "preprocessing", None) or given
    differ = [name for name in {**given, **own} if given and own.get(name) != given.get(name)]
    if differ and renormalise and {*differ} <= {"mean", "std"}:
        network = renormalised(network, given, own)
    elif differ:
        fields = "; ".join(f"{field} is {own.get(field)} there and {given.get(field)} here" for field in differ)
        remedy = "give its data" if renormalise else "give renormalise=True if only mean or std differ"
        raise TorchsliceError(f"{name} does not take inputs as {task.name} has them: {fields}; {remedy}.")
    inputs = to_device(task.example, device_of(network))
    try:
        with evaluating(network):
            logits = run(network, inputs)
    except RuntimeError as error:
        raise TorchsliceError(
            f"{name} does not take {describe(inputs)} ({first_line(error)}); give its inputs."
        ) from error
    if logits.shape[1:] != (len(classes),):
        raise TorchsliceError(f"{name} returns {describe(logits)} and names {len(classes)} classes; name those it has.")
    return network


def _side_by_side(networks: Mapping[str, nn.Module], task: Task) -> Tensor:
    """Bring networks to the device of the first and return their validation logits, [n, K]."""
    asked = Composed([*networks.values()], nn.Identity())
    return predict(asked.to(device_of(asked)), task, "validation")


def _figures(logits: Tensor, labels: Tensor, replaced: Tensor) -> dict[str, float]:
    """Return the accuracy on all samples, on those of replaced classes, and on the others."""
    mine = torch.isin(labels, replaced)
    parts = {"validation_accuracy": mine | True, "replaced_accuracy": mine, "others_accuracy": ~mine}
    return {name: accuracy_of(logits[rows], labels[rows]).overall for name, rows in parts.items() if rows.any()}


def _composition(
    networks: Mapping[str, nn.Module], joint: nn.Linear, task: Task, log: Sequence[Row], logits: Tensor
) -> Composition:
    """Build the network, and say what it costs and where "none of my classes" begins."""
    model = Composed([*networks.values()], joint).eval()
    model.to(device_of(model))
    costs = {name: cost(network, task.example) for name, network in {**networks, "together": model}.items()}
    return Composition(
        model,
        tuple(log),
        len(log) - 1,
        classes=task.classes,
        preprocessing=task.preprocessing,
        costs=costs,
        thresholds={name: threshold(score(logits)) for name, score in SCORES.items()},
    )
