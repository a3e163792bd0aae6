"""torch-pruning, an independent implementation, cuts the same channels and gets the same network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tests.core.architectures import make
from torchslice.core.find import find_neurons
from torchslice.slices import Slice
from torchslice.use.extract import extract

tp = pytest.importorskip("torch_pruning")


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18", "resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0"])
@pytest.mark.filterwarnings("ignore")
def test_the_same_channels_give_the_same_network(name: str) -> None:
    model, example = make(name)
    neurons = find_neurons(model, example)
    theirs = copy.deepcopy(model)
    graph = tp.DependencyGraph().build_dependency(theirs, example_inputs=example)
    masks = neurons.full().masks
    wires = neurons.wires
    done: set[str] = set()
    for number, layer in enumerate(neurons.layers.values()):
        if layer.name in done or number % 3:
            continue
        drop = list(range(0, layer.count, 3))
        gone = wires[neurons.flow.ports[layer.name].outs][drop]
        for other in (layer.name, *layer.coupled):  # torch-pruning knows no part of a coupled channel: take all of it
            masks[other][torch.from_numpy(np.isin(wires[neurons.flow.ports[other].outs], gone))] = False
            done.add(other)
        module = theirs.get_submodule(layer.name)
        function = tp.prune_linear_out_channels if isinstance(module, nn.Linear) else tp.prune_conv_out_channels
        graph.get_pruning_group(module, function, idxs=drop).prune()
    ours = extract(model, Slice(masks), example)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key
    assert sum(p.numel() for p in ours.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(ours(example), theirs.eval()(example))
