"""A rival: activation-driven modular training (MODA), whose modules are joined by union and never tuned.

Shapes: B batch, C classes, N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchslice import Slice
from torchslice.data import Task
from torchslice.find.gates.losses import pair_losses
from torchslice.graph.activations import find_activations, reading
from torchslice.graph.neurons import Neurons
from torchslice.inputs import Inputs, device_of, run

FREQUENCY = 0.9  # of the samples of its class for which a neuron of a module is not zero
LEAST = 0.005  # of a layer that every module keeps


class Moda:
    """Its objective: cross entropy + affinity + dispersion + 0.3 compactness, all of the sizes of activations.

    Affinity and dispersion are of activations what cohesion and coupling are of gates; compactness is their mean.
    """

    def __init__(self, neurons: Neurons) -> None:
        self.neurons, self.where = neurons, find_activations(neurons)

    def __repr__(self) -> str:
        return "Moda()"

    def __call__(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with reading(self.neurons.model, self.where) as seen:
            logits = run(model, inputs, self.neurons.output)
        layers = list(sizes(seen.values, self.where.axis).values())
        affinity, dispersion = pair_losses(layers, labels, logits.shape[1])
        compactness = torch.stack([layer.mean() for layer in layers]).mean()
        loss = F.cross_entropy(logits.float(), labels) + affinity + dispersion + 0.3 * compactness
        parts = {"affinity": affinity, "dispersion": dispersion, "compactness": compactness}
        return loss, logits.argmax(1) == labels, parts


def sizes(values: Mapping[str, list[Tensor]], axis: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the mean absolute activation of every neuron over its positions and uses, {layer: float32 [B, N]}."""

    def size(use: Tensor, channels: int) -> Tensor:
        flat = use.float().abs().movedim(channels, 1)  # [B, N, ...]
        return flat.reshape(*flat.shape[:2], -1).mean(2)

    return {layer: torch.stack([size(use, axis[layer]) for use in uses]).mean(0) for layer, uses in values.items()}


@torch.no_grad()
def class_slices(neurons: Neurons, task: Task, *, batch_size: int = 512) -> dict[str, Slice]:
    """Return the modules: for every class the neurons that are not zero for 90 % of its training samples."""
    model, where, classes = neurons.model.eval(), find_activations(neurons), len(task.classes)
    counts: dict[str, Tensor] = {}
    for inputs, labels in task.batches("train", batch_size, device=device_of(model)):
        own = F.one_hot(labels, classes).float().T  # [C, B]
        with reading(model, where) as seen:
            run(model, inputs, neurons.output)
        for layer, values in sizes(seen.values, where.axis).items():
            counts[layer] = counts.get(layer, 0) + own @ (values > 0).float()
    samples = task.train.labels.bincount(minlength=classes)[:, None]
    masks = {layer: most_active(count.cpu() / samples) for layer, count in counts.items()}
    full = neurons.full().masks
    return {
        name: Slice({layer: masks[layer][row] if layer in masks else mask for layer, mask in full.items()})
        for row, name in enumerate(task.classes)
    }


def most_active(frequency: Tensor) -> Tensor:
    """Return which neurons each class keeps, [C, N] -> bool [C, N]: the often active ones, at least 0.5 % of them.

    >>> most_active(torch.tensor([[0.95, 0.1, 0.2], [0.0, 0.3, 0.1]]))
    tensor([[ True, False, False],
            [False,  True, False]])
    """
    ranks = frequency.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (frequency >= FREQUENCY) | (ranks < max(1, round(LEAST * frequency.shape[1])))


def with_relu(model: nn.Module) -> nn.Module:
    """Replace the GELU modules of a model by ReLU, in place: MODA needs activations that can be zero."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.GELU):
            model.set_submodule(name, nn.ReLU())
    return model
