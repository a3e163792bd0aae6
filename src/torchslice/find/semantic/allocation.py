"""How much of each layer stays: a compression is spread over the layers by the loss that was measured.

The search is greedy, as that of NetAdapt (arXiv 1804.03230), but counts parameters and trains nothing on its way.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F

from ...cut.extract import extract, retention
from ...data import Task, check_task
from ...errors import TorchsliceError
from ...graph.neurons import Neurons, check_neurons
from ...graph.tied import together
from ...slices import Slice
from ...training import predict
from ...training.progress import progress_bar


def allocate(
    neurons: Neurons,
    task: Task,
    levels: Sequence[Slice],
    *,
    param_retention: float,
    samples: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> list[Slice]:
    """Return ever smaller slices, of which every layer is at one of some levels, and the last has few parameters.

    The search is greedy and starts with the whole network. At each step one layer goes on to its next level: the one
    for which this raises the cross entropy on some training samples least, per parameter that it saves. Layers whose
    neurons leave together go on together. A price is measured again on the network as it is cut by then, before it is
    paid. So layers that the network needs keep more than others. Nothing is trained.

    Args:
        levels: ever smaller slices, such as those of `ReachTheta` for a theta that falls, which need not be parts of
            each other. Neurons that leave together are kept together.
        param_retention: of the model's parameters, in (0, 1): what the last slice keeps at most, see `retention`.
        samples: at most so many training samples, drawn by the `seed`, as many of each class as can be.

    Raises TorchsliceError where a level is larger than the one before, or none is small enough.

    >>> levels = [ts.semantic.PerLayer(part / 10).choose(scores).critical for part in (8, 6, 4, 2)]
    >>> path = ts.semantic.allocate(neurons, task, levels, param_retention=0.5, progress=False)
    >>> path[0] == neurons.full(), ts.retention(neurons, path[-1]).param <= 0.5
    (True, True)
    """
    check_neurons(neurons)
    check_task(task, neurons)
    if not 0 < param_retention < 1:
        raise TorchsliceError(f"param_retention must be in (0, 1), got {param_retention:g}.")
    if isinstance(levels, Slice):
        raise TorchsliceError("levels must be several slices, from large to small, in a list; got one slice.")
    for level in levels:
        neurons.check(level)
    levels = [neurons.full(), *map(neurons.closed, levels)]
    if not all(len(after) <= len(before) for before, after in pairwise(levels)):
        raise TorchsliceError("no level may be larger than the one before; give slices from large to small.")
    if (least := retention(neurons, levels[-1]).param) > param_retention:
        raise TorchsliceError(
            f"the smallest level keeps {least:.3g} of the parameters, more than param_retention={param_retention:g}; "
            "give a smaller one as well."
        )
    few, units = task.limit(train=samples, seed=seed), together(neurons.sets)

    def at(depths: Sequence[int]) -> Slice:
        own = {layer: levels[depth][layer] for layers, depth in zip(units, depths, strict=True) for layer in layers}
        return Slice({layer: own[layer] for layer in neurons.layers})

    def figures(slice_: Slice) -> tuple[float, float]:
        logits = predict(extract(neurons, slice_), few, "train", output=neurons.output)
        return float(F.cross_entropy(logits.float(), few.train.labels)), retention(neurons, slice_).param

    depths, path = [0] * len(units), [levels[0]]
    loss, kept = figures(levels[0])
    # price of the next step of a layer, number of steps taken when it was measured, layer, loss and parameters after it
    steps = [(-math.inf, -1, unit, loss, kept) for unit in range(len(units))]
    with progress_bar(progress, total=len(units) * (len(levels) - 1)) as bar:
        while kept > param_retention:
            price, taken, unit, after, left = heapq.heappop(steps)
            deeper = [depth + (other == unit) for other, depth in enumerate(depths)]
            if taken == len(path) - 1:
                depths, loss, kept, taken = deeper, after, left, -1
                path.append(at(depths))
                bar("allocation", f"{kept:.0%} of the parameters, loss {loss:.3f}")
                if depths[unit] + 1 == len(levels):
                    continue
            else:
                after, left = figures(at(deeper))
                price, taken = (after - loss) / max(kept - left, 1e-9), len(path) - 1
            heapq.heappush(steps, (price, taken, unit, after, left))
    return path
