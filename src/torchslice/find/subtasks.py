"""Sub-task training: the networks that are trained are the ones that will be cut. The method is torchslice's own.

Shapes: B batch, C classes, k of them in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import TorchsliceError
from ..graph.layers import Flags
from ..graph.neurons import Neurons
from ..graph.plan import held_tensors, plan, zero_out
from ..inputs import Inputs, run
from ..slices import Slice, union
from ..training.ranks import sum_over_ranks

REMEMBERED = 512  # sets of classes whose plan is kept


class SubTasks:
    """An objective for `fit`: the cross entropy of the batch's classes on the sub-network that is theirs.

    The classes that occur in a batch are its sub-task; if no two samples have the same class, all classes are. The
    neurons outside the union of their slices are held at zero, and only these classes are scored:

        loss = cross entropy of softmax(logits[classes] of the model held to the union of slices[classes])

    With batches of random classes (`classes_per_batch`) the sub-models of all subsets are trained together, each with
    the batch-norm statistics of its own samples, and no gate is added. Running statistics are those of batches with all
    classes; `judge.recalibrate` a sub-model that has been cut.

    Args:
        neurons: of the network that will be trained. Its neurons of no class are set to zero at once, and stay it.
        slices: one per class; if the classes of `neurons` have no names, in the order of the classes.

    Raises TorchsliceError for slices of another model or of other classes.

    >>> from copy import deepcopy
    >>> network = deepcopy(model)
    >>> sub_tasks = ts.subtasks.objective(neurons.on(network), slices)
    >>> history = ts.fit(network, task, quick, objective=sub_tasks, classes_per_batch=sub_tasks.sizes)
    """

    def __init__(self, neurons: Neurons, slices: Mapping[str, Slice]) -> None:
        if len(slices) != neurons.num_classes:
            raise TorchsliceError(
                f"sub-task training needs a slice for each of the {neurons.num_classes} classes of the model, "
                f"got {len(slices)}."
            )
        names = tuple(slices) if neurons.classes is None else neurons.classes
        if missing := [name for name in names if name not in slices]:
            raise TorchsliceError(f"there is no slice for class {missing[0]!r}; slices: {', '.join(slices)}.")
        for slice_ in slices.values():
            neurons.check(slice_)
        self.neurons, self.slices = neurons, tuple(slices[name] for name in names)  # in the order of the logits
        self._held = lru_cache(REMEMBERED)(self._hold)
        self._before_norms = {
            name
            for name, layer in neurons.layers.items()
            if layer.mask_after != name and neurons.model.get_submodule(layer.mask_after).weight is not None
        }
        zero_out(neurons.model, plan(neurons, union(self.slices)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of classes to draw batches of: all C of them every other time, else two or their geometric mean."""
        count = len(self.slices)
        return (math.ceil(math.sqrt(2 * count)), 2, count, count)

    def __repr__(self) -> str:
        return f"SubTasks(neurons of the classes: {[len(slice_) for slice_ in self.slices]})"

    def __call__(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss of the batch's sub-task, correct [B], and no parts."""
        counts = sum_over_ranks(labels.bincount(minlength=len(self.slices)))  # [C], of the batch of all processes
        drawn = counts > 0
        if drawn.sum() == counts.sum():  # more classes were drawn than there is room for
            drawn = torch.ones_like(drawn)
        classes, own = drawn.nonzero().flatten(), (drawn.cumsum(0) - 1)[labels]  # [k], [B]
        logits = self.logits(model, inputs, tuple(classes.tolist())).float()  # [B, k]
        return F.cross_entropy(logits, own), logits.argmax(1) == own, {}

    def logits(self, model: nn.Module, inputs: Inputs, classes: tuple[int, ...]) -> Tensor:
        """Run the model held to the slices of some classes: their logits, [B, k]."""
        network = getattr(model, "module", model)  # unwrapped, where training is distributed
        prefix = "" if network is model else "module."
        tensors = held_tensors(network, self._held(classes))
        if len(classes) < len(self.slices):  # running statistics are written into copies, which are thrown away
            tensors = {name: buffer.clone() for name, buffer in network.named_buffers()} | tensors
        tensors = {prefix + name: tensor for name, tensor in tensors.items()}

        def run_held(*args: Inputs, **kwargs: Inputs) -> object:
            return functional_call(model, tensors, args, kwargs, tie_weights=False)

        return run(run_held, inputs, self.neurons.output)[:, list(classes)]

    def _hold(self, classes: tuple[int, ...]) -> dict[str, Flags]:
        """Return the rows to hold at zero, by module; a neuron that a norm follows is held there alone."""
        held = plan(self.neurons, union(self.slices[label] for label in classes)).held
        return {name: flags for name, flags in held.items() if name not in self._before_norms}


objective = SubTasks  # what every method calls its own
