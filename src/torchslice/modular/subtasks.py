"""Sub-task training: the networks that are trained are the ones that will be cut.

Shapes: B batch, C classes, k of them in the batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.find import find_neurons
from ..core.flow import Flags
from ..core.surgery import held_tensors, plan, silence
from ..errors import TorchsliceError
from ..slices import Slice, union

KEPT = 512  # sets of classes that are remembered


class SubTasks:
    """An objective for `fit`: the cross entropy of the batch's classes on the part of the network that is theirs.

    The classes that occur in a batch are its sub-task; where no two images have the same class, all classes are. The
    neurons outside the union of their slices are held at zero, and only these classes are scored:

        loss = cross entropy of softmax(logits[classes] of the model held to the union of slices[classes])

    With batches of random classes (`classes_per_batch`) the sub-models of all subsets are trained together, each with
    the batch-norm statistics of its own images, and no gate is added. Running statistics are those of batches with all
    classes; `recalibrate` a sub-model that has been cut. The method is torchslice's own.

    Args:
        model: the network that will be trained. Its neurons of no class are set to zero at once, and stay it.
        slices: one per class, in the order of the classes, as `slice_model(...).by_class`.
        example: [B, ...], on the model's device.

    Raises TorchsliceError for slices of another model or another number of classes.

    >>> slices = slices_from(scores, Rule("taylor", "budget", share=0.15)).by_class
    >>> objective = SubTasks(model, slices, data.example)
    >>> fit(model, data, objective=objective, classes_per_batch=objective.sizes, epochs=12)
    """

    def __init__(self, model: nn.Module, slices: Mapping[str, Slice], example: Tensor) -> None:
        neurons = find_neurons(model, example)
        if len(slices) != neurons.classes:
            raise TorchsliceError(
                f"sub-task training needs a slice for each of the {neurons.classes} classes of the model, "
                f"got {len(slices)}."
            )
        for part in slices.values():
            neurons.check(part)
        self.slices, self.neurons = tuple(slices.values()), neurons
        self._held = lru_cache(KEPT)(self._hold)
        self._before_norms = {
            name
            for name, layer in neurons.layers.items()
            if layer.hold != name and model.get_submodule(layer.hold).weight is not None
        }
        silence(model, plan(neurons, union(self.slices)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of classes to draw batches of: all C of them every other time, else two or their geometric mean.

        >>> SubTasks(model, slices, data.example).sizes  # of ten classes
        (5, 2, 10, 10)
        """
        count = len(self.slices)
        return (math.ceil(math.sqrt(2 * count)), 2, count, count)

    def __repr__(self) -> str:
        kept = [int(torch.cat([*part.masks.values()]).sum()) for part in self.slices]
        return f"SubTasks(neurons of the classes: {kept})"

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss of the batch's sub-task, which answers are right, and no parts."""
        classes, own = labels.unique(return_inverse=True)  # [k], [B]
        if len(classes) == len(labels):  # more classes were drawn than there is room for
            classes, own = torch.arange(len(self.slices)), labels
        logits = self.logits(model, images, tuple(classes.tolist())).float()  # [B, k]
        return F.cross_entropy(logits, own), logits.argmax(1) == own, {}

    def logits(self, model: nn.Module, images: Tensor, classes: tuple[int, ...]) -> Tensor:
        """Run the model held to the slices of some classes on images: their logits, [B, k]."""
        network = getattr(model, "module", model)  # unwrapped, where training is distributed
        prefix = "" if network is model else "module."
        held = {prefix + name: tensor for name, tensor in held_tensors(network, self._held(classes)).items()}
        with _statistics_kept(network, len(classes) < len(self.slices)):
            return functional_call(model, held, images, tie_weights=False)[:, list(classes)]

    def _hold(self, classes: tuple[int, ...]) -> dict[str, Flags]:
        """Return the rows to hold at zero, by module; a neuron that a norm follows is held there alone."""
        held = plan(self.neurons, union(self.slices[label] for label in classes)).held
        return {name: flags for name, flags in held.items() if name not in self._before_norms}


@contextlib.contextmanager
def _statistics_kept(model: nn.Module, keep: bool) -> Iterator[None]:
    """Leave the running statistics of batch norms as they are inside the block, if asked to."""
    norms = [module for module in model.modules() if keep and isinstance(module, _BatchNorm)]
    found = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm, _, _ in found:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, momentum, count in found:
            norm.momentum, norm.num_batches_tracked = momentum, count
