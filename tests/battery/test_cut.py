"""Cutting: every network x every kind of slice x every invariant."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.battery.slices import SLICES
from tests.battery.zoo import NETWORKS, copied, logits, make, prepared, unseen
from torchslice.cut.extract import extract, masked, retention
from torchslice.cut.widen import grow, last_wire, why_fixed, widen
from torchslice.graph.find import find_neurons
from torchslice.graph.neurons import Neurons
from torchslice.graph.plan import plan
from torchslice.inputs import batch_size
from torchslice.training import cost

CLASSES = [1, 4, 9]
EXACT = ["two inputs", "tokens", "gated", "resnet18", "mobilenet_v2", "densenet121"]
EXACT += ["parts", "heads", "bert", "gpt2", "llama", "swin", "vit"]


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def contents(model: nn.Module) -> list[object]:
    """Everything that the modules of a model hold: tensors by identity and version, the rest as text."""
    entries = [(name, key, thing) for name, module in model.named_modules() for key, thing in vars(module).items()]
    entries += [
        (name, key, thing) for name, _, group in entries if isinstance(group, dict) for key, thing in group.items()
    ]
    plain = [entry for entry in entries if not isinstance(entry[2], dict | nn.Module)]
    return [(*entry, entry[2]._version) if isinstance(entry[2], Tensor) else repr(entry) for entry in plain]


@pytest.mark.parametrize("kind", SLICES)
@pytest.mark.parametrize("name", NETWORKS)
def test_masked_equals_extracted(name: str, kind: str) -> None:
    neurons = prepared(name)
    slice_, inputs = SLICES[kind](neurons), unseen(neurons.example)
    small, chosen = extract(neurons, slice_), extract(neurons, slice_, classes=CLASSES)
    whole, held = logits(neurons.model, inputs), logits(masked(neurons, slice_), inputs)
    assert difference(whole, held) > 1e-3, "holding the neurons changes nothing, so this test would show nothing"
    assert difference(logits(small, inputs), held) <= 1e-5
    assert difference(logits(chosen, inputs), held[:, CLASSES]) <= 1e-5
    assert torch.equal(logits(neurons.model, inputs), whole)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_full_slice_is_the_identity(name: str) -> None:
    neurons = prepared(name)
    expected = logits(neurons.model, neurons.example)
    for network in (extract(neurons, neurons.full()), masked(neurons, neurons.full())):
        assert torch.equal(logits(network, neurons.example), expected)
    kept = retention(neurons, neurons.full())
    assert (kept.neuron, kept.param, kept.mac, kept.built_param, kept.built_mac) == (1, 1, 1, 1, 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_model_is_left_alone(name: str) -> None:
    neurons = prepared(name)
    model, slice_ = neurons.model, neurons.random(0.5)
    before, state, random = contents(model), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    extract(neurons, slice_, classes=CLASSES)
    masked(neurons, slice_)
    retention(neurons, slice_)
    find_neurons(model, neurons.example)
    assert contents(model) == before
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_copy_is_made_of_plain_layers_that_say_what_they_are(name: str) -> None:
    neurons = copied(name)
    model = neurons.model.train()
    small = extract(neurons, neurons.random(0.5))
    assert all(module.training for module in (*model.modules(), *small.modules()))
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    for module in small.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            assert list(module.weight.shape[:2]) == [module.out_channels, module.in_channels // module.groups]
        if isinstance(module, nn.Linear):
            assert list(module.weight.shape) == [module.out_features, module.in_features]
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert len(module.weight) == module.num_features == len(module.running_mean)


@pytest.mark.parametrize("name", NETWORKS)
def test_retention_counts_the_network_that_is_built(name: str) -> None:
    neurons = prepared(name)
    model, example, slice_ = neurons.model, neurons.example, neurons.random(0.5, seed=1)
    kept = retention(neurons, slice_, classes=CLASSES)
    small = extract(neurons, slice_, classes=CLASSES)
    fraction = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert kept.built_param == pytest.approx(fraction, abs=1e-12) and kept.neuron == slice_.neuron_retention
    if all(layer.kind != "heads" for layer in neurons.layers.values()):  # whose products retention does not count
        assert kept.built_mac == pytest.approx(cost(small, example).macs / cost(model, example).macs, abs=1e-12)
    assert kept.param <= kept.built_param + 1e-12 and kept.mac <= kept.built_mac + 1e-12


def overwrite_outside(neurons: Neurons, slice_) -> None:
    """Give the neurons outside a slice other weights, biases and statistics."""
    for name, held in plan(neurons, slice_).held.items():
        module, rows = neurons.model.get_submodule(name), torch.from_numpy(held)
        for key, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and tensor.dim():
                of_rows = tensor.data.movedim(neurons.flow.ports[name].row_axis(key), 0)
                of_rows[rows] = of_rows[rows].flip(0) * 0.9 + 0.01


@pytest.mark.parametrize("name", NETWORKS)
def test_the_other_half_plays_no_part_to_the_bit(name: str) -> None:
    neurons, changed = prepared(name), copied(name)
    slice_ = neurons.random(0.5, seed=3)
    overwrite_outside(changed, slice_)
    assert difference(logits(changed.model, neurons.example), logits(neurons.model, neurons.example)) > 1e-3
    one, other = extract(neurons, slice_).state_dict(), extract(changed, slice_).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize("name", EXACT)
def test_double_precision_shows_that_the_cut_is_exact(name: str) -> None:
    neurons = find_neurons(*make(name, torch.float64))
    slice_, inputs = neurons.random(0.5, seed=1), unseen(neurons.example)
    held = logits(masked(neurons, slice_), inputs)
    assert held.dtype == torch.float64
    assert difference(logits(extract(neurons, slice_), inputs), held) <= 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_a_wider_network_computes_the_same_until_its_new_channels_are_read(name: str) -> None:
    neurons = prepared(name)
    model, example = neurons.model, neurons.example
    layers = [layer for layer in neurons.layers if why_fixed(neurons, layer) is None]
    extra = {last_wire(neurons, layer): 3 for layer in layers} | {last_wire(neurons, neurons.head[0]): 2}
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    wide, expected = grow(neurons, extra, seed=0), logits(model, example)
    scores = logits(wide, example)
    assert scores.shape == (batch_size(example), 12) and torch.allclose(scores[:, :10], expected, atol=1e-5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [type(module) for module in wide.modules()] == [type(module) for module in model.modules()]
    found = find_neurons(wide, example)  # what is new can be cut like the rest
    wider = {layer: found.layers[layer].count - neurons.layers[layer].count for layer in neurons.layers}
    assert all(wider[layer] >= 3 for layer in layers) and found.layers.keys() == neurons.layers.keys()
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert not torch.allclose(logits(wide, example)[:, :10], expected, atol=1e-3)


@pytest.mark.parametrize("name", ["two inputs", "tokens", "reused", "mobilenet", "resnet18", "densenet121", "vit"])
def test_slices_are_found_again_in_a_wider_network_to_the_bit(name: str) -> None:
    neurons = prepared(name)
    slice_, wide = neurons.random(0.5, seed=1), widen(neurons, factor=1.1)
    one, other = extract(neurons, slice_), extract(wide.neurons, wide.lift(slice_))
    assert torch.equal(logits(one, neurons.example), logits(other, neurons.example))
    assert len(wide.lift(slice_)) == len(slice_) and not wide.lift(slice_) & wide.fresh


@pytest.mark.parametrize("name", ["two inputs", "resnet18", "vit", "gated", "parts", "bert", "gpt2", "llama", "swin"])
def test_an_extracted_network_is_cut_again(name: str) -> None:
    neurons = prepared(name)
    again = find_neurons(extract(neurons, neurons.random(0.6, seed=1)), neurons.example)
    assert len(again) < len(neurons)
    slice_ = again.random(0.6, seed=2)
    held = logits(masked(again, slice_), again.example)
    assert difference(logits(extract(again, slice_), again.example), held) <= 1e-5


@pytest.mark.parametrize("name", ["two inputs", "dictionary", "resnet18", "mobilenet", "vit", "heads", "bert"])
def test_an_extracted_network_exports_compiles_and_pickles(name: str) -> None:
    neurons = prepared(name)
    small, example = extract(neurons, neurons.random(0.5)), neurons.example
    expected = logits(small, example)
    args, named = (), example
    if not isinstance(example, dict):
        args, named = (example if isinstance(example, tuple) else (example,)), {}
    with torch.no_grad():
        assert torch.equal(logits(pickle.loads(pickle.dumps(small)), example), expected)
        assert difference(logits(torch.export.export(small, args, named).module(), example), expected) <= 1e-6
        assert difference(logits(torch.compile(small, backend="eager"), example), expected) <= 1e-6


@pytest.mark.parametrize("name", ["two inputs", "tokens", "resnet18", "mobilenet_v2", "unknown"])
def test_an_extracted_network_trains(name: str) -> None:
    neurons = prepared(name)
    small = extract(neurons, neurons.random(0.5)).train()
    replace(neurons, model=small).logits(unseen(neurons.example)).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())
    assert all(p.grad is None for p in neurons.model.parameters())
