"""One answer from several networks, each of which knows other classes: the task is not given.

Shapes: B batch, n samples, C classes known before, k new classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import TorchsliceError
from ..registry import unknown

#: name -> how the logits of one network [B, k] are made comparable with those of another
RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "energy": lambda logits: logits,
    "softmax": lambda logits: logits.log_softmax(1),
}


class Joined(nn.Module):
    """Answers with the classes of all its networks: scores [B, sum of their classes].

    The rule "energy" takes the logits as they are, so that each network weighs as much as its logsumexp; "softmax"
    takes log probabilities, so that the surest network wins. A bias per network is added to its scores.
    """

    def __init__(self, networks: Sequence[nn.Module], *, biases: Sequence[float], rule: str = "energy") -> None:
        super().__init__()
        if rule not in RULES:
            raise unknown("rule", rule, RULES)
        self.networks = nn.ModuleList(networks)
        self.biases, self.rule = tuple(biases), rule

    def forward(self, images: Tensor) -> Tensor:
        scores = zip(self.networks, self.biases, strict=True)
        return torch.cat([RULES[self.rule](network(images)) + bias for network, bias in scores], dim=1)


class Selected(nn.Module):
    """The class scores `classes` (indices) of a network, in this order."""

    def __init__(self, network: nn.Module, classes: Sequence[int]) -> None:
        super().__init__()
        self.network, self.classes = network, list(classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[:, self.classes]


class Known(nn.Module):
    """A network that is only asked: always in eval mode, without gradients."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Known:
        """Stay in eval mode."""
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.network(images)


def best_bias(known: Tensor, new: Tensor, labels: Tensor) -> tuple[float, float]:
    """Find what to add to the new classes' scores, and the accuracy it gives, the mean over known and new samples.

    Args:
        known: scores [n, C].
        new: scores [n, k].
        labels: int64 [n] in 0..C + k - 1, of both kinds.

    >>> best_bias(torch.tensor([[3.0], [1.0]]), torch.tensor([[2.0], [2.0]]), torch.tensor([0, 1]))
    (0.0, 1.0)
    """
    is_new = labels >= known.shape[1]
    if is_new.all() or not is_new.any():
        raise TorchsliceError("a bias is chosen by samples of known and of new classes; one of them is missing.")
    right_known = ~is_new & (known.argmax(1) == labels)
    right_new = is_new & (new.argmax(1) + known.shape[1] == labels)
    share = torch.where(is_new, 0.5 / is_new.sum(), 0.5 / (~is_new).sum()).double()
    margin, order = (known.max(1).values - new.max(1).values).double().sort()  # a bias above it answers "new"
    as_new = (right_new * share)[order].cumsum(0)  # [n]
    as_known = (right_known * share)[order]
    zero = as_new.new_zeros(1)
    score = torch.cat([zero, as_new]) + as_known.sum() - torch.cat([zero, as_known.cumsum(0)])  # [n + 1]
    edges = torch.cat([margin[:1] - 1, margin, margin[-1:] + 1])
    best = int((score * (edges[1:] > edges[:-1])).argmax())
    return float((edges[best] + edges[best + 1]) / 2), float(score[best])
