"""Sub-task training: the networks that are trained are the ones that will be cut. The method is torchslice's own.

Shapes: B batch, C classes, k of them in the batch, N neurons of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..data import Task
from ..errors import TorchsliceError
from ..files import digest_of
from ..graph.neurons import Neurons, check_neurons
from ..graph.plan import Plan, cut_tensors, plan, resize
from ..graph.views import view_of
from ..inputs import Inputs, run
from ..rankings import Ranking, by_best_rank, by_turns, widths
from .semantic import Contributions, contributions
from .semantic.contributions import check_scores

REMEMBERED = 512  # cuts whose plan is kept
LEVELS = 16  # shares that are drawn, so that kernels are prepared for few widths


class SubTasks:
    """An objective for `fit`: at every step the cross entropy of some classes on a part of the network that is theirs.

    A step draws classes and a share of the network, and then a batch of these classes. The first neurons of their
    joined ranking, so many as the share gives every layer (`rankings.widths`), are cut out, and only these classes are
    scored:

        loss = cross entropy of softmax(logits[classes] of the network of the first neurons)

    So the sub-models of all sets of classes and of all sizes are trained together, each with the batch-norm statistics
    of its own samples. Steps of all classes train the whole network as usual, on ordinary batches, and running
    statistics are theirs; `judge.recalibrate` a sub-model that has been cut (`reuse` does).

    Args:
        neurons: of the network that will be trained.
        rankings: one per class; if the classes of `neurons` have no names, in the order of the classes.
        whole: fraction of the steps that are of all classes and the whole network.
        least: smallest share that is drawn, in (0, 1]; shares are drawn evenly from it up to 1.
        round_to: widths are multiples of it, rounded up, as those of the sub-models that `reuse` cuts.
        label_smoothing: of the cross entropy, in [0, 1).

    Raises TorchsliceError for rankings of another model or of other classes.

    >>> from copy import deepcopy
    >>> network = deepcopy(model)
    >>> rankings = ts.subtasks.rank(neurons, task, scores)
    >>> history = ts.fit(network, task, quick, objective=ts.subtasks.objective(neurons.on(network), rankings))
    """

    def __init__(
        self,
        neurons: Neurons,
        rankings: Mapping[str, Ranking],
        *,
        whole: float = 0.5,
        least: float = 0.45,
        round_to: int = 8,
        label_smoothing: float = 0.1,
    ) -> None:
        check_neurons(neurons)
        names = tuple(rankings) if neurons.classes is None else neurons.classes
        if len(rankings) != neurons.num_classes:
            raise TorchsliceError(
                f"sub-task training needs a ranking for each of the {neurons.num_classes} classes of the model, "
                f"got {len(rankings)}."
            )
        if missing := [name for name in names if name not in rankings]:
            raise TorchsliceError(f"there is no ranking for class {missing[0]!r}; rankings: {', '.join(rankings)}.")
        for name, value in (("whole", whole), ("least", least)):
            if not 0 < value <= 1:
                raise TorchsliceError(f"{name} must be in (0, 1], got {value}.")
        if not 0 <= label_smoothing < 1:
            raise TorchsliceError(f"label_smoothing must be in [0, 1), got {label_smoothing}.")
        if round_to < 1:
            raise TorchsliceError(f"round_to must be at least 1, got {round_to}.")
        self.neurons, self.rankings = neurons, tuple(rankings[name] for name in names)  # in the order of the logits
        for ranking in self.rankings:
            if not isinstance(ranking, Ranking):
                raise TorchsliceError(
                    f"needed are rankings, as subtasks.rank finds them; got a {type(ranking).__name__}."
                )
            neurons.check(ranking.prefix(ranking.layers))
        self.whole, self.least, self.round_to, self.label_smoothing = whole, least, round_to, label_smoothing
        self._plan = lru_cache(REMEMBERED)(self._planned)
        self._view: tuple[nn.Module, nn.Module] | None = None

    def __repr__(self) -> str:
        names = ("whole", "least", "round_to", "label_smoothing")
        settings = ", ".join(f"{name}={getattr(self, name):g}" for name in names)
        orders = {f"{i} {layer}": of[layer] for i, of in enumerate(self.rankings) for layer in of.layers}
        return f"SubTasks({len(self.rankings)} classes, rankings {digest_of(orders)[:8]}, {settings})"

    def draw(self, generator: torch.Generator) -> SubTask:
        """Draw what the next step trains: the whole network, or a part of it for two of the C classes or more.

        Their number is 2 * ((C + 1) / 2) ** u rounded down, u even in [0, 1): small sets are drawn more often.
        """
        count = len(self.rankings)
        first, second, third = torch.rand(3, generator=generator).tolist()
        if first < self.whole:
            return SubTask(self, tuple(range(count)))
        size = int(2 * ((count + 1) / 2) ** second)
        drawn = torch.randperm(count, generator=generator)[:size].sort().values
        share = math.ceil((self.least + (1 - self.least) * third) * LEVELS) / LEVELS
        return SubTask(self, tuple(drawn.tolist()), share)

    def logits(self, model: nn.Module, inputs: Inputs, classes: Sequence[int], share: float) -> Tensor:
        """Run the part of the model that some classes get: their logits, [B, k]."""
        if self._view is None or self._view[0] is not model:
            self._view = model, view_of(model)
        what = self._plan(tuple(classes), share)
        view, tensors = resize(self._view[1].train(model.training), what), cut_tensors(model, what)

        def run_part(*args: Inputs, **kwargs: Inputs) -> object:
            return functional_call(view, tensors, args, kwargs, tie_weights=False)

        return run(run_part, inputs, self.neurons.output)[:, list(classes)]

    def _planned(self, classes: tuple[int, ...], share: float) -> Plan:
        ranking = by_best_rank(self.rankings[label] for label in classes)
        part = ranking.prefix(widths(ranking.layers, share, steps=self.neurons.steps(self.round_to)))
        return plan(self.neurons, self.neurons.closed(part))


@dataclass(frozen=True)
class SubTask:
    """What one step of sub-task training minimises: some classes, on their share of the network.

    It is an objective, so a loop of your own draws one, takes a batch of its classes and calls it.
    """

    of: SubTasks
    classes: tuple[int, ...]
    share: float = 1.0

    def __call__(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss, correct [B], and no parts; labels are those of the whole network."""
        if len(self.classes) == len(self.of.rankings) and self.share == 1:
            logits, own = run(model, inputs, self.of.neurons.output), labels
        else:
            logits = self.of.logits(model, inputs, self.classes, self.share)
            own = torch.searchsorted(torch.tensor(self.classes, device=labels.device), labels)
        loss = F.cross_entropy(logits.float(), own, label_smoothing=self.of.label_smoothing)
        return loss, logits.argmax(1) == own, {}


