"""A recipe is plain data, says what it cannot do, and builds the same network every time."""

import json
from dataclasses import replace

import pytest
import torch

import torchslice as ts
from tests.cli.conftest import TINY
from torchslice import TorchsliceError, Training
from torchslice.runs import METHODS, Recipe
from torchslice.runs.recipe import Method, absolute, is_own, make_model

FULL = Recipe(
    "resnet20",
    "cifar10",
    Method("gates", cohesion_weight=1, coupling_weight=0.25),
    Training(epochs=7, learning_rate=1, optimizer="adamw", weight_decay=0.1, seed=3, device="cpu", progress=False),
    {"width": 0.5},
    {"workers": 0},
    train_limit=1000,
)


@pytest.mark.parametrize("recipe", [FULL, TINY, *(Recipe("convnet", "digits", Method(name)) for name in METHODS)])
def test_there_and_back(recipe):
    plain = json.loads(json.dumps(recipe.to_plain()))
    training = replace(recipe.training, device="auto", progress=True)  # how it runs is no part of what it computes
    assert Recipe.from_plain(plain) == replace(recipe, training=training)


@pytest.mark.parametrize(
    "change",
    [
        *({"model": 3}, {"data": None}, {"train_limit": "all"}, {"model_arguments": []}, {"method": "gates"}),
        *({"training": {"epochs": 3}}, {"training": None}, {"colour": 1}, {"model": "convnt"}, {"train_limit": True}),
    ],
)
def test_what_is_no_recipe(change):
    with pytest.raises(TorchsliceError, match="no recipe of this torchslice"):
        Recipe.from_plain({**FULL.to_plain(), **change})


@pytest.mark.parametrize("part", ["method", "training"])
def test_what_is_no_part_of_a_recipe(part):
    plain = FULL.to_plain()
    for name, value in plain[part].items():
        wrong = {**plain[part], name: [value]}
        missing = {key: entry for key, entry in plain[part].items() if key != name}
        for changed in (wrong, missing):
            with pytest.raises(TorchsliceError, match="no recipe of this torchslice"):
                Recipe.from_plain({**plain, part: changed})


def test_sub_task_training_has_two_parts():
    assert [Recipe("convnet", "digits", training=Training(epochs=n)).first_epochs for n in (2, 3, 30)] == [1, 1, 15]
    assert Recipe("convnet", "digits", Method(standard_epochs=4), Training(epochs=30)).first_epochs == 4
    assert FULL.first_epochs == 7
    for epochs, standard_epochs in ((1, None), (3, 3), (3, 0)):
        with pytest.raises(TorchsliceError, match=f"standard_epochs=\\d and epochs={epochs}"):
            Recipe("convnet", "digits", Method(standard_epochs=standard_epochs), Training(epochs=epochs))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "gatse"}, "Did you mean 'gates'"),
        ({"method": "gates", "coupling_weight": -1}, "coupling_weight must be"),
        ({"method": "gates", "cohesion_weight": float("nan")}, "cohesion_weight must be"),
    ],
)
def test_a_method_is_checked_when_it_is_made(settings, message):
    with pytest.raises(TorchsliceError, match=message):
        Method(**settings)


def test_the_network_is_the_same_every_time_and_the_random_state_is_left_alone():
    task = TINY.load_task()
    state = torch.get_rng_state()
    one, other = TINY.make_model(task), TINY.make_model(task)
    assert all(a.equal(b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert torch.get_rng_state().equal(state)
    seeded = replace(TINY, training=replace(TINY.training, seed=1)).make_model(task)
    assert not all(a.equal(b) for a, b in zip(one.parameters(), seeded.parameters(), strict=True))
    assert TINY.check(task).model.features[0][0].in_channels == 1


def test_what_cannot_be_trained_or_cut_is_said_before_training():
    task = TINY.load_task()
    for change, message in (
        ({"model_arguments": {"channels": 3}}, "cannot run on the example"),
        ({"model_arguments": {"num_classes": 3}}, "3 logits"),
        ({"model_arguments": {"width": 0}}, "no neuron of this model can be cut"),
    ):
        with pytest.raises(TorchsliceError, match=message):
            replace(TINY, **change).check(task)
    with pytest.raises(TorchsliceError, match="class '0' of digits has no training sample"):
        TINY.check(replace(TINY, train_limit=5).load_task())


def test_networks_of_other_libraries_choose_their_channels_themselves():
    images = ts.data.Images(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1] * 4))
    task = ts.data.task(images, images, images, classes=["a", "b"])
    assert make_model("resnet20", task, {}).stem[0].in_channels == 3
    assert make_model("torchvision:squeezenet1_1", task, {}).classifier[1].out_channels == 2


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("folder:images") == f"folder:{tmp_path}/images" and absolute("digits") == "digits"
    named = ("convnet", "torchvision:resnet18", "timm:resnet10t", "folder:images", "my.nets:make")
    assert [is_own(name) for name in named] == [False, False, False, False, True]
