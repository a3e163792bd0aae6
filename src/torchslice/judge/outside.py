"""Is this none of my classes? Scores that are high for samples of a network's classes, and how well they tell.

Shapes: n samples, m known samples, C classes, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Task
from ..errors import TorchsliceError
from ..graph.neurons import Neurons, check_neurons
from ..graph.views import copy_of
from ..training.evaluate import predict

#: name -> score [n] of logits [n, C]: the largest logit (arXiv 1911.11132), or their logsumexp (arXiv 2010.03759)
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "max logit": lambda logits: logits.amax(1),
    "energy": lambda logits: logits.logsumexp(1),
}


def nearest(features: Tensor, known: Tensor, *, neighbours: int = 10) -> Tensor:
    """Return how near samples are to known ones, [n]: minus the distance to the k-th nearest (arXiv 2204.06507).

    Features [n, D] and [m, D], such as those of training samples, are brought to length 1 first.

    >>> nearest(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), neighbours=1)
    tensor([-0.])
    """
    if not 1 <= neighbours <= len(known):
        raise TorchsliceError(f"neighbours must be in 1..{len(known)}, the known samples; got {neighbours}.")
    unit, others = (F.normalize(of, dim=1) for of in (features, known))
    return torch.cat(
        [
            -(2 - 2 * part @ others.T).clamp(min=0).topk(neighbours, largest=False).values[:, -1].sqrt()
            for part in unit.split(1024)
        ]
    )


def features(neurons: Neurons, task: Task, split: str = "test") -> Tensor:
    """Return what the classifier of a network gets from every sample of a split, float32 [n, D].

    >>> features(neurons, task, "validation").shape
    torch.Size([143, 32])
    """
    check_neurons(neurons)
    if len(neurons.head) != 1:
        raise TorchsliceError("the logits of this network are not the output of one layer, so it has no features.")
    network = copy_of(neurons.model, {})
    network.set_submodule(neurons.head[0], nn.Identity())
    return predict(network, task, split, output=neurons.output)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Return how often a sample of the classes has a higher score than one of none, in [0, 1]; 0.5 is chance.

    The area under the ROC curve of scores [n] and [m]; equal scores count half.

    >>> auroc(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0]))
    0.625
    """
    ordered = outside.double().sort().values
    below, at_most = (torch.searchsorted(ordered, inside.double(), right=right) for right in (False, True))
    return float((below + at_most).double().mean() / (2 * len(outside)))


def threshold(scores: Tensor, *, accepted: float = 0.95) -> float:
    """Return the highest score that at least a fraction of the scores [n] reach.

    >>> threshold(torch.arange(100.0))
    5.0
    """
    if not 0 < accepted <= 1:
        raise TorchsliceError(f"accepted must be in (0, 1], got {accepted:g}.")
    return float(scores.sort(descending=True).values[math.ceil(accepted * len(scores)) - 1])


def false_positive_rate(inside: Tensor, outside: Tensor, *, accepted: float = 0.95) -> float:
    """Return the fraction of samples of none of the classes that are accepted where 95 % of those of the classes are.

    >>> false_positive_rate(torch.arange(100.0), torch.tensor([3.0, 7.0]))
    0.5
    """
    return float((outside >= threshold(inside, accepted=accepted)).double().mean())
