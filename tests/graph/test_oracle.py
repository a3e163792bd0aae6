"""torch-pruning, an independent implementation, cuts the same channels and gets the same network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tests.battery.zoo import prepared
from torchslice.cut.extract import extract
from torchslice.slices import Slice

tp = pytest.importorskip("torch_pruning")


@pytest.mark.parametrize("name", ["vgg16", "resnet18", "resnet50", "mobilenet_v2", "preactivation", "efficientnet_b0"])
@pytest.mark.filterwarnings("ignore")
def test_the_same_channels_give_the_same_network(name: str) -> None:
    neurons = prepared(name)
    model, example, wires = neurons.model, neurons.example, neurons.wires
    theirs = copy.deepcopy(model)
    graph = tp.DependencyGraph().build_dependency(theirs, example_inputs=example)
    masks = neurons.full().masks
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
    ours = extract(neurons, Slice(masks))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key
    assert sum(p.numel() for p in ours.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(ours(example), theirs.eval()(example))
