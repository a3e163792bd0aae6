"""All that decides what a training run computes, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from .. import data, models
from ..data import Task
from ..errors import TorchsliceError
from ..find import gates
from ..graph.find import find_neurons
from ..graph.neurons import Neurons
from ..inputs import Inputs
from ..models.fast import Fast
from ..registry import unknown
from ..training import Objective, Training

WHITENED = 1000  # training images by which the first convolution of `fast` is chosen
METHODS = ("subtasks", "gates", "standard")


@dataclass(frozen=True)
class Method:
    """How a network is trained so that it can be cut.

    Attributes:
        method: subtasks (as usual first, then sub-models of any classes at any size), gates (as published, arXiv
            2306.09376) or standard.
        standard_epochs: subtasks: epochs before neurons are ranked; half by default.
        cohesion_weight: gates: weight of the cohesion loss.
        coupling_weight: gates: weight of the coupling loss.
    """

    method: str = "subtasks"
    standard_epochs: int | None = None
    cohesion_weight: float = 0.5
    coupling_weight: float = 1.5

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        _ = self.objective  # says what is wrong with its weights

    @property
    def objective(self) -> Objective:
        """What the training of gates minimises."""
        return gates.objective(self.cohesion_weight, self.coupling_weight)


#: What an option needs to play a part: another one, and its values.
NEEDS = {
    "standard_epochs": ("method", ("subtasks",)),
    **dict.fromkeys(("cohesion_weight", "coupling_weight"), ("method", ("gates",))),
    "label_smoothing": ("method", ("subtasks", "standard")),
}


@dataclass(frozen=True)
class Recipe:
    """A network, a task and a training.

    The built-in networks get the number of channels and classes of the task.

    Attributes:
        model, data: names, see `models.create` and `data.load`.
        train_limit: number of training samples to use, None for all.
    """

    model: str
    data: str
    method: Method = field(default_factory=Method)
    training: Training = field(default_factory=lambda: Training(epochs=30))
    model_arguments: dict[str, Any] = field(default_factory=dict)
    data_options: dict[str, Any] = field(default_factory=dict)
    train_limit: int | None = None

    def __post_init__(self) -> None:
        check_name(self.model)
        if self.method.method == "subtasks" and not 1 <= self.first_epochs < self.training.epochs:
            raise TorchsliceError(
                "sub-task training has at least 1 standard epoch and at least 1 after it; "
                f"got standard_epochs={self.first_epochs} and epochs={self.training.epochs}."
            )

    @property
    def first_epochs(self) -> int:
        """Number of epochs before sub-tasks are trained, all where they never are."""
        if self.method.method != "subtasks":
            return self.training.epochs
        chosen = self.method.standard_epochs
        return max(1, self.training.epochs // 2) if chosen is None else chosen

    def load_task(self, data_dir: str | Path | None = None) -> Task:
        """Load the task; `data_dir` is where the files of the named data sets are."""
        task = prepared(self.model, data.load(self.data, data_dir, seed=self.training.seed, **self.data_options))
        return task if self.train_limit is None else task.limit(train=self.train_limit, seed=self.training.seed)

    def make_model(self, task: Task) -> nn.Module:
        """Build the untrained network, the same one every time."""
        return make_model(self.model, task, self.model_arguments, seed=self.training.seed)

    def check(self, task: Task) -> Neurons:
        """Return the neurons of the untrained network; raise for what cannot be trained on the task, or cut later."""
        counts = task.train.labels.bincount(minlength=len(task.classes))  # [C]
        if empty := [name for name, n in zip(task.classes, counts, strict=True) if not n]:
            raise TorchsliceError(f"class {empty[0]!r} of {task.name} has no training sample; raise train_limit=.")
        return find_neurons(self.make_model(task), task.example, classes=task.classes)

    def to_plain(self) -> dict[str, Any]:
        """Return the recipe as JSON-able data."""
        return {**asdict(self), "training": self.training.to_plain()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Recipe:
        """Rebuild a recipe from `to_plain`.

        >>> recipe = Recipe("convnet", "digits")
        >>> Recipe.from_plain(recipe.to_plain()) == recipe
        True
        """
        try:
            parts = {"method": Method(**_checked(Method, plain["method"]))}
            training = Training(**_checked(Training, plain["training"], skip=("device", "progress")))
            return cls(**_checked(cls, {**plain, **parts, "training": training}))
        except (KeyError, TypeError, ValueError) as error:
            raise TorchsliceError(f"this is no recipe of this torchslice ({error}); train anew.") from error


def _checked(kind: type, plain: Mapping[str, Any], skip: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """Return values for all fields of a dataclass but those to skip; other names and types are a TypeError."""
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name not in skip}
    if {*plain} != {*hints}:
        raise TypeError(f"other entries: {', '.join(sorted({*plain} ^ {*hints}))}")
    for name, hint in hints.items():
        value, allowed = plain[name], {float: int | float, dict[str, Any]: dict}.get(hint, hint)
        if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
            raise TypeError(f"{name} is {value!r}")
    return plain


def make_model(spec: str, task: Task, arguments: Mapping[str, Any], *, seed: int = 0) -> nn.Module:
    """Build a network by name for the inputs and classes of a task, its weights drawn by `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        given = {"num_classes": len(task.classes), **fitting(spec, task.example), **arguments}
        model = models.create(spec, **given)
    if isinstance(model, Fast):
        rows = torch.linspace(0, len(task.train) - 1, min(WHITENED, len(task.train))).long()
        model.whiten(next(iter(task.train.read([rows]))))
    return model


def prepared(spec: str, task: Task) -> Task:
    """Return a task with texts as tokens of the tokenizer that a network of transformers brings, if they have none."""
    kind, _, path = spec.partition(":")
    if kind != "hf" or not isinstance(task.train, data.Texts) or task.preprocessing is not None:
        return task
    record = data.tokenizer_record(path)
    size = data.tokenizer_of(record).get_vocab_size()
    return task.like({**record, "longest": models.check_tokenizer(path, size, record["longest"])})


def check_name(model: str) -> None:
    """Raise for a network that is not built in, where that can be told without building one."""
    if ":" not in model and model not in models.names():
        models.create(model)  # says which there are


def is_own(spec: str) -> bool:
    """Whether a name of a network or data set is that of a function of the user's."""
    return ":" in spec and spec.partition(":")[0] not in ("torchvision", "timm", "hf", "folder", "csv")


def fitting(spec: str, example: Inputs) -> dict[str, Any]:
    """Return the arguments that make a built-in network take images of so many channels."""
    images = isinstance(example, Tensor) and example.dim() == 4
    return {"channels": example.shape[1]} if images and spec in models.names() else {}


def absolute(name: str) -> str:
    """Return the name of a network or data set with its path made absolute, so that it holds from everywhere."""
    kind, _, path = name.partition(":")
    return f"{kind}:{Path(path).expanduser().resolve()}" if kind in ("folder", "csv", "hf") else name
