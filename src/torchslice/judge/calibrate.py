"""Logits that can be believed: one temperature for a network, folded into its last layer; logistic regression.

Shapes: n samples, C classes, K logits or features that a layer is given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Task
from ..errors import TorchsliceError
from ..graph.neurons import Neurons, check_neurons
from ..graph.record import evaluating
from ..training.evaluate import predict

COLDEST, HOTTEST = 0.05, 20.0  # temperatures that are looked at


def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Return how far the confidence of answers is from their accuracy, in [0, 1].

    Expected calibration error (arXiv 1706.04599, equation 3) of logits [n, C] for labels [n]: the mean gap between both
    in bins of equal width of the confidence.

    >>> round(calibration_error(torch.tensor([[9.0, -9.0], [9.0, -9.0]]), torch.tensor([0, 1])), 3)
    0.5
    """
    check_logits(logits, labels)
    confidence, answer = logits.double().softmax(1).max(1)  # [n]
    gap = (answer == labels).double() - confidence
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    return float(torch.zeros(bins, dtype=torch.float64).index_add_(0, index, gap).abs().sum() / len(labels))


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """Raise for logits that are no answers to samples with these labels."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise TorchsliceError(f"needed are logits [n, C] of {list(labels.shape)} samples, got {list(logits.shape)}.")
    if not logits.isfinite().all():
        raise TorchsliceError("some of the logits are NaN or infinite, which are no answers; check the network.")


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T that makes softmax(logits / T) likeliest, between COLDEST and HOTTEST.

    The log likelihood is concave in 1 / T, so its slope is bisected (arXiv 1706.04599, section 4.2). A fraction
    1 / (n + 2) of every label is spread over all classes, as Platt (1999) does: if all samples are classified
    correctly, errors are rare, but not impossible.

    >>> best_temperature(torch.tensor([[4.0, 0.0]] * 400), torch.tensor([0, 0, 0, 1] * 100))  # 75 % are correct
    3.65...
    """
    check_logits(logits, labels)
    scores = logits.double()
    spread = 1 / (len(labels) + 2)
    own = (1 - spread) * scores.gather(1, labels[:, None]).mean() + spread * scores.mean()
    low, high = 1 / HOTTEST, 1 / COLDEST  # of 1 / T
    for _ in range(50):
        middle = (low * high) ** 0.5
        slope = own - ((scores * middle).softmax(1) * scores).sum(1).mean()
        low, high = (middle, high) if slope > 0 else (low, middle)
    return 1 / (low * high) ** 0.5


def calibrate(neurons: Neurons, task: Task, *, logits: Tensor | None = None) -> tuple[nn.Module, float]:
    """Return a copy whose logits are divided by the best temperature on validation samples, and the temperature.

    Answers stay what they were. The temperature goes into the weights of the classifier, so nothing is added to the
    network. On samples like those of `task`, the softmax of the new logits says how often an answer is correct.
    `logits` are the model's on the validation samples [n, C], where they are known already. Raises TorchsliceError for
    a network whose logits are not the outputs of layers.

    >>> calibrated, temperature = ts.judge.calibrate(neurons, task)
    """
    check_neurons(neurons)
    if not neurons.head:
        raise TorchsliceError("the logits of this network are no layer's output; it cannot be calibrated.")
    if logits is None:
        logits = predict(neurons.model, task, "validation", output=neurons.output)
    temperature = best_temperature(logits, task.validation.labels)
    calibrated = neurons.on(copy.deepcopy(neurons.model).eval())
    with torch.no_grad():
        for layer in neurons.head:
            for parameter in calibrated.model.get_submodule(layer).parameters():
                parameter.div_(temperature)
    with evaluating(neurons.model):
        before, after = neurons.logits(neurons.example), calibrated.logits(neurons.example)
    if not torch.allclose(after * temperature, before, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
        what = f"the weights of {neurons.head[0]!r} are used elsewhere too"
        raise TorchsliceError(f"{what}; this network cannot be calibrated.")
    return calibrated.model, temperature


def likeliest(
    layer: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor, logits: Tensor, labels: Tensor
) -> nn.Linear:
    """Return the linear layer on logits [n, K] that makes labels [n] likeliest.

    Logistic regression. The parameters have a Gaussian prior of deviation 1 around `start`, for few samples say little.

    Args:
        layer: weight [C, K] and bias [C] of some parameters, linear in them, so that the problem is convex.

    >>> def scaled(values):
    ...     return values[:1] * torch.eye(2).double(), values[1:]
    >>> joint = likeliest(scaled, torch.tensor([1.0, 0.0, 0.0]), torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 0]))
    >>> joint.weight[0, 0].item() > 0, joint.bias[0].item() > joint.bias[1].item()
    (True, True)
    """
    found, around, given = start.double().requires_grad_(), start.double(), logits.double()
    optimizer = torch.optim.LBFGS([found], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        weight, bias = layer(found)
        prior = (found - around).square().sum() / (2 * len(labels))
        value = F.cross_entropy(given @ weight.T + bias, labels) + prior
        value.backward()
        return value

    optimizer.step(loss)
    weight, bias = layer(found.detach())
    joint = nn.Linear(weight.shape[1], weight.shape[0])
    joint.load_state_dict({"weight": weight, "bias": bias})
    return joint
