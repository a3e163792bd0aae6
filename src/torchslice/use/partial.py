"""Train only some neurons of a network: all other values are out of the reach of any optimizer.

Shapes: N rows of a tensor (one per neuron or channel), m of them move.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.find import find_neurons
from ..core.neurons import Neurons
from ..core.record import check_model
from ..errors import TorchsliceError
from ..slices import Slice
from .rows import RowGradients, Rows

WHERE, MOVING = "moving_rows", "moving_rows_of_"  # what a layer gets: which rows move, and these rows of each tensor
STATISTICS = ("running_mean", "running_var")


def moving_rows(neurons: Neurons, part: Slice, classes: Sequence[int] = ()) -> dict[str, Tensor]:
    """Return which rows of which layers belong to the neurons of `part` and the class scores `classes`, int64 [m].

    These are the rows that holding `part` at zero leaves without effect: those of the neurons themselves, and the
    channels of a norm or depthwise convolution that read nothing but them. Nothing else is the neurons' own: not a
    pinned layer, and no channel of a norm that also reads a neuron outside `part`. A `part` may be empty in some layers
    and full in others.

    >>> moving_rows(neurons, ~critical)["layer1.0.bn1"]
    tensor([ 0,  3, 17])
    """
    held = {name: mask.numpy() for name, mask in (part & neurons.full()).masks.items()}
    if len(classes) and not neurons.head:
        raise TorchsliceError(
            "the class scores do not come straight from a layer, so they have no rows to train; give classes=()."
        )
    if not all(0 <= c < neurons.classes for c in classes):
        raise TorchsliceError(f"classes must be indices in 0..{neurons.classes - 1}, got {list(classes)}.")
    for name in neurons.head:
        scores = torch.zeros(neurons.classes, dtype=torch.bool)
        scores[list(classes)] = True
        held[name] = scores.numpy()
    found = {name: torch.from_numpy(flags.nonzero()[0]) for name, flags in neurons.flow.zeros(held).held.items()}
    return {name: rows for name, rows in found.items() if len(rows)}


class Partial(nn.Module):
    """A network that computes what `model` computes, of which only the neurons of `part` can be trained.

    It holds a copy of the model in which every tensor is a buffer; its only parameters are the rows that move (see
    `moving_rows`): weights and biases of the neurons, and the affine rows of norms that read nothing else. So momentum,
    weight decay, schedules, autocast and checkpoints cannot touch a frozen value, and the model held to the neurons
    outside `part` computes the same bits after training as before. Norms run with their stored statistics, in training
    too. It trains with `fit`, `finetune` or any loop, under DistributedDataParallel too.

    Args:
        model: the network; it is not changed.
        part: the neurons that move; may be empty in some layers.
        example: [B, ...], on the model's device.
        classes: indices of the class scores whose rows move as well.
        batch_statistics: let batch norms use the statistics of the batch for channels that move, in training, and
            update their running statistics; for neurons that learn something new. Norms without momentum do not.
        neurons: of the same model, found before, save finding them again.

    Raises TorchsliceError for a slice of another model, bad classes, and where nothing would move.

    >>> partial = Partial(model, ~critical, data.example)
    >>> fit(partial, data, epochs=5)
    >>> model = partial.merged()
    """

    def __init__(
        self,
        model: nn.Module,
        part: Slice,
        example: Tensor,
        *,
        classes: Sequence[int] = (),
        batch_statistics: bool = False,
        neurons: Neurons | None = None,
    ) -> None:
        super().__init__()
        check_model(model)
        rows = moving_rows(neurons or find_neurons(model, example), part, classes)
        self.network = copy.deepcopy(model)
        first: dict[int, str] = {}  # id of a parameter -> its first name, for parameters that are shared
        self._parameter_names: dict[str, tuple[str, bool]] = {}  # name -> first name, requires_grad
        for name, parameter in self.network.named_parameters(remove_duplicate=False):
            self._parameter_names[name] = first.setdefault(id(parameter), name), parameter.requires_grad
        for name in self._parameter_names:
            path, _, key = name.rpartition(".")
            module = self.network.get_submodule(path)
            tensor = module._parameters.pop(key).detach()  # type: ignore[union-attr]
            module.register_buffer(key, tensor)
            if path in rows:
                where = rows[path].to(tensor.device)
                module.register_buffer(WHERE, where)
                module.register_parameter(MOVING + key, nn.Parameter(tensor.index_select(0, where)))
        norms = [m for m in self.network.modules() if isinstance(m, _BatchNorm) and WHERE in m._buffers]
        for module in norms if batch_statistics else ():
            if module.track_running_stats and module.momentum:
                for key in STATISTICS:
                    module.register_buffer(MOVING + key, module.get_buffer(key)[module.get_buffer(WHERE)])
        if not any(True for _ in self.parameters()):
            raise TorchsliceError(
                "nothing would move: the slice has no neuron with parameters of its own, and no class is named. "
                "Give a slice with more neurons, or classes=."
            )
        self.train(model.training)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the network with the moving rows in their places."""
        if not self.training:
            return functional_call(self.network, self._whole(), inputs)
        with RowGradients(self._rows()) as mode:
            return functional_call(self.network, mode.whole, inputs)

    def train(self, mode: bool = True) -> Partial:
        """Set the mode of all modules but norms with stored statistics, which always run with these."""
        super().train(mode)
        for module in self.network.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                module.eval()
        return self

    def take(self, model: nn.Module) -> None:
        """Set the rows that move to those of a model of the same shape."""
        tensors = model.state_dict()
        with torch.no_grad():
            for rows in self._rows():
                rows.moving.copy_(tensors[rows.name][rows.where.to(tensors[rows.name].device)])

    def merged(self) -> nn.Module:
        """Return a plain copy of the model with the moved rows written in, in eval mode."""
        with torch.no_grad():
            moved = self._whole()
        network = copy.deepcopy(self.network)
        for module in network.modules():
            for tensors in (module._parameters, module._buffers):
                for key in [key for key in tensors if key.startswith(WHERE)]:
                    del tensors[key]
        for name, tensor in moved.items():
            path, _, key = name.rpartition(".")
            network.get_submodule(path)._buffers[key] = tensor
        made: dict[str, nn.Parameter] = {}
        for name, (first, requires_grad) in self._parameter_names.items():
            path, _, key = name.rpartition(".")
            module = network.get_submodule(path)
            tensor = module._buffers.pop(key)  # type: ignore[assignment]
            made.setdefault(first, nn.Parameter(tensor, requires_grad))
            module.register_parameter(key, made[first])
        return network.eval()

    @property
    def param_share(self) -> float:
        """Share of the model's parameters that move, in [0, 1]."""
        names = {first for first, _ in self._parameter_names.values()}
        whole = sum(tensor.numel() for name, tensor in self.network.named_buffers() if name in names)
        return sum(parameter.numel() for parameter in self.parameters()) / whole

    def _rows(self) -> Iterator[Rows]:
        """Yield every tensor with rows that move."""
        for path, module in self.network.named_modules():
            for key, moving in [*module._parameters.items(), *module._buffers.items()]:
                if moving is not None and key.startswith(MOVING):
                    name = key.removeprefix(MOVING)
                    frozen, where = module.get_buffer(name), module.get_buffer(WHERE)
                    yield Rows(f"{path}.{name}" if path else name, frozen, where, moving)

    def _whole(self) -> dict[str, Tensor]:
        """Return these tensors with their moving rows in place, by name."""
        return {rows.name: rows.whole() for rows in self._rows()}
