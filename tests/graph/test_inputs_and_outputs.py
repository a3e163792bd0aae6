"""Any tree of inputs, any result with logits; and what cannot be followed is refused before anything else."""

from __future__ import annotations

import re
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.battery.zoo import Dictionary, TwoInputs, prepared
from tests.graph.nets import IMAGE, Does, Net
from torchslice.cut.extract import extract, masked
from torchslice.errors import TorchsliceError
from torchslice.graph.find import check_assumptions, find_neurons

BOTH = {"image": IMAGE, "attributes": torch.randn(2, 5)}


def test_tuples_and_dictionaries_find_the_same_neurons() -> None:
    model = TwoInputs()
    by_place, by_name = find_neurons(model, tuple(BOTH.values())), find_neurons(model, BOTH)
    assert by_place.layers == by_name.layers == find_neurons(model, list(BOTH.values())).layers
    assert list(by_place.layers) == ["conv1", "conv2", "attributes", "hidden"]
    with torch.no_grad():
        assert torch.equal(by_place.logits(by_place.example), by_name.logits(by_name.example))


def test_nested_inputs_and_values_that_are_no_tensors() -> None:
    model = Does(lambda self, x: self.logits(x["images"][0]) * (2 if x["double"] else 1))
    neurons = find_neurons(model, ({"images": [IMAGE], "double": True},))
    assert list(neurons.layers) == ["conv"]
    extract(neurons, neurons.random(0.5))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: {"logits": logits, "loss": logits.sum()},
        lambda logits: SimpleNamespace(logits=logits, loss=None),
        lambda logits: logits,
    ],
)
def test_logits_are_found_in_what_models_usually_return(wrap) -> None:
    neurons = find_neurons(Does(lambda self, x: wrap(self.logits(x))), IMAGE)
    slice_ = neurons.random(0.5)
    assert neurons.num_classes == 4 and neurons.logits(IMAGE).shape == (2, 4)
    result = extract(neurons, slice_)(IMAGE)
    assert type(result) is type(neurons.model(IMAGE)) and type(masked(neurons, slice_)(IMAGE)) is type(result)


def test_output_says_where_else_they_are() -> None:
    model = Does(lambda self, x: ("features", [self.logits(x)]))
    neurons = find_neurons(model, IMAGE, output=lambda result: result[1][0])
    assert neurons.logits(IMAGE).shape == (2, 4)
    small = extract(neurons, neurons.random(0.5), classes=[0, 2])
    assert small(IMAGE)[0] == "features" and small(IMAGE)[1][0].shape == (2, 2)


def branch(self: Does, x: torch.Tensor) -> torch.Tensor:
    return self.logits(x) if self.conv(x).sum() > 0 else self.logits(-x)


def silent(self: Does, x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError


@pytest.mark.parametrize(
    ("model", "example", "text"),
    [
        (Does(branch), IMAGE, "reads a tensor's value into Python"),
        (Does(lambda self, x: self.logits(x) * self.conv(x).mean().item()), IMAGE, "value into Python (item)"),
        (Does(lambda self, x: self.conv(x)), IMAGE, "must return logits [B, C] for a batch of 2; it returned a tensor"),
        (Does(lambda self, x: self.logits(x)[:1]), IMAGE, "it returned a tensor float32 [1, 4]"),
        (Does(lambda self, x: (self.logits(x), x)), IMAGE, "Say where they are: output=lambda result: result[0]"),
        (Does(lambda self, x: {"scores": self.logits(x)}), IMAGE, "in which the logits [B, C] are not known"),
        (
            Does(Does.logits),
            torch.randn(2, 5, 8, 8),
            "cannot run on the example (a tensor float32 [2, 5, 8, 8]): 'conv'",
        ),
        (Does(Does.logits), torch.tensor(3.0), "inputs must be tensors with the samples on their first axis"),
        (Does(Does.logits), "cat.png", "got str cat.png"),
        (Does(Does.logits), torch.randn(0, 3, 8, 8), "no samples"),
        (Does(Does.logits), {}, "a tuple or a dictionary of tensors; got {}"),
        (Does(silent), IMAGE, "'its forward' says: RuntimeError."),
        (TwoInputs(), IMAGE, "missing 1 required positional argument"),
        (TwoInputs(), {"image": IMAGE, "attribute": torch.randn(2, 5)}, "unexpected keyword argument 'attribute'"),
        (TwoInputs(), (IMAGE, torch.randn(3, 5)), "same number of samples; inputs[0] has 2, inputs[1] has 3"),
        (Dictionary(), (IMAGE, torch.randn(2, 5)), "takes 1 positional argument"),
        (nn.DataParallel(Does(Does.logits)), IMAGE, "wrapped (DataParallel); pass model.module"),
        (torch.compile(Does(Does.logits), backend="eager"), IMAGE, "wrapped (OptimizedModule); pass model._orig_mod"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), IMAGE, "has no shape yet"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), IMAGE, "no neuron of this model can be cut (1: "),
        (lambda x: x, IMAGE, "expected an nn.Module, got function"),
    ],
)
def test_refused_with_a_reason(model, example, text: str) -> None:
    with pytest.raises(TorchsliceError, match=re.escape(text)) as caught:
        find_neurons(model, example)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [["a", "b", "c"], ["a", "b", "c", "c"], list("abcde")])
