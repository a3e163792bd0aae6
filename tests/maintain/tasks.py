"""Tasks for the tests of maintenance, and quick settings."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tests.nets import stripes
from torchslice.data import Images, Stored, Task, joined
from torchslice.data import task as make_task
from torchslice.graph.neurons import Neurons
from torchslice.inputs import map_tensors
from torchslice.training import Training

QUICK = Training(epochs=1, batch_size=30, device="cpu", precision="fp32", progress=False)


def quick(**changes: object) -> Training:
    return replace(QUICK, **changes)


def noise(neurons: Neurons, *, classes: int = 10, count: int = 20) -> Task:
    """Random inputs of the kind that a network takes."""

    def more(tensor: Tensor) -> Tensor:
        shape = (count, *tensor.shape[1:])
        return torch.randn(shape) if tensor.is_floating_point() else torch.randint(int(tensor.max()) + 1, shape)

    split = Stored(map_tensors(more, neurons.sample), torch.arange(count) % classes)
    return make_task(split, split, split, name="noise", classes=[f"class {c}" for c in range(classes)])


def five_stripes() -> Task:
    """The three classes of stripes, and two with stripes twice as wide."""
    narrow, wide = stripes(), stripes(seed=1).restrict(["green", "blue"])

    def broad(split: Images) -> Images:
        images = split.images.repeat_interleave(2, -1)[..., 4:12].repeat_interleave(2, -2)[..., 4:12, :]
        return replace(split, images=images)

    splits = {name: broad(wide.split(name)) for name in ("train", "validation", "test")}
    return joined(narrow, replace(wide, classes=("broad green", "broad blue"), **splits))
