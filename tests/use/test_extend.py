"""Extending forgets nothing, learns something, and refuses what cannot be."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.core.architectures import make
from torch import nn

from torchslice import models
from torchslice.core.find import find_neurons
from torchslice.data import Data, Split
from torchslice.errors import TorchsliceError
from torchslice.slices import Slice
from torchslice.use.artefacts import load, read_record
from torchslice.use.controls import random_like, reinitialised
from torchslice.use.evaluate import accuracy, predict_logits
from torchslice.use.extend import extend
from torchslice.use.extended import Extended, joint_data, remembered
from torchslice.use.extract import extract
from torchslice.use.finetune import finetune
from torchslice.use.widen import widen

from .nets import Tiny, five_stripes, lively

QUIET = {"batch_size": 30, "precision": "fp32", "device": "cpu", "progress": False}


DATA = five_stripes()
OLD, NEW = DATA.restrict(DATA.classes[:3]), DATA.restrict(DATA.classes[3:])
PART = Slice({"conv1": torch.arange(8) < 5, "conv2": torch.arange(6) % 2 == 0})


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return finetune(
        lively(models.create("tests.use.nets:tiny", num_classes=3)), OLD, epochs=6, learning_rate=0.1, **QUIET
    ).model


@pytest.fixture(scope="module")
def extended(base: nn.Module) -> Extended:
    return extend(base, PART, NEW, classes=OLD.classes, replay=OLD, epochs=12, learning_rate=0.1, **QUIET)


def test_the_known_classes_are_answered_bit_for_bit_as_before(base, extended):
    before, after = extract(base, PART, OLD.example), extended.network(0)
    assert [p.shape for p in before.parameters()] == [p.shape for p in after.parameters()]
    assert torch.equal(predict_logits(after, OLD), predict_logits(before, OLD))
    assert (predict_logits(extended.model, OLD)[:, :3] - predict_logits(base, OLD)).abs().max() > 1e-3
    assert base.head.weight.shape == (3, 6) and extended.model.head.weight.shape == (5, 6)


def test_the_new_classes_are_learned(extended):
    assert accuracy(extended.network(), NEW).overall > 0.7
    assert extended.classes == DATA.classes == extended.model.classes
    assert extended.tasks[0].part == PART and extended.tasks[1].part is None
    whole = predict_logits(extended.model, NEW)[:, 3:]
    assert torch.allclose(predict_logits(extended.network(1), NEW), whole, atol=1e-5)


def test_all_classes_are_told_apart_where_the_task_is_not_given(extended):
    joined = extended.joined()
    logits = predict_logits(joined, DATA)
    assert logits.shape == (len(DATA.test), 5) and accuracy(joined, DATA).overall > 0.5
    known = predict_logits(extended.network(0), DATA) + extended.tasks[0].bias
    if extended.rule == "energy":
        assert torch.allclose(logits[:, :3], known, atol=1e-5)
    validation = accuracy(joined, joint_data(OLD, NEW), split="validation")
    unbiased = replace(extended, tasks=(extended.tasks[0], replace(extended.tasks[1], bias=-100.0)))
    assert accuracy(unbiased.joined(), DATA).per_class[3:] == (0.0, 0.0)
    assert validation.overall >= accuracy(unbiased.joined(), joint_data(OLD, NEW), split="validation").overall


def test_the_log_says_what_was_done(base, extended):
    names = [step.name for step in extended.steps]
    assert names == [
        *("known classes, whole network", "known classes, their slice", "new classes", "all classes, task not given"),
    ]
    figures = {step.name: step for step in extended.steps}
    assert figures[names[0]].validation_accuracy == accuracy(base, OLD, split="validation").overall
    slice_alone = extract(base, PART, OLD.example)
    assert figures[names[1]].validation_accuracy == accuracy(slice_alone, OLD, split="validation").overall
    assert figures["new classes"].validation_accuracy == accuracy(extended.network(), NEW, split="validation").overall
    moved = 3 * (9 + 3) + 3 * (8 * 9 + 3) + 2 * 7  # conv1 and conv2 with their norms, and two rows of the classifier
    share = moved / sum(p.numel() for p in extended.model.parameters())
    assert figures["new classes"].param_share == share and figures["new classes"].seconds > 0
    assert "broad green, broad blue: all neurons" in str(extended) and "Slice(8 of 14 neurons" in str(extended)


def test_without_replay_only_the_new_rows_compete(base):
    state = copy.deepcopy(base.state_dict())
    made = extend(base, PART, NEW, classes=OLD.classes, epochs=2, **QUIET)
    assert all(torch.equal(tensor, state[key]) for key, tensor in base.state_dict().items())
    assert [step.name for step in made.steps] == ["new classes"] and made.tasks[1].bias == 0
    calibrated = made.calibrated(OLD, NEW)
    joint = joint_data(OLD, NEW)
    parts = [accuracy(which.joined(), joint, split="validation").per_class for which in (made, calibrated)]
    balanced = [sum(p[:3]) / 3 + sum(p[3:]) / 2 for p in parts]
    assert balanced[1] >= balanced[0] and made.tasks[1].bias == 0


@pytest.mark.parametrize("restart", [True, False])
def test_the_others_start_anew_or_go_on(base, restart):
    made = extend(base, PART, NEW, classes=OLD.classes, restart=restart, epochs=1, learning_rate=1e-9, **QUIET)
    weight, rest = made.model.conv2.weight, ~PART["conv2"]
    if restart:
        start = reinitialised(made.model, seed=0)
        assert torch.allclose(weight[rest], start.conv2.weight[rest], atol=1e-6)
    else:
        assert torch.allclose(weight[rest], base.conv2.weight[rest], atol=1e-6)
    assert torch.equal(weight[~rest], base.conv2.weight[~rest])


def test_several_extensions_until_no_neuron_is_left(base):
    first, second = DATA.restrict(DATA.classes[3:4]), DATA.restrict(DATA.classes[4:])
    once = extend(base, PART, first, classes=OLD.classes, replay=OLD, epochs=1, **QUIET)
    known = joint_data(OLD, first)
    more = PART | random_like(PART, seed=3)
    twice = extend(once, more, second, replay=known, epochs=1, **QUIET)
    assert twice.classes == DATA.classes and [len(task.classes) for task in twice.tasks] == [3, 1, 1]
    assert [task.part for task in twice.tasks] == [PART, more, None]
    assert torch.equal(predict_logits(twice.network(0), OLD), predict_logits(once.network(0), OLD))
    answers = predict_logits(extract(once.model, more, OLD.example), first)[:, 3:]
    assert torch.allclose(predict_logits(twice.network(1), first), answers, atol=1e-6)
    assert len(twice.steps) == 8

    full = find_neurons(twice.model, OLD.example).full()
    with pytest.raises(
        TorchsliceError, match="every neuron is critical, so none is left to train. Add fresh ones with"
    ):
        extend(twice, full, replace(NEW, classes=("a", "b")), epochs=1, **QUIET)
    wide = widen(twice.model, OLD.example, factor=1.25)
    wider = twice.within(wide)
    assert torch.equal(predict_logits(wider.network(0), OLD), predict_logits(twice.network(0), OLD))
    last = extend(wider, wide.lift(full), replace(NEW, classes=("a", "b")), epochs=1, **QUIET)
    assert torch.equal(predict_logits(last.network(0), OLD), predict_logits(once.network(0), OLD))
    assert torch.equal(predict_logits(last.network(1), first), predict_logits(twice.network(1), first))
    assert last.model.head.weight.shape[0] == 7 and len(last.network(3).head.weight) == 2


@pytest.mark.parametrize(
    "name", ["unknown", "reused", "gated", "preactivation", "convnet", "mobilenet", "resnet18", "vit"]
)
def test_no_architecture_forgets(name):
    model, example = make(name)
    size = min(32, example.shape[-1]) if name != "vit" else 64
    images = torch.randint(256, (8, 3, size, size), dtype=torch.uint8)
    split = Split(images, torch.arange(8) % 2)
    data = Data.build("noise", split, split, classes=["a", "b"], validation=split)
    critical = find_neurons(model, data.example).random(0.6, seed=1)
    before = extract(model, critical, data.example)
    made = extend(model, critical, data, classes=list("0123456789"), epochs=1, **{**QUIET, "batch_size": 4})
    assert torch.equal(predict_logits(made.network(0), data), predict_logits(before, data))
    states = before.state_dict(), made.network(0).state_dict()
    assert states[0].keys() == states[1].keys() and all(map(torch.equal, *(state.values() for state in states)))
    if made.steps[-1].best_epoch:
        assert not torch.equal(predict_logits(made.model, data)[:, :10], predict_logits(model, data))


def test_saved_and_loaded_in_a_fresh_process(tmp_path, extended):
    path = tmp_path / "five.safetensors"
    extended.save(path, preprocessing=OLD.preprocessing, metrics={"accuracy": 0.5})
    loaded = load(path, allow_import=True)
    assert loaded.classes == DATA.classes and read_record(path)["extension"] == extended.to_plain()
    again = Extended.of(loaded, OLD.example)
    assert again.tasks == extended.tasks and again.rule == extended.rule and again.steps == extended.steps
    assert torch.equal(predict_logits(again.joined(), DATA), predict_logits(extended.joined(), DATA))
    code = (
        "import sys, torch; from torchslice.use import Extended, load\n"
        "images = torch.load(sys.argv[2])\n"
        "made = Extended.of(load(sys.argv[1], allow_import=True), images)\n"
        "torch.save([made.network(0)(images), made.joined()(images)], sys.argv[3])"
    )
    torch.save(OLD.example, tmp_path / "images.pt")
    command = [sys.executable, "-c", code, path, tmp_path / "images.pt", tmp_path / "out.pt"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    with torch.no_grad():
        for found, network in zip(
            torch.load(tmp_path / "out.pt"), (extended.network(0), extended.joined()), strict=True
        ):
            assert torch.equal(found, network(OLD.example))
    more = extend(loaded, PART | random_like(PART, seed=5), replace(NEW, classes=("a", "b")), epochs=1, **QUIET)
    assert more.classes == (*DATA.classes, "a", "b") and more.tasks[0].part == PART


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"classes": ("red", "green")},
            r"the model has 3 class scores, and 2 different classes are named \(red, green\)",
        ),
        ({"classes": ("red", "red", "blue")}, "the model has 3 class scores, and 2 different classes are named"),
        ({"classes": None}, "this model does not name its classes; name them in the order of its scores: classes="),
        ({"data": DATA.restrict(["green", "broad blue"])}, "the model knows 'green' already; give data of new classes"),
        (
            {"data": DATA.restrict(["broad blue"])},
            r"a single new class \('broad blue'\) can only be told from the known",
        ),
        ({"critical": PART | ~PART}, "every neuron is critical, so none is left to train. Add fresh ones with widen"),
        ({"critical": PART - PART}, "the slice is empty; every layer needs at least one neuron"),
        ({"critical": Slice({"conv1": PART["conv1"]})}, "this is a slice of another model"),
        ({"replay": DATA.restrict(["red", "green"])}, "unknown class of data set 'stripes': 'blue'"),
        ({"epochs": 0}, "at least 1 epoch"),
    ],
)
def test_bad_input_is_refused_and_nothing_changed(change, message):
    model = lively(Tiny())
    before = copy.deepcopy(model.state_dict())
    arguments = {"critical": PART, "data": NEW, "classes": OLD.classes, **QUIET, **change}
    with pytest.raises(TorchsliceError, match=message):
        extend(model, arguments.pop("critical"), arguments.pop("data"), **arguments)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not hasattr(model, "classes")


def test_what_was_learned_before_cannot_be_given_up(extended):
    with pytest.raises(
        TorchsliceError, match="the slice leaves out 8 neurons through which red, green, blue are answered"
    ):
        extend(extended, ~PART, replace(NEW, classes=("a", "b")), **QUIET)
    with pytest.raises(TorchsliceError, match="an extended network knows the names of its classes; leave classes= out"):
        extend(extended, PART, replace(NEW, classes=("a", "b")), classes=OLD.classes, **QUIET)
    with pytest.raises(TorchsliceError, match="this network was not extended"):
        Extended.of(lively(Tiny()), OLD.example)
    small = replace(
        NEW,
        **{
            part: Split(getattr(NEW, part).images[..., :4], getattr(NEW, part).labels)
            for part in ("train", "validation", "test")
        },
    )
    with pytest.raises(TorchsliceError, match="images of known classes are 1x8x8, those of new classes 1x8x4"):
        joint_data(OLD, small)


def test_a_share_of_the_images_to_be_replayed():
    some = remembered(OLD, 0.1, seed=3)
    counts = [len(getattr(some, part)) / len(getattr(OLD, part)) for part in ("train", "validation", "test")]
    assert counts == pytest.approx([0.1, 0.1, 1], abs=0.5 / len(OLD.validation))
    assert some.classes == OLD.classes and set(some.train.labels.tolist()) == {0, 1, 2}
    assert [len(split) for split in (remembered(OLD, 1e-9).train, remembered(OLD, 1e-9).validation)] == [1, 1]
    assert torch.equal(remembered(OLD, 1).train.images, OLD.train.images)
    assert not torch.equal(some.train.images, remembered(OLD, 0.1, seed=4).train.images)


def test_scores_that_do_not_come_from_a_layer_and_models_without_neurons():
    class Softened(Tiny):
        def forward(self, x):
            return super().forward(x).softmax(1)

    with pytest.raises(TorchsliceError, match="the class scores do not come straight from a layer, so no rows"):
        extend(lively(Softened()), PART, NEW, classes=OLD.classes, **QUIET)
    with pytest.raises(TorchsliceError, match="no neuron of this model can be cut"):
        extend(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), PART, NEW, classes=OLD.classes, **QUIET)
    with pytest.raises(TorchsliceError, match="the model has a single class score; train it on two classes at least"):
        extend(lively(Tiny(1)), PART, NEW, classes=["red"], **QUIET)