objective = SubTasks  # what every method calls its own


def rank(
    neurons: Neurons,
    task: Task,
    scores: Contributions | None = None,
    *,
    metric: str | None = None,
    cost: float = 0.3,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Ranking]:
    """Rank the neurons of a trained network for every class, by their contributions and by turns between the classes.

    A neuron costs for every class that has it, and early layers are shared, see `rankings.by_turns`. Layers whose
    neurons are the same channels, as in a residual stream, have one order, so that whole channels can be cut.

    Args:
        task: its training split is used, never another.
        scores: from `semantic.contributions`, which is called if there are none, with the `seed`.
        metric: which of the scores; needed when there are several.
        cost: of a neuron for each class that has it, as a fraction of the largest contribution.

    >>> rankings = ts.subtasks.rank(neurons, task, scores)
    >>> rankings["3"]
    Ranking(112 neurons in 6 layers)
    """
    if not 0 <= cost < math.inf:
        raise TorchsliceError(f"cost must be 0 or more, got {cost}.")
    if scores is None:
        scores = contributions(neurons, task, metric=metric or "taylor", seed=seed, progress=progress)
    check_scores(scores, neurons, task)
    of = scores.tied(neurons)[scores.the_metric(metric)]
    first: dict[tuple[int, ...], str] = {}  # {channels: the first layer that has them}
    alike = {name: first.setdefault(tuple(numbers.tolist()), name) for name, numbers in neurons.sets.items()}
    rankings = by_turns({name: of[name] for name in first.values()}, cost=cost)
    return {
        name: Ranking({layer: found[other] for layer, other in alike.items()}) if len(first) < len(alike) else found
        for name, found in zip(task.classes, rankings, strict=True)
    }
