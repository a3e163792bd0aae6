"""Networks of which only a part can be trained: all other values are out of the reach of any optimizer.

Shapes: m rows of a tensor that move.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ..errors import TorchsliceError
from ..graph.layers import Port
from ..graph.neurons import Neurons, check_neurons
from ..graph.plan import place_of, tensors_of
from ..graph.views import copy_of
from ..slices import Slice
from .rows import RowGradients, Rows


class Computed(nn.Module):
    """A copy of a network that runs with the tensors that `tensors()` computes in the places of its own.

    It trains like any other module; `merged()` gives the plain network that it stands for.
    """

    stored_statistics = True  # whether norms that have them use them in training too

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.network = copy_of(model, {})
        self._requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        """Return tensors of the network by name, as they are to be used."""
        raise NotImplementedError

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return functional_call(self.network, self.tensors(), inputs, named, tie_weights=False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules but norms that keep to their stored statistics."""
        super().train(mode)
        for module in self.network.modules() if self.stored_statistics else ():
            if isinstance(module, _NormBase) and module.track_running_stats:
                module.eval()
        return self

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a plain copy of the network with the computed tensors written in, in eval mode."""
        network = copy_of(self.network, {})
        for name, tensor in self.tensors().items():
            tensor_of(network, name).copy_(tensor)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(self._requires_grad[name])
        return network.eval()


class Partial(Computed):
    """A network that computes what the model computes, of which only the neurons of a slice can be trained.

    Its only parameters that are trained are the rows that move, see `moving_rows`. So momentum, weight decay,
    schedules, autocast and checkpoints cannot touch a frozen value, and the model held to the neurons outside the slice
    computes the same bits after training as before. It trains with `fit`, `finetune` or any loop, under
    DistributedDataParallel too. Norms use their stored statistics, in training too. What the model holds frozen
    (`requires_grad=False`) stays so.

    Args:
        slice_: the neurons that move; it may be empty in some layers.
        classes: names or indices of classes whose rows of the classifier move as well.
        batch_statistics: let batch norms use the statistics of the batch for channels that move, in training, and
            update their running statistics; for neurons that learn something new. Norms without momentum do not.

    Raises TorchsliceError for a slice of another model, bad classes, and where nothing would move.

    >>> partial = Partial(neurons, ~critical)
    >>> rows = ts.fit(partial, task, quick)
    >>> trained = partial.merged()
    """

    rows: list[Rows]

    def __init__(
        self, neurons: Neurons, slice_: Slice, *, classes: Sequence[str | int] = (), batch_statistics: bool = False
    ) -> None:
        where = moving_rows(neurons, slice_, classes)
        super().__init__(neurons.model)
        trained = {layer: trained_tensors(self.network, layer, neurons.flow.ports[layer]) for layer in where}
        self.network.requires_grad_(False)
        self.rows = nn.ModuleList()  # type: ignore[assignment]
        for layer, rows in where.items():
            port, tensors = neurons.flow.ports[layer], trained[layer]
            module = self.network.get_submodule(place_of(layer, port))
            if batch_statistics and isinstance(module, _BatchNorm) and module.affine and module.momentum:
                tensors |= {name: tensor for name, tensor in module.named_buffers(layer, False) if tensor.dim()}
            self.rows.extend(Rows(n, t, rows, port.row_axis(n.rpartition(".")[2])) for n, t in tensors.items())
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise TorchsliceError(
                "nothing would move: no neuron of the slice has parameters of its own that may be trained "
                "(requires_grad), nor has a class in classes=. Give a slice with more neurons, or name classes."
            )
        self.train(neurons.model.training)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that have moving rows, with these in place, by name."""
        return {rows.name: rows(tensor_of(self.network, rows.name)) for rows in self.rows}

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the network; in training, gradients are computed for the moving rows only."""
        tensors = self.tensors()
        rows = {id(tensors[rows.name]): rows for rows in self.rows}
        with RowGradients(rows) if self.training else nullcontext():
            return functional_call(self.network, tensors, inputs, named, tie_weights=False)

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """Set the rows that move to those of a model of the same structure."""
        for rows in self.rows:
            rows.moving.copy_(rows.of(tensor_of(model, rows.name).to(rows.where.device)))

    @property
    def param_fraction(self) -> float:
        """Fraction of the model's parameters that move, in [0, 1]."""
        moving = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        return moving / sum(parameter.numel() for parameter in self.network.parameters())


def moving_rows(neurons: Neurons, slice_: Slice, classes: Sequence[str | int] = ()) -> dict[str, Tensor]:
    """Return which rows of which layers belong to the neurons of a slice and to the logits of `classes`, int64 [m].

    These are the rows that have no effect where the slice is held at zero: those of the neurons themselves, and the
    channels of a norm or depthwise convolution that read nothing else. A pinned layer belongs to no neuron, and neither
    does a channel of a norm that also reads a neuron outside the slice.
    """
    check_neurons(neurons)
    held = {name: mask.numpy() for name, mask in (slice_ & neurons.full()).masks.items()}
    if len(classes):
        if not neurons.head:
            raise TorchsliceError(
                "the logits do not come straight from a layer, so classes have no rows to train; give classes=()."
            )
        logits = np.isin(np.arange(neurons.num_classes), neurons.class_indices(classes))
        held |= dict.fromkeys(neurons.head, logits)
    found = {name: torch.from_numpy(flags.nonzero()[0]) for name, flags in neurons.zeros(held).held.items()}
    return {name: rows for name, rows in found.items() if len(rows)}


def trained_tensors(network: nn.Module, layer: str, port: Port) -> dict[str, Tensor]:
    """Return the parameters of a layer that may be trained, by full name."""
    own, place = {id(tensor) for tensor in tensors_of(network, layer, port).values()}, place_of(layer, port)
    named = network.get_submodule(place).named_parameters(place, False)
    return {name: parameter for name, parameter in named if id(parameter) in own and parameter.requires_grad}


def moving_parameters(neurons: Neurons, slice_: Slice) -> int:
    """Return how many parameters move with the neurons of a slice, see `Partial`."""
    moving = 0
    for layer, rows in moving_rows(neurons, slice_).items():
        port = neurons.flow.ports[layer]
        for name, tensor in trained_tensors(neurons.model, layer, port).items():
            moving += len(rows) * tensor.numel() // tensor.shape[port.row_axis(name.rpartition(".")[2])]
    return moving


def tensor_of(network: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer of a network by its full name."""
    path, _, key = name.rpartition(".")
    return getattr(network.get_submodule(path), key)
