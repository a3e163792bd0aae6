"""After a cut: all that needs no labels and no training, as far as it helps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..cut.extract import extract
from ..data import Task
from ..graph.neurons import Neurons
from ..slices import Slice
from ..training.evaluate import Accuracy, accuracy_of, predict
from .compensate import compensate
from .recalibrate import recalibrate


class Repaired(NamedTuple):
    """A sub-model after every step of its repair.

    Attributes:
        networks: "extracted", "compensated" and "recalibrated": the network after that step.
        logits: of each on the validation samples.
        accuracy: of these logits.
        kept: the step whose network is best there, the last of those that are level.
    """

    networks: dict[str, nn.Module]
    logits: dict[str, Tensor]
    accuracy: dict[str, Accuracy]
    kept: str

    @property
    def model(self) -> nn.Module:
        """The network that was kept."""
        return self.networks[self.kept]


def repair(
    neurons: Neurons,
    slice_: Slice,
    task: Task,
    *,
    classes: Sequence[str | int] | None = None,
    samples: int = 5000,
    seed: int = 0,
) -> Repaired:
    """Cut out a slice, `compensate`, `recalibrate`; keep the step that is best on validation samples.

    Args:
        task: the samples that the sub-model will see, as `task.restrict` has them.
        classes: names or indices of at least two classes of the model; only their logits remain.
        samples: at most so many training samples give the batch-norm statistics.
        seed: draws the samples of both steps.

    >>> pair = ["3", "8"]
    >>> small = ts.judge.repair(neurons, slices["3"] | slices["8"], task.restrict(pair), classes=pair)
    >>> list(small.logits), small.model is small.networks[small.kept]
    (['extracted', 'compensated', 'recalibrated'], True)
    """
    compensated = compensate(neurons, slice_, task, classes=classes, seed=seed)
    networks = {
        "extracted": extract(neurons, slice_, classes=classes),
        "compensated": compensated,
        "recalibrated": recalibrate(compensated, task, samples=samples, seed=seed),
    }
    logits = {step: predict(net, task, "validation", output=neurons.output) for step, net in networks.items()}
    scores = {step: accuracy_of(of, task.validation.labels) for step, of in logits.items()}
    return Repaired(networks, logits, scores, max(reversed(scores), key=lambda step: scores[step].overall))
