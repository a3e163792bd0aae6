import pytest
import torch

from torchslice.core.find import find_neurons
from torchslice.core.hold import masked
from torchslice.errors import TorchsliceError
from torchslice.slices import Slice
from torchslice.use.evaluate import accuracy, predict_logits
from torchslice.use.extend import extend
from torchslice.use.extract import extract
from torchslice.use.finetune import finetune
from torchslice.use.settle import settle

from .nets import Tiny, five_stripes, lively, stripes

QUIET = {"batch_size": 30, "precision": "fp32", "device": "cpu", "progress": False}
DATA = stripes()
PART = Slice({"conv1": torch.arange(8) < 4, "conv2": torch.arange(6) < 4})


def test_the_slice_learns_to_answer_alone_and_the_others_stay():
    model = finetune(lively(Tiny()), DATA, epochs=6, learning_rate=0.1, **QUIET).model
    found = accuracy(extract(model, PART, DATA.example), DATA, split="validation").overall
    settled = settle(model, PART, DATA, epochs=8, learning_rate=0.1, **QUIET)
    assert settled.validation_accuracy[0] == found < settled.validation_accuracy[settled.best_epoch] - 0.1
    alone = accuracy(extract(settled.model, PART, DATA.example), DATA, split="validation").overall
    assert alone == settled.validation_accuracy[settled.best_epoch]
    before, after = model.state_dict(), settled.model.state_dict()
    for key, mask in (
        ("conv1.weight", PART["conv1"]),
        ("norm2.bias", PART["conv2"]),
        ("norm2.running_var", PART["conv2"]),
    ):
        old, new = before[key], after[key]
        assert torch.equal(old[~mask], new[~mask]) and not torch.equal(old[mask], new[mask])
    assert not torch.equal(before["head.weight"], after["head.weight"])
    assert settled.model.classes == DATA.classes
    with torch.no_grad(), masked(settled.model, PART, DATA.example):
        held = settled.model(DATA.example)
    with torch.no_grad():
        assert (settled.model(DATA.example) - held).abs().max() > 1e-3


def test_an_extended_network_settles_on_its_last_task():
    data = five_stripes()
    old, new = data.restrict(data.classes[:3]), data.restrict(data.classes[3:])
    first = PART & Slice({"conv1": torch.arange(8) < 2, "conv2": torch.arange(6) < 2})
    extended = extend(lively(Tiny()), first, new, classes=old.classes, epochs=2, **QUIET)
    before, state = predict_logits(extended.network(0), old), extended.model.state_dict()
    settled = settle(extended, PART, new, epochs=6, learning_rate=0.1, **QUIET)
    assert settled.best_epoch > 0 and settled.model.classes == data.classes
    assert torch.equal(predict_logits(extended.on(settled.model).network(0), old), before)
    changed = {key for key, tensor in settled.model.state_dict().items() if not torch.equal(tensor, state[key])}
    assert {"conv1.weight", "norm2.running_mean", "head.weight"} <= changed
    assert torch.equal(settled.model.head.weight[:3], extended.model.head.weight[:3])
    with pytest.raises(
        TorchsliceError, match="the last task is broad green, broad blue; give its data alone, not those"
    ):
        settle(extended, PART, old, **QUIET)
    with pytest.raises(
        TorchsliceError, match="the slice leaves out 4 neurons through which red, green, blue are answered"
    ):
        settle(extended, ~PART, new, **QUIET)


def test_wrong_use():
    model = lively(Tiny())
    with pytest.raises(TorchsliceError, match="the slice is empty; every layer needs at least one neuron"):
        settle(model, find_neurons(model, DATA.example).none(), DATA, **QUIET)
    with pytest.raises(TorchsliceError, match="there is a single class, 'red', and nothing to tell it from"):
        settle(lively(Tiny(1)), PART, DATA.restrict(["red"]), **QUIET)
