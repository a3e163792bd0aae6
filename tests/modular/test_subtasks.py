"""Sub-task training: what is trained is what is cut, nothing else moves, and it works end to end."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.core.architectures import ARCHITECTURES, make
from torch import nn

from torchslice.core.find import find_neurons
from torchslice.core.hold import holding
from torchslice.core.surgery import plan
from torchslice.modular.subtasks import SubTasks
from torchslice.slices import union

CLASSES = (1, 4, 7)
RANDOM = ("efficientnet_b0", "convnext_tiny")  # they leave out whole blocks at random while training


def subtasks(name):
    """A network in float64 and training mode without dropout, an objective with random slices, and a batch."""
    model, example = make(name)
    model, example = model.double(), example.double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    neurons = find_neurons(model, example)
    slices = {str(label): neurons.random(0.3, seed=label) for label in range(neurons.classes)}
    model.train()
    return model, SubTasks(model, slices, example), torch.cat([example] * 3)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in RANDOM])
def test_scores_and_gradients_are_those_of_the_network_held_to_the_slices(name):
    model, objective, images = subtasks(name)
    before = {where: buffer.clone() for where, buffer in model.named_buffers()}
    reference = copy.deepcopy(model)
    part = union(objective.slices[label] for label in CLASSES)
    with holding(reference, plan(objective.neurons, part).held):
        expected = reference(images)[:, list(CLASSES)]
    actual = objective.logits(model, images, CLASSES)
    assert (actual - expected).abs().max() <= 1e-9 * expected.abs().max()
    for logits in (actual, expected):
        F.cross_entropy(logits, torch.arange(len(logits)) % 3).backward()
    largest = max(p.grad.abs().max() for p in reference.parameters() if p.grad is not None)
    for (where, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        mine, theirs = (torch.zeros_like(x) if x.grad is None else x.grad for x in (p, q))
        assert (mine - theirs).abs().max() <= 1e-9 * largest, where
    for where, buffer in model.named_buffers():
        assert torch.equal(buffer, before[where]), where
