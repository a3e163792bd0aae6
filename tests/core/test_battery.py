"""Every architecture x every kind of slice x every invariant."""

from __future__ import annotations

import copy
import pickle
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from tests.core.architectures import ARCHITECTURES, make
from torchslice.core.find import find_neurons
from torchslice.core.hold import masked
from torchslice.core.neurons import Neurons
from torchslice.slices import Slice
from torchslice.use.costs import cost
from torchslice.use.extract import extract, retention

CLASSES = [1, 4, 9]


def few(neurons: Neurons, count: int) -> Slice:
    """Keep `count` neurons, spread out, in every other layer, and everything elsewhere."""
    masks = neurons.full().masks
    for name in list(neurons.layers)[::2]:
        keep = torch.linspace(0, neurons.layers[name].count - 1, count).round().long()
        masks[name] = torch.zeros_like(masks[name]).index_fill_(0, keep, True)
    return Slice(masks)


SLICES = {
    "half": lambda neurons: neurons.random(0.5, seed=1),
    "tenth": lambda neurons: neurons.random(0.1, seed=2),
    "one": lambda neurons: few(neurons, 1),
    "three": lambda neurons: few(neurons, 3),
}


@cache
def prepared(name: str) -> tuple[nn.Module, Tensor, Neurons]:
    model, example = make(name)
    return model, example, find_neurons(model, example)


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


@pytest.mark.parametrize("kind", SLICES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_masked_equals_extracted(name: str, kind: str) -> None:
    model, example, neurons = prepared(name)
    part = SLICES[kind](neurons)
    inputs = torch.cat([example, torch.randn_like(example)])  # also inputs that extract did not see
    small = extract(model, part, example)
    chosen = extract(model, part, example, classes=CLASSES)
    with torch.no_grad():
        whole = model(inputs)
        with masked(model, part, example):
            held = model(inputs)
        assert difference(whole, held) > 1e-3, "holding the neurons changes nothing, so this test would show nothing"
        assert difference(small(inputs), held) <= 1e-5
        assert difference(chosen(inputs), held[:, CLASSES]) <= 1e-5
        assert torch.equal(model(inputs), whole)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_full_slice_is_the_identity(name: str) -> None:
    model, example, neurons = prepared(name)
    with torch.no_grad():
        assert torch.equal(extract(model, neurons.full(), example)(example), model(example))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_model_is_left_alone_and_the_copy_is_plain(name: str) -> None:
    model, example, neurons = prepared(name)
    before = copy.deepcopy(model.state_dict())
    model.train()
    small = extract(model, neurons.random(0.5), example)
    assert all(module.training for module in model.modules())
    assert all(module.training for module in small.modules())
    model.eval()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in model.parameters()}
    for own in (model, small):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in own.modules())
    for module in small.modules():  # the layers say of themselves what they are
        if isinstance(module, nn.Conv2d):
            assert list(module.weight.shape[:2]) == [module.out_channels, module.in_channels // module.groups]
        if isinstance(module, nn.Linear):
            assert list(module.weight.shape) == [module.out_features, module.in_features]
        if isinstance(module, nn.BatchNorm2d):
            assert len(module.weight) == module.num_features == len(module.running_mean)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_retention_counts_the_network_that_is_built(name: str) -> None:
    model, example, neurons = prepared(name)
    part = neurons.random(0.5, seed=1)
    kept = retention(model, neurons, part, classes=CLASSES)
    small = extract(model, part, example, classes=CLASSES)
    share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert kept.built_param == pytest.approx(share, abs=1e-12)
    if name != "vit":  # attention multiplies activations, which retention does not count
        assert kept.built_mac == pytest.approx(cost(small, example).macs / cost(model, example).macs, abs=1e-12)
    assert kept.param <= kept.built_param + 1e-12 and kept.mac <= kept.built_mac + 1e-12
    assert retention(model, neurons, neurons.full()).param == retention(model, neurons, neurons.full()).built_mac == 1


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "gated"])
def test_double_precision_shows_that_the_cut_is_exact(name: str) -> None:
    model, example = make(name, torch.float64)
    part = find_neurons(model, example).random(0.5, seed=1)
    with torch.no_grad(), masked(model, part, example):
        held = model(example)
    with torch.no_grad():
        assert difference(extract(model, part, example)(example), held) <= 1e-12


@pytest.mark.parametrize("name", ["resnet18", "vit", "gated"])
def test_extracting_again_from_an_extracted_network(name: str) -> None:
    model, example, neurons = prepared(name)
    once = extract(model, neurons.random(0.6, seed=1), example)
    again = find_neurons(once, example)
    assert len(again) < len(neurons)
    part = again.random(0.6, seed=2)
    with torch.no_grad(), masked(once, part, example):
        held = once(example)
    with torch.no_grad():
        assert difference(extract(once, part, example)(example), held) <= 1e-5


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vit"])
def test_the_extracted_network_exports_compiles_and_pickles(name: str) -> None:
    model, example, neurons = prepared(name)
    small = extract(model, neurons.random(0.5), example)
    with torch.no_grad():
        expected = small(example)
        assert torch.equal(pickle.loads(pickle.dumps(small))(example), expected)
        assert difference(torch.export.export(small, (example,)).module()(example), expected) <= 1e-6
        assert difference(torch.compile(small, backend="eager")(example), expected) <= 1e-6


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "unknown"])
def test_the_extracted_network_trains(name: str) -> None:
    model, example, neurons = prepared(name)
    small = extract(model, neurons.random(0.5), example).train()
    small(torch.cat([example, example])).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())
    assert all(p.grad is None for p in model.parameters())
