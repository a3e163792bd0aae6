import json
import sys

import pytest
import torch
from tests.core.architectures import make
from torch import nn

from torchslice import models
from torchslice.core.find import find_neurons
from torchslice.data import Data, Split
from torchslice.errors import TorchsliceError
from torchslice.slices import Slice
from torchslice.use.artefacts import load, save
from torchslice.use.evaluate import accuracy, confusion, predict_logits
from torchslice.use.finetune import finetune
from torchslice.use.partial import moving_rows
from torchslice.use.readapt import Epoch, Readapted, adapt, readapt

from .nets import Tiny, lively, stripes

DATA = stripes()
PART = Slice({"conv1": torch.arange(8) < 5, "conv2": torch.arange(6) % 2 == 0})
QUIET = {"batch_size": 30, "precision": "fp32", "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    start = lively(models.create("tests.use.nets:tiny", num_classes=3))
    return finetune(start, DATA, epochs=10, learning_rate=0.1, **QUIET).model


@pytest.fixture(scope="module")
def dimmed() -> Split:
    """New samples: half as bright."""
    return Split(DATA.train.images // 2, DATA.train.labels)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_it_learns_new_samples_and_keeps_the_old(model, dimmed):
    result = readapt(model, PART, dimmed, DATA, epochs=4, learning_rate=0.02, **QUIET)
    before, after = result.epochs[0], result.best
    assert before.clean_accuracy > 0.9 and before.new_accuracy < 0.5 < 0.8 < after.new_accuracy
    assert (
        after.clean_accuracy > 0.9
        and len(result.epochs) == 5
        and [row.steps for row in result.epochs[:3]] == [0, 7, 14]
    )  # 96 new and 96 old
    assert accuracy(result.model, DATA, split="validation").overall == after.clean_accuracy
    assert result.replay == 1.0 and not result.model.training
    # conv1 5 x (9 + 1 + 2), conv2 3 x (72 + 1 + 2), of 567
    assert result.param_share == (60 + 225) / 567


@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_else_stays_bit_for_bit(model, dimmed, classifier, precision):
    before = state(model)
    settings = {**QUIET, "precision": precision, "weight_decay": 0.1, "epochs": 2, "learning_rate": 0.02}
    adapted = readapt(model, PART, dimmed, DATA, classifier=classifier, **settings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    frozen = {"conv1": ~PART["conv1"], "norm1": ~PART["conv1"], "conv2": ~PART["conv2"], "norm2": ~PART["conv2"]}
    frozen["head"] = torch.full((3,), not classifier)
    for name, tensor in adapted.model.state_dict().items():
        where = frozen[name.split(".")[0]]
        if tensor.dim():
            assert torch.equal(tensor[where], before[name][where]), name
        if "running" not in name and tensor.dim():
            assert not torch.equal(tensor[~where], before[name][~where]) or where.all(), name


@pytest.mark.parametrize("name", ["mlp", "gated", "preactivation", "convnet"])
def test_only_critical_neurons_move_in_every_kind_of_network(name):
    model, example = make(name)
    images = (example[:1] * 0 + torch.rand(40, *example.shape[1:])).mul(255).to(torch.uint8)
    images = images[:, None] if images.dim() < 4 else images
    split = Split(images, torch.arange(40) % 10)
    data = Data.build("noise", split, split, classes=[str(n) for n in range(10)], validation=split)
    neurons = find_neurons(model, data.example)
    part = neurons.random(0.3, seed=1)
    result = readapt(model, part, split, data, epochs=1, learning_rate=0.01, weight_decay=0.1, **QUIET)
    rows, moved = moving_rows(neurons, part), 0
    assert result.best_epoch == 1 or result.epochs[1].mean_accuracy < result.epochs[0].mean_accuracy
    for key, tensor in result.model.state_dict().items():
        before, layer = model.state_dict()[key], key.rpartition(".")[0]
        frozen = torch.ones(len(tensor) if tensor.dim() else 1, dtype=torch.bool)
        if layer in rows and tensor.dim():
            frozen[rows[layer]] = False
        tensor, before = tensor.reshape(len(frozen), -1), before.reshape(len(frozen), -1)
        assert torch.equal(tensor[frozen], before[frozen]), key
        moved += int((tensor != before).sum())
    assert moved or result.best_epoch == 0


def test_the_best_mean_is_kept_and_the_latest_of_equals(model, dimmed, monkeypatch):
    values = iter([0.1, 0.9, 0.5, 0.7, 0.8, 0.4, 0.3, 0.2])  # new, clean, new, clean, ...
    score = type("Score", (), {"overall": property(lambda _: next(values))})
    monkeypatch.setattr(sys.modules[readapt.__module__], "accuracy", lambda *_, **__: score())
    result = adapt(model, dimmed, DATA, epochs=3, **QUIET)
    assert result.best_epoch == 2 and result.best.mean_accuracy == pytest.approx(0.6)
    assert result.first_at(0.5) is result.epochs[1] and result.first_at(0.9) is None


def test_several_replays_are_tried(model, dimmed):
    settings = {"epochs": 2, "learning_rate": 0.02, **QUIET}
    single = {value: readapt(model, PART, dimmed, DATA, replay=value, **settings) for value in (0, 0.5)}
    both = readapt(model, PART, dimmed, DATA, replay=(0, 0.5), **settings)
    best = max(single.values(), key=lambda result: result.best.mean_accuracy)
    assert both.replay == best.replay and both.best_epoch == best.best_epoch
    assert all(torch.equal(a, b) for a, b in zip(both.model.parameters(), best.model.parameters(), strict=True))
    assert single[0].epochs[1].steps == 4 and single[0.5].epochs[1].steps == 5  # 96 new samples, with 48 old ones
    assert not torch.equal(single[0].model.conv1.weight, single[0.5].model.conv1.weight)


def test_the_validation_share_is_not_trained_on(model, dimmed, monkeypatch):
    seen = []
    original = Tiny.forward

    def forward(self, x):
        if torch.is_grad_enabled():
            seen.append(x.detach())
        return original(self, x)

    monkeypatch.setattr(Tiny, "forward", forward)
    adapt(model, dimmed, DATA, epochs=1, replay=0, validation_share=0.5, **QUIET)
    trained = {tuple(image.flatten().tolist()) for image in torch.cat(seen)}
    assert len(trained) == 60 and trained < {tuple(x.flatten().tolist()) for x in DATA.normalise(dimmed.images)}


def test_adapt_trains_what_requires_a_gradient(model, dimmed):
    network = Tiny()
    network.load_state_dict(model.state_dict())
    network.conv1.requires_grad_(False)
    result = adapt(network.eval(), dimmed, DATA, epochs=2, learning_rate=0.02, **QUIET)
    assert result.best_epoch and torch.equal(result.model.conv1.weight, model.conv1.weight)
    assert not torch.equal(result.model.conv2.weight, model.conv2.weight)
    assert result.param_share == (567 - 80) / 567
    assert confusion(predict_logits(result.model, DATA), DATA.test.labels).sum() == len(DATA.test)


def test_it_prints_becomes_plain_data_and_is_an_ordinary_artefact(model, dimmed, tmp_path):
    rows = (Epoch(0.1, 0.9, 0, 0.0), Epoch(0.8, 0.85, 12, 1.26))
    text = str(Readapted(model, rows, 1, 0.5, 0.184))
    assert "1 *          80.0%  85.0%     12      1.3" in text and "18.4% of the parameters trained, 0.5 old" in text
    result = readapt(model, PART, dimmed, DATA, epochs=1, **QUIET)
    save(result.model, tmp_path / "adapted", classes=DATA.classes, slice=PART, metrics=result.to_plain())
    assert torch.equal(load(tmp_path / "adapted", allow_import=True)(DATA.example), result.model(DATA.example))
    assert json.loads(json.dumps(result.to_plain()))["epochs"][0]["steps"] == 0


FULL = Slice({"conv1": torch.ones(8, dtype=torch.bool), "conv2": torch.ones(6, dtype=torch.bool)})
IMAGES = torch.zeros(8, 1, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("critical", "samples", "options", "message"),
    [
        (FULL, None, {}, "covers every neuron, so nothing would be spared; choose a smaller one, or use finetune"),
        (~FULL, None, {}, "nothing would move: the slice has no neuron"),
        (Slice({"conv1": torch.arange(8) < 5}), None, {}, "slices of different models: layer 'conv2'"),
        (PART, Split(IMAGES, torch.arange(8) % 4), {}, r"has label 3, and stripes has 3 classes \(labels 0 to 2\)"),
        (PART, Split(IMAGES[:, :, :6], torch.arange(8) % 3), {}, "images of 1x6x8, and those of stripes are 1x8x8"),
        (PART, Split(IMAGES[:3], torch.arange(3)), {}, "3 new samples are too few"),
        (PART, Split(IMAGES[:4], torch.tensor([0, 1, 2, 2])), {"validation_share": 1.5}, "between 0 and 1, got 1.5"),
        (
            PART,
            None,
            {"epochs": 0},
            "at least 1 epoch, a learning_rate above 0 and a replay of 0 or more, got 0, 0.005",
        ),
        (PART, None, {"replay": -1}, "got 10, 0.005 and -1"),
    ],
)
def test_bad_input(model, dimmed, critical, samples, options, message):
    before = state(model)
    with pytest.raises(TorchsliceError, match=message):
        readapt(model, critical, samples or dimmed, DATA, **{**QUIET, **options})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
