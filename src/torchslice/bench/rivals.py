"""Other ways to choose what is trained: DeepArc's blocks, and low-rank adapters.

Shapes: n samples, d values of a sample, r rank.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..core.record import evaluating
from ..core.taps import Taps, find_taps, tapping
from ..slices import Slice

BATCH = 128  # samples of one estimate of HSIC


def unbiased_hsic(a: Tensor, b: Tensor) -> Tensor:
    """Estimate HSIC without bias from two kernel matrices [n, n] of the same n > 3 samples (Song et al., 2012).

    >>> unbiased_hsic(torch.eye(5), torch.eye(5))
    tensor(0.)
    """
    n = len(a)
    a, b = (kernel - kernel.diagonal().diag() for kernel in (a, b))
    traces, sums = (a * b).sum(), a.sum() * b.sum() / ((n - 1) * (n - 2))
    return (traces + sums - 2 / (n - 2) * (a.sum(0) @ b.sum(0))) / (n * (n - 3))


def layer_similarity(
    first: tuple[nn.Module, Tensor], second: tuple[nn.Module, Tensor], example: Tensor
) -> dict[str, float]:
    """Compare what every layer makes of two kinds of images, or of the same images in two states of a network.

    Args:
        first: a network and normalised images [n, ch, H, W].
        second: the same, or a copy of the network with other weights, and as many images, in the same order.
        example: images to find the layers with.

    Returns:
        CKA per layer, in forward order; about 1 where nothing differs.
    """
    taps = find_taps(first[0], example)
    found: dict[str, Cka] = {layer: Cka() for layer in taps.chains}
    for a, b in zip(first[1].split(BATCH), second[1].split(BATCH), strict=True):
        one, other = kernels(first[0], taps, a), kernels(second[0], taps, b)
        for layer, cka in found.items():
            cka.add(one[layer], other[layer])
    return {layer: cka.value for layer, cka in found.items()}


class Cka:
    """Linear CKA, from unbiased estimates of HSIC over batches (arXiv 2010.15327, section 3)."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)  # HSIC of both, of the first, of the second

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add the kernels [n, n] of a batch of the same samples."""
        self.sums += torch.stack([unbiased_hsic(*pair).cpu() for pair in ((a, b), (a, a), (b, b))])

    @property
    def value(self) -> float:
        """About 1 where both are the same up to rotation and scale, 0 where they have nothing in common."""
        return (self.sums[0] / (self.sums[1] * self.sums[2]).clamp(min=1e-300).sqrt()).item()


def kernels(network: nn.Module, taps: Taps, images: Tensor) -> dict[str, Tensor]:
    """Return the linear kernel [n, n] of every layer's activations, after norm and activation function."""
    with evaluating(network), tapping(network, taps) as seen:
        network(images)
    flat = {layer: values[-1].detach().flatten(1).double() for layer, values in seen.values.items()}
    return {layer: values @ values.T for layer, values in flat.items()}


def deeparc_part(similarity: dict[str, float], full: Slice, *, blocks: int = 5) -> Slice:
    """Return the neurons of the layers at which the similarity drops most: DeepArc's choice of what to train.

    Layers stand for its blocks. Of a network with fewer than ten, half are taken.
    """
    values = list(similarity.values())
    drops = {layer: before - now for layer, before, now in zip(similarity, [1.0, *values], values, strict=False)}
    chosen = sorted(drops, key=lambda layer: -drops[layer])[: min(blocks, max(1, len(drops) // 2))]
    return Slice({layer: mask & (layer in chosen) for layer, mask in full.masks.items()})


class LowRank(nn.Module):
    """A network of which only low-rank additions to the weights of its convolutions and linear layers are trained.

    LoRA (arXiv 2106.09685, section 4.1): W + up @ down, with `up` zero at first. The rank is the largest for which the
    share of trained parameters is at most `share`, but at least 1. Norms keep their statistics.

    >>> adapters = LowRank(model, share=0.2)
    >>> model = adapters.merged()
    """

    def __init__(self, model: nn.Module, *, share: float, seed: int = 0) -> None:
        super().__init__()
        self.network = copy.deepcopy(model).requires_grad_(False)
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
        self.weights = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)]
        shapes = [model.get_parameter(name).flatten(1).shape for name in self.weights]
        whole = sum(p.numel() for p in model.parameters())
        self.rank = max(1, int(share * whole / sum(map(sum, shapes))))
        device, generator = model.get_parameter(self.weights[0]).device, torch.Generator().manual_seed(seed)
        self.up, self.down = nn.ParameterList(), nn.ParameterList()
        for rows, columns in shapes:
            rank = min(self.rank, rows, columns)
            self.up.append(torch.zeros(rows, rank, device=device))
            self.down.append((torch.randn(rank, columns, generator=generator) / math.sqrt(columns)).to(device))

    def forward(self, *inputs: Tensor) -> Tensor:
        return functional_call(self.network, self._added(), inputs)

    def train(self, mode: bool = True) -> LowRank:
        """Set the mode of all modules but norms with stored statistics."""
        super().train(mode)
        for module in self.network.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                module.eval()
        return self

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a plain copy of the network with the additions written into the weights, in eval mode."""
        network = copy.deepcopy(self.network)
        for name, weight in self._added().items():
            network.get_parameter(name).copy_(weight)
        return network.requires_grad_(True).eval()

    def _added(self) -> dict[str, Tensor]:
        """Return the weights with their additions."""
        weights = [self.network.get_parameter(name) for name in self.weights]
        return {
            name: weight + (up @ down).view_as(weight)
            for name, weight, up, down in zip(self.weights, weights, self.up, self.down, strict=True)
        }
