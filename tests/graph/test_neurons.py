"""Neurons as a value: tied to one model, its classes and its structure."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from torch import nn

from tests.battery.zoo import copied, prepared
from tests.graph.nets import IMAGE, Net
from torchslice.cut.extract import extract, masked, retention
from torchslice.cut.widen import widen
from torchslice.errors import TorchsliceError
from torchslice.graph.activations import find_activations
from torchslice.graph.find import find_neurons
from torchslice.graph.views import view_of
from torchslice.slices import Slice

CHANGED = [
    (lambda model: setattr(model, "a", nn.Conv2d(3, 12, 3, padding=1)), "'a' is another module now"),
    (lambda model: setattr(model, "b", nn.Conv2d(12, 8, 3)), r"'b' is Conv2d\(weight \[8, 12, 3, 3\].*and was Conv2d"),
    (lambda model: setattr(model, "head", nn.Identity()), r"'head' is Identity\(\) now and was Linear"),
    (lambda model: setattr(model, "more", nn.ReLU()), r"'more' is ReLU\(\) now and was nothing"),
    (lambda model: setattr(model.a, "weight", nn.Parameter(torch.zeros(9, 3, 3, 3))), r"'a' is Conv2d.*\[9, 3, 3, 3\]"),
]


@pytest.mark.parametrize(("change", "message"), CHANGED)
def test_a_model_that_was_changed_since_is_refused(change, message: str) -> None:
    model = Net().eval()
    neurons = find_neurons(model, IMAGE)
    slice_ = neurons.random(0.5)
    change(model)
    verbs = (extract, masked, retention, lambda n, s: n.check(s), lambda n, s: find_activations(n))
    for verb in (*verbs, lambda n, s: widen(n, factor=2)):
        with pytest.raises(TorchsliceError, match=f"changed after find_neurons: {message}.*Find its neurons again"):
            verb(neurons, slice_)


def test_training_does_not_count_as_a_change() -> None:
    neurons = copied("convnet")
    with torch.no_grad():
        for parameter in neurons.model.parameters():
            parameter.add_(0.01)
    neurons.model.train().requires_grad_(False)
    extract(neurons, neurons.random(0.5))


def test_neurons_of_a_copy_need_no_new_run() -> None:
    neurons = prepared("resnet18")
    other = copy.deepcopy(neurons.model)
    with torch.no_grad():
        other.fc.weight.mul_(2)
    moved, slice_ = neurons.on(other), neurons.random(0.5)
    assert moved.model is other and moved.layers == neurons.layers and neurons.model is not other
    assert torch.equal(extract(moved, slice_).fc.weight, 2 * extract(neurons, slice_).fc.weight)
    other.fc = nn.Linear(512, 10)
    with pytest.raises(TorchsliceError, match="'fc' is another module now"):
        extract(moved, slice_)
    extract(neurons, slice_)


def test_neurons_of_another_structure_are_refused() -> None:
    with pytest.raises(TorchsliceError, match="this network is not the one whose neurons were found: 'b' is"):
        model = Net()
        model.b = nn.Conv2d(12, 8, 3)
        find_neurons(Net(), IMAGE).on(model)


def test_classes_by_name_and_by_index() -> None:
    neurons = find_neurons(Net(), IMAGE, classes=["ant", "bee", "cat", "dog"])
    assert neurons.class_indices(["dog", "ant"]) == [0, 3] == neurons.class_indices([3, "ant"])
    assert neurons.classes == ("ant", "bee", "cat", "dog")
    for classes, text in [
        (["catt"], "unknown class 'catt'. Did you mean 'cat'"),
        ([], "classes must be different names, or indices in 0..3; got"),
        (["cat", 2], "must be different names"),
        ([4], r"0\.\.3; got \[4\]"),
        ([-1], r"0\.\.3; got \[-1\]"),
        ([1.5, 2], r"got \[1.5, 2\]"),
        ([True, 2], r"got \[True, 2\]"),
    ]:
        with pytest.raises(TorchsliceError, match=text):
            neurons.class_indices(classes)
    with pytest.raises(TorchsliceError, match="the classes of this model have no names. Give indices in 0..3"):
        find_neurons(Net(), IMAGE).class_indices(["cat"])


def test_full_none_and_random_slices() -> None:
    neurons = prepared("convnet")
    full = neurons.full()
    assert len(full) == len(neurons) == full.total and full.layers == {n: x.count for n, x in neurons.layers.items()}
    assert neurons.none() == ~full and not neurons.none()
    half = neurons.random(0.5, seed=1)
    assert half == neurons.random(0.5, seed=1) != neurons.random(0.5, seed=2) and half.neuron_retention == 0.5
    assert not neurons.random(0.001).empty_layers() and neurons.random(1.0) == full
    for fraction in (0, 1.5):
        with pytest.raises(TorchsliceError, match=r"neuron_fraction must be in \(0, 1\]"):
            neurons.random(fraction)


def test_bad_slices() -> None:
    neurons = find_neurons(Net(), IMAGE)
    for slice_, text in [
        (prepared("unknown").full(), "slice of another model: layer 'a' has no neurons in the slice and 12 in the"),
        (neurons.none(), "the slice is empty; every layer needs at least one neuron"),
        (Slice({"a": torch.zeros(12).bool(), "b": torch.ones(6).bool()}), "keeps no neuron of layer 'a'"),
    ]:
        for verb in (extract, masked, retention):
            with pytest.raises(TorchsliceError, match=text):
                verb(neurons, slice_)


def test_other_things_are_named() -> None:
    neurons = prepared("mlp")
    for verb in (extract, masked, retention):
        with pytest.raises(TorchsliceError, match=r"expected neurons, got MLP.*find_neurons\(model, example\)"):
            verb(neurons.model, neurons.full())
        with pytest.raises(TorchsliceError, match="expected a Slice, got NoneType"):
            verb(neurons, None)


def test_it_prints_as_a_table() -> None:
    text = str(prepared("mobilenet_v2"))
    assert text == repr(prepared("mobilenet_v2")) and max(map(len, text.splitlines())) <= 120
    assert "9920 neurons in 35 layers; 17 layers follow, 1 are pinned" in text
    assert "follows features.2.conv.0.0" in text and "classifier.1" in text
    assert "and 3 more" in str(prepared("resnet50"))


class Remembers(nn.Module):
    """Attributes of many kinds; an LSTM keeps its weights in a list too and says itself how it is copied."""

    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        self.conv, self.mix, self.head = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 1), nn.Linear(5, 4)
        self.last = nn.LSTM(8, 5, batch_first=True) if recurrent else nn.Linear(8, 5)
        self.counts, self.seen, self.again = defaultdict(list), {"conv": self.conv}, [self.conv.weight]
        self.__dict__["alias"] = self.conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.counts["calls"].append(1)
        x = self.last(self.mix(torch.relu(self.alias(x))).transpose(1, 2).sort().values)
        return self.head((x if isinstance(x, torch.Tensor) else x[0])[:, -1])


@pytest.mark.parametrize("recurrent", [True, False])
def test_a_copy_is_a_deep_copy(recurrent: bool) -> None:
    model, x = Remembers(recurrent).eval(), torch.randn(2, 3, 9)
    neurons, weight = find_neurons(model, x), "weight_ih_l0" if recurrent else "weight"
    assert not model.counts and "last" in {**neurons.pinned, **neurons.layers}
    for made in (extract(neurons, neurons.full()), widen(neurons, counts={"conv": 2}).model):
        assert made.alias is made.conv is made.seen["conv"] and made.again[0] is made.conv.weight
        assert getattr(made.last, weight) is not getattr(model.last, weight)
        with torch.no_grad():
            before = made(x)
            getattr(made.last, weight).zero_()
            assert not torch.equal(made(x), before) and torch.allclose(model(x), before, atol=1e-6)
        assert made.counts["calls"] and not made.counts["other"]
        assert made.double()(x.double()).dtype == torch.float64
        model.counts.clear()
    view = view_of(model)
    assert view.alias is view.conv is view.seen["conv"] is not model.conv and view.again[0] is model.conv.weight


def test_a_view_shares_all_tensors_and_nothing_else() -> None:
    model = prepared("reused").model
    view = view_of(model)
    assert [type(m) for m in view.modules()] == [type(m) for m in model.modules()]
    assert not {id(m) for m in view.modules()} & {id(m) for m in model.modules()}
    assert [id(p) for p in view.parameters()] == [id(p) for p in model.parameters()]
    assert [id(b) for b in view.buffers()] == [id(b) for b in model.buffers()]
    view.train().inner.register_forward_hook(lambda *_: None)
    assert not model.training and not model.inner._forward_hooks