def test_classes_are_named_each_once(names) -> None:
    with pytest.raises(TorchsliceError, match="the model has 4 logits, and . different classes are named"):
        find_neurons(Net(), IMAGE, classes=names)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_parts_are_refused() -> None:
    doubled = torch.jit.trace(lambda x: x * 2, IMAGE)
    with pytest.raises(TorchsliceError, match="no visible torch function made"):
        find_neurons(Does(lambda self, x: self.logits(doubled(x))), IMAGE)
    with pytest.raises(TorchsliceError, match="ScriptModule"):
        find_neurons(torch.jit.trace(Net().eval(), IMAGE), IMAGE)


@pytest.mark.parametrize("thing", [threading.Lock(), [torch.ones(1, requires_grad=True) * 2]])
def test_models_that_cannot_be_copied_are_refused(thing) -> None:
    model = Net().eval()
    model.thing = thing
    with pytest.raises(TorchsliceError, match="the model cannot be copied"):
        find_neurons(model, IMAGE)


def test_inside_inference_mode() -> None:
    with torch.inference_mode(), pytest.raises(TorchsliceError, match=r"inside torch.inference_mode\(\); leave that"):
        find_neurons(Net().eval(), IMAGE)


def test_nothing_is_left_behind_after_a_refusal() -> None:
    model = Net().train()
    with pytest.raises(TorchsliceError):
        find_neurons(model, torch.randn(2, 4, 8, 8))
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_values_of_tokens_are_followed() -> None:
    assert list(prepared("tokens").layers) == ["conv", "hidden"]
    assert prepared("tokens").pinned["embedding"]


class Asks(Net):
    """It looks at its input, and sorts the channels of bright ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.a(x))
        y = y.sort(1).values if x.sum() > 0 else y
        return self.head(torch.relu(self.b(y)).mean((2, 3)) * (1 if x.mean() < 9 else 2))


def test_what_is_read_from_the_input_is_assumed_and_looked_at_again() -> None:
    dark = -IMAGE.abs()
    neurons = find_neurons(Asks().eval(), dark)
    assert [(a.module, a.function, a.value) for a in neurons.assumptions] == [("", "bool", False), ("", "bool", True)]
    assert list(neurons.layers) == ["a", "b"] and "bool of a value in 'its forward' is False" in str(neurons)
    check_assumptions(neurons, dark * 2)
    check_assumptions(neurons, dark - 100)
    check_assumptions(neurons, torch.cat([dark, dark]))
    with pytest.raises(TorchsliceError, match=r"does something else \(bool of a value in 'its forward' is True\), and"):
        check_assumptions(neurons, -dark)
    small = extract(neurons, neurons.random(0.5))  # what it assumes is looked at by the code of both networks
    with torch.no_grad():
        assert torch.allclose(small(dark - 100), masked(neurons, neurons.random(0.5))(dark - 100), atol=1e-4)


def test_a_run_without_values_is_not_trusted_with_values() -> None:
    neurons = find_neurons(Does(lambda self, x: self.logits(x) * float(x.detach().abs().max() > 0)), IMAGE)
    assert [a.value for a in neurons.assumptions] == [1.0] and list(neurons.layers) == ["conv"]
