"""The training loop: it learns, and it says what is wrong before it begins."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.battery.zoo import Dictionary, TwoInputs
from tests.nets import assert_equal, state, tiny_net, tiny_task
from torchslice.data import task as make_task
from torchslice.errors import TorchsliceError
from torchslice.training import CrossEntropy, Training, accuracy, finetune, fit, predict
from torchslice.training.checkpoint import FILE, read_checkpoint

QUIET = Training(epochs=1, batch_size=8, device="cpu", precision="fp32", progress=False)


def test_it_learns_and_tells():
    model, task = tiny_net(), tiny_task(48)
    rows = fit(model, task, replace(QUIET, epochs=8))
    assert [row["epoch"] for row in rows] == list(range(1, 9))
    assert set(rows[0]) == {
        *("epoch", "learning_rate", "loss", "train_accuracy", "validation_accuracy", "steps", "seconds"),
    }
    assert rows[0]["learning_rate"] == QUIET.rate(0, 48) and [row["steps"] for row in rows] == [
        6 * e for e in range(1, 9)
    ]
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["validation_accuracy"] > 0.6
    assert rows[-1]["validation_accuracy"] == accuracy(model, task, "validation").overall
    assert not any(module.training for module in model.modules()) and all(p.is_contiguous() for p in model.parameters())


PLAIN = replace(QUIET, batch_size=16, weight_decay=0.0, warmup_fraction=0.0, label_smoothing=0.0)


def plain_batch():
    task = tiny_task(16, flip=False, crop_padding=0)
    return task, *next(task.batches("train", 16))  # one batch: the order plays no part


def test_one_step_is_nesterov_with_the_falling_rate_and_decay_of_weights_only():
    (task, images, labels), model, literal = plain_batch(), tiny_net(norm=False), tiny_net(norm=False)
    fit(model, task, replace(PLAIN, epochs=2, learning_rate=0.1, weight_decay=0.01))
    velocity = [torch.zeros_like(p) for p in literal.parameters()]
    for step in range(2):
        gradients = torch.autograd.grad(F.cross_entropy(literal(images), labels), list(literal.parameters()))
        with torch.no_grad():
            for p, g, v in zip(literal.parameters(), gradients, velocity, strict=True):
                g = g + 0.01 * p * (p.dim() > 1)
                v.mul_(0.9).add_(g)
                p.sub_((0.1, 0.05)[step] * (g + 0.9 * v))
    for name, tensor in state(literal).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)


def test_one_step_of_adamw_with_label_smoothing_by_hand():
    (task, images, labels), model, literal = plain_batch(), tiny_net(norm=False), tiny_net(norm=False)
    fit(model, task, replace(PLAIN, learning_rate=0.01, optimizer="adamw", label_smoothing=0.2))
    loss = F.cross_entropy(literal(images), labels, label_smoothing=0.2)
    for (name, p), g in zip(literal.named_parameters(), torch.autograd.grad(loss, literal.parameters()), strict=True):
        # after one step both moments, with their bias taken out, are g and g^2
        expected = p.detach() - 0.01 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(model.get_parameter(name), expected, msg=name, rtol=1e-4, atol=1e-5)


def test_an_objective_that_is_given_smooths_labels_itself():
    task, training = plain_batch()[0], replace(PLAIN, label_smoothing=0.2)
    losses = [
        fit(tiny_net(), task, settings, objective=objective)[0]["loss"]
        for settings, objective in ((training, None), (PLAIN, CrossEntropy(0.2)), (training, CrossEntropy()))
    ]
    assert losses[0] == losses[1] != losses[2] == fit(tiny_net(), task, PLAIN)[0]["loss"]


@pytest.mark.parametrize(("kind", "keep"), [(TwoInputs, tuple), (Dictionary, dict)])
def test_inputs_of_any_structure(kind, keep):
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    image, attributes = torch.randn(60, 3, 8, 8) + labels[:, None, None, None], torch.randn(60, 5)
    inputs = {"attributes": attributes, "image": image} if keep is dict else (image, attributes)
    task = make_task(lambda: [(inputs, labels)])
    model = kind(num_classes=3)
    rows = fit(model, task, replace(QUIET, epochs=8, learning_rate=0.1))
    assert rows[-1]["loss"] < rows[0]["loss"] / 2 and accuracy(model, task).overall > 0.8


def test_output_picks_the_logits():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_net()

        def forward(self, x):
            return x, self.net(x)

    one, other, task = Both(), tiny_net(), tiny_task()
    rows = fit(one, task, QUIET, output=lambda result: result[1])
    assert rows[0]["loss"] == fit(other, task, QUIET)[0]["loss"]
    assert_equal(state(one.net), state(other))


def test_an_objective_may_be_drawn_for_every_step():
    seen = []

    class Pair(CrossEntropy):
        classes = (0, 2)

        def __call__(self, model, inputs, labels):
            seen.append(labels.unique().tolist())
            return super().__call__(model, inputs, labels)

    class Pairs:
        def draw(self, generator):
            return Pair()

    rows = fit(tiny_net(), tiny_task(48), replace(QUIET, epochs=3), objective=Pairs())
    assert seen == [[0, 2]] * 18 and rows[-1]["steps"] == 18


def test_the_objective_may_look_at_fewer_samples_and_have_parts():
    def halves(model, inputs, labels):
        loss, correct, _ = CrossEntropy()(model, inputs, labels)
        return loss, correct[:2], {"half": loss / 2}

    rows = fit(tiny_net(), tiny_task(), QUIET, objective=halves)
    assert rows[0]["half"] == pytest.approx(rows[0]["loss"] / 2)


def test_the_bar_is_on_standard_error_or_not_at_all(capsys):
    def halves(model, inputs, labels):
        loss, correct, _ = CrossEntropy()(model, inputs, labels)
        return loss, correct, {"half": loss / 2}

    fit(tiny_net(), tiny_task(), replace(QUIET, progress=True), objective=halves)
    out, err = capsys.readouterr()
    assert not out and "epoch 1/1" in err and "half" in err
    fit(tiny_net(), tiny_task(), QUIET)
    assert capsys.readouterr() == ("", "")


def loss_and(*rest):
    return lambda model, inputs, labels: (CrossEntropy()(model, inputs, labels)[0], *rest)


RIGHT = torch.ones(8, dtype=torch.bool)


@pytest.mark.parametrize(
    "objective",
    [
        lambda model, inputs, labels: F.cross_entropy(model(inputs), labels),
        loss_and(RIGHT),
        loss_and(RIGHT, None),
        loss_and(RIGHT[:0], {}),
        loss_and(RIGHT, {"loss": torch.tensor(1.0)}),
        lambda model, inputs, labels: (torch.tensor(1.0), RIGHT, {}),
        lambda model, inputs, labels: (F.cross_entropy(model(inputs), labels, reduction="none"), RIGHT, {}),
    ],
)
def test_an_objective_of_another_form_is_named(objective):
    with pytest.raises(TorchsliceError, match=r"objective .*\(loss, correct, parts\)"):
        fit(tiny_net(), tiny_task(), QUIET, objective=objective)


def test_a_part_may_be_a_number():
    assert fit(tiny_net(), tiny_task(), QUIET, objective=loss_and(RIGHT, {"weight": 0.5}))[0]["weight"] == 0.5


def test_a_look_must_tell_the_validation_accuracy():
    with pytest.raises(TorchsliceError, match="validation_accuracy"):
        fit(tiny_net(), tiny_task(), QUIET, keep="best", look=lambda network: {"loss": 1.0})


def test_a_loader_in_place_of_a_task_is_named():
    loader = DataLoader(TensorDataset(torch.zeros(9, 1, 6, 6), torch.zeros(9).long()))
    for verb in (fit, finetune, accuracy, predict):
        with pytest.raises(TorchsliceError, match=r"expected a Task, got DataLoader.*data\.task\("):
            verb(tiny_net(), loader)


def test_a_loss_that_is_not_finite_stops_with_advice():
    def explode(model, inputs, labels):
        loss, correct, parts = CrossEntropy()(model, inputs, labels)
        return loss * float("inf"), correct, parts

    with pytest.raises(TorchsliceError, match=r"no longer finite in epoch 1. Lower learning_rate \(now 0.1\)"):
        fit(tiny_net(), tiny_task(), QUIET, objective=explode)


def test_a_finite_loss_that_explodes_stops_with_advice_and_keeps_the_last_good_epoch(tmp_path):
    calls = iter(range(10**6))

    def explode(model, inputs, labels):  # from the second epoch of three steps on
        loss, correct, parts = CrossEntropy()(model, inputs, labels)
        return loss + (1e17 if next(calls) >= 3 else 0.0), correct, parts

    with pytest.raises(
        TorchsliceError, match=r"the loss grew from \d\S* to \d\S*e\+1\d in epoch 2. Lower learning_rate"
    ):
        fit(tiny_net(), tiny_task(), replace(QUIET, epochs=3), objective=explode, folder=tmp_path)
    state, _ = read_checkpoint(tmp_path / FILE)
    assert [row["epoch"] for row in state["history"]] == [1]


def test_an_own_loss_may_be_large():
    def large(model, inputs, labels):
        loss, correct, parts = CrossEntropy()(model, inputs, labels)
        return loss + 1e9, correct, parts

    assert fit(tiny_net(), tiny_task(), QUIET, objective=large)[-1]["loss"] > 1e8


def test_the_test_split_is_never_scored(monkeypatch):
    task = tiny_task()
    read = []
    real = type(task.test).read
    monkeypatch.setattr(
        type(task.test),
        "read",
        lambda self, batches, **o: real(self, [read.append((self, b)) or b for b in batches], **o),
    )
    fit(tiny_net(), task, QUIET)
    assert sum(len(rows) for split, rows in read if split is task.test) <= 1  # one sample, to see that its inputs fit
    assert any(split is task.validation for split, _ in read)


def test_the_random_state_of_the_user_is_left_alone():
    model = tiny_net(dropout=0.5)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fit(model, tiny_task(), QUIET)
    assert torch.equal(before, torch.get_rng_state())


def test_the_seed_decides_and_nothing_else():
    def trained(seed):
        torch.manual_seed(torch.seed())
        model = tiny_net(dropout=0.5)
        fit(model, tiny_task(), replace(QUIET, seed=seed))
        return state(model)

    one, same, other = trained(1), trained(1), trained(2)
    assert_equal(one, same)
    assert not torch.equal(one["0.weight"], other["0.weight"])


def test_frozen_parameters_stay():
    model = tiny_net()
    model[0].requires_grad_(False)
    before = state(model)
    fit(model, tiny_task(), QUIET)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[3].weight, before["3.weight"])


def named(**inputs):
    return make_task((inputs, torch.arange(60) % 3))


IMAGE, ATTRIBUTES = torch.zeros(60, 3, 8, 8), torch.zeros(60, 5)
REFUSED = {
    "a wrapped model": (lambda: nn.DataParallel(tiny_net()), tiny_task, "wrapped (DataParallel); pass model.module"),
    "features": (
        lambda: tiny_net()[:-1],
        tiny_task,
        "output for 2 samples of tiny is a tensor float32 [2, 5]; needed are logits [2, 3], one for each class",
    ),
    "another number of classes": (
        tiny_net,
        lambda: tiny_task().restrict(["class 0", "class 1"]),
        "needed are logits [2, 2]",
    ),
    "another size": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(7, 3)),
        tiny_task,
        "cannot take the inputs of tiny (a tensor float32 [2, 1, 6, 6])",
    ),
    "a missing leaf": (lambda: Dictionary(3), lambda: named(image=IMAGE), "attributes"),
    "a leaf too many": (
        lambda: Dictionary(3),
        lambda: named(image=IMAGE, attributes=ATTRIBUTES, age=ATTRIBUTES),
        "age",
    ),
    "a leaf of another size": (lambda: Dictionary(3), lambda: named(image=IMAGE, attributes=ATTRIBUTES[:, 1:]), "task"),
    "a tuple for a dictionary": (
        lambda: Dictionary(3),
        lambda: make_task(lambda: [((IMAGE, ATTRIBUTES), torch.arange(60) % 3)]),
        "task",
    ),
    "nothing to train": (lambda: tiny_net().requires_grad_(False), tiny_task, "requires? a gradient"),
    "an exception without a text": (lambda: Silent(), tiny_task, "RuntimeError"),
    "an assertion without a text": (lambda: Silent(AssertionError), tiny_task, "AssertionError"),
}


class Silent(nn.Module):
    def __init__(self, kind=RuntimeError):
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        raise self.kind


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_trained(kind):
    make, data, text = REFUSED[kind]
    model, task = make(), data()
    before = copy.deepcopy(model.state_dict())
    pattern = text if "|" in text or "?" in text else re.escape(text)
    with pytest.raises(TorchsliceError, match=pattern) as caught:
        fit(model, task, QUIET)
    assert "\n" not in str(caught.value)
    assert_equal(model.state_dict(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "first"}, "keep must be one of last, best, got 'first'"),
        ({"training": replace(QUIET, device="abacus")}, "device 'abacus' cannot be used"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(TorchsliceError, match=message):
        fit(tiny_net(), tiny_task(), **{"training": QUIET, **options})
