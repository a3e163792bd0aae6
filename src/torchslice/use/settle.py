"""Make a slice answer as well as it can on its own, by training it while the other neurons are held at zero."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..core.find import find_neurons
from ..core.flow import Flags
from ..core.hold import holding
from ..core.surgery import plan
from ..data import Data
from ..errors import TorchsliceError
from ..slices import Slice, union
from .evaluate import device_of
from .extended import Extended
from .finetune import Tuned, finetune
from .joined import Selected
from .partial import Partial


class _Held(nn.Module):
    """A partial network that runs with neurons held at zero."""

    def __init__(self, partial: Partial, held: dict[str, Flags]) -> None:
        super().__init__()
        self.partial, self.held = partial, held

    def forward(self, images: Tensor) -> Tensor:
        with holding(self.partial.network, self.held):
            return self.partial(images)


def settle(
    model: nn.Module | Extended,
    critical: Slice,
    data: Data,
    *,
    epochs: int = 5,
    learning_rate: float = 0.02,
    **training: Any,
) -> Tuned:
    """Train critical neurons, and the rows of the classes of `data`, while all other neurons are held at zero.

    A slice that was found in a trained network loses accuracy when it answers alone; this regains it before `extend`
    freezes the slice. The result is a whole network of the same shape: other neurons keep their values, and its slice
    `critical` answers as in `validation_accuracy`. The epoch is chosen as in `finetune`; epoch 0 is the slice as found.

    Args:
        model: a trained network with the classes of `data`, or an extended one: then those of its last task, and the
            neurons of earlier tasks stay as they are. It is not changed.
        critical: the neurons that will answer, at least one in every layer.
        data: what the model was trained on.
        training: as in `finetune`.

    >>> settled = settle(model, critical, data)
    >>> extended = extend(settled.model, critical, more, classes=data.classes)
    >>> extended = extended.on(settle(extended, grown, more).model)  # for the next extension
    """
    extended = isinstance(model, Extended) or getattr(model, "extension", None) is not None
    start = Extended.start(model, None if extended else data.classes, data.example)
    example = data.example.to(device_of(start.model))
    *earlier, last = start.tasks
    if last.classes != data.classes:
        raise TorchsliceError(
            f"the last task is {', '.join(last.classes)}; give its data alone, not those of {', '.join(data.classes)}."
        )
    if len(last.classes) < 2:
        raise TorchsliceError(f"there is a single class, {last.classes[0]!r}, and nothing to tell it from.")
    start.check(critical)
    neurons = find_neurons(start.model, example)
    held = plan(neurons, critical).held
    part = critical - union([task.part for task in earlier if task.part is not None] or [neurons.none()])
    rows = range(neurons.classes - len(last.classes), neurons.classes)
    partial = Partial(start.model, part, example, classes=rows, batch_statistics=True, neurons=neurons)
    student = Selected(_Held(partial, held), rows)
    tuned = finetune(student, data, epochs=epochs, learning_rate=learning_rate, **training)
    trained: Any = tuned.model
    merged = trained.network.partial.merged()
    merged.classes = start.classes
    return Tuned(merged, tuned.best_epoch, tuned.validation_accuracy)
