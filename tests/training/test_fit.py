"""The training loop: it learns, it resumes to the bit, and it says what is wrong."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from tests.training.tiny import assert_equal, state, tiny_data, tiny_net
from torch import nn

from torchslice.errors import TorchsliceError
from torchslice.training import accuracy, choose_placement, cross_entropy, fit
from torchslice.training.fit import cosine

QUIET = {"batch_size": 8, "device": "cpu", "precision": "fp32", "progress": False}


def interrupted_after(epochs, *, steps=3):
    """An objective that is interrupted by Ctrl-C in the step after `epochs` epochs."""
    calls = iter(range(10**6))

    def objective(model, images, labels):
        if next(calls) == epochs * steps + 1:
            raise KeyboardInterrupt
        return cross_entropy(model, images, labels)

    objective.__module__, objective.__qualname__ = cross_entropy.__module__, cross_entropy.__qualname__
    return objective


def test_it_learns_and_tells():
    model, data = tiny_net(), tiny_data(48)
    rows = fit(model, data, epochs=8, **QUIET)
    assert [row["epoch"] for row in rows] == list(range(1, 9))
    keys = ["epoch", "learning_rate", "loss", "train_accuracy", "validation_accuracy", "seconds"]
    assert list(rows[0]) == keys
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["validation_accuracy"] > 0.6
    assert rows[-1]["validation_accuracy"] == accuracy(model, data, data.validation)
    assert not model.training


def test_one_step_is_nesterov_with_the_cosine_rate():
    data, model, literal = tiny_data(16, flip=False, crop_padding=0), tiny_net(norm=False), tiny_net(norm=False)
    fit(model, data, epochs=2, learning_rate=0.1, weight_decay=0.01, **{**QUIET, "batch_size": 16})
    images, labels = data.normalise(data.train.images), data.train.labels  # one batch: the order plays no part
    velocity = [torch.zeros_like(p) for p in literal.parameters()]
    for step in range(2):
        gradients = torch.autograd.grad(F.cross_entropy(literal(images), labels), list(literal.parameters()))
        with torch.no_grad():
            for p, g, v in zip(literal.parameters(), gradients, velocity, strict=True):
                g = g + 0.01 * p
                v.mul_(0.9).add_(g)
                p.sub_((0.1, 0.05)[step] * (g + 0.9 * v))
    for name, tensor in state(literal).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)


def test_the_rate_follows_half_a_cosine():
    assert [round(cosine(0.2, s, 4), 6) for s in range(5)] == [0.2, 0.170711, 0.1, 0.029289, 0.0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_resuming_is_bit_equal_to_never_stopping(tmp_path, precision, stop):
    data, arguments = tiny_data(), {**QUIET, "precision": precision, "epochs": 3}
    whole = tiny_net(dropout=0.5)
    rows = fit(whole, data, **arguments)
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(tiny_net(dropout=0.5), data, objective=interrupted_after(stop), folder=tmp_path / "run", **arguments)
    assert f"the first {stop} of 3 epochs are in" in caught.value.__notes__[0]
    resumed = tiny_net(dropout=0.5, seed=1)  # other weights, replaced by those of the checkpoint
    if stop == 0:
        resumed = tiny_net(dropout=0.5)
    torch.manual_seed(99)
    resumed_rows = fit(resumed, data, folder=tmp_path / "run", **arguments)
    assert_equal(state(whole), state(resumed))
    assert [row["loss"] for row in rows] == [row["loss"] for row in resumed_rows]


def test_a_finished_run_is_loaded_and_its_metrics_are_readable(tmp_path):
    data, model, again = tiny_data(), tiny_net(), tiny_net(seed=1)
    rows = fit(model, data, epochs=2, folder=tmp_path, **QUIET)
    assert fit(again, data, epochs=2, folder=tmp_path, **QUIET) == rows
    assert_equal(state(model), state(again))
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors", "metrics.jsonl"]


def test_other_arguments_do_not_resume(tmp_path):
    data = tiny_data()
    fit(tiny_net(), data, epochs=1, folder=tmp_path, **QUIET)
    model = tiny_net(seed=1)
    before = state(model)
    with pytest.raises(TorchsliceError, match=r"epochs was 1, now 2; learning_rate was 0.05, now 0.1.*another folder"):
        fit(model, data, epochs=2, learning_rate=0.1, folder=tmp_path, **QUIET)
    with pytest.raises(TorchsliceError, match="objective was"):
        fit(model, data, epochs=1, objective=lambda *a: cross_entropy(*a), folder=tmp_path, **QUIET)
    with pytest.raises(TorchsliceError, match="data was"):
        fit(model, tiny_data(30), epochs=1, folder=tmp_path, **QUIET)
    with pytest.raises(TorchsliceError, match=r"is of another model: .* missing in the"):
        fit(tiny_net(norm=False), data, epochs=1, folder=tmp_path, **QUIET)
    assert_equal(before, state(model))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    data, path = tiny_data(), tmp_path / "checkpoint.safetensors"
    fit(tiny_net(), data, epochs=1, folder=tmp_path, **QUIET)
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    with pytest.raises(TorchsliceError, match=r"checkpoint.safetensors is damaged.*Delete it"):
        fit(tiny_net(), data, epochs=1, folder=tmp_path, **QUIET)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TorchsliceError, match="cannot write"):
        fit(tiny_net(), tiny_data(), epochs=1, folder=tmp_path / "file", **QUIET)


def test_interrupted_without_a_folder_says_so():
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(tiny_net(), tiny_data(), epochs=1, objective=interrupted_after(0), **QUIET)
    assert "give a folder to be able to resume" in caught.value.__notes__[0]


def test_a_loss_that_is_not_finite_stops_with_advice():
    def explode(model, images, labels):
        loss, right, parts = cross_entropy(model, images, labels)
        return loss * float("inf"), right, parts

    with pytest.raises(TorchsliceError, match=r"no longer finite in epoch 1. Lower learning_rate \(now 0.05\)"):
        fit(tiny_net(), tiny_data(), objective=explode, epochs=1, **QUIET)


def test_the_test_split_is_never_looked_at(monkeypatch):
    data = tiny_data()
    object.__setattr__(data, "test", None)
    fit(tiny_net(), data, epochs=1, **QUIET)


def test_a_loss_may_have_parts_and_the_bar_shows_them(capsys):
    def halves(model, images, labels):
        loss, right, _ = cross_entropy(model, images, labels)
        return loss, right, {"half": loss / 2}

    rows = fit(tiny_net(), tiny_data(), objective=halves, epochs=1, **{**QUIET, "progress": True})
    assert rows[0]["half"] == pytest.approx(rows[0]["loss"] / 2)
    out, err = capsys.readouterr()
    assert not out and "epoch 1/1" in err and "half" in err
    fit(tiny_net(), tiny_data(), epochs=1, **QUIET)
    assert capsys.readouterr() == ("", "")


def test_the_random_state_of_the_user_is_left_alone():
    model = tiny_net(dropout=0.5)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fit(model, tiny_data(), epochs=1, **QUIET)
    assert torch.equal(before, torch.get_rng_state())


def test_weights_come_back_in_ordinary_memory():
    model = tiny_net()
    fit(model, tiny_data(), epochs=1, **QUIET)
    assert all(p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more"),
        ({"precision": "fp8"}, "unknown precision 'fp8'; choose one of auto, fp32, bf16"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
    ],
)
def test_bad_arguments_are_named(given, message):
    with pytest.raises(TorchsliceError, match=message):
        fit(tiny_net(), tiny_data(), **{"epochs": 1, **QUIET, **given})


def test_models_that_cannot_be_trained_here_are_refused():
    data = tiny_data()
    with pytest.raises(TorchsliceError, match=r"wrapped \(DataParallel\); pass model.module"):
        fit(nn.DataParallel(tiny_net()), data, epochs=1, **QUIET)
    with pytest.raises(TorchsliceError, match=r"output for 2 images of tiny is \[2, 5\]; needed are logits \[2, 3\]"):
        fit(tiny_net()[:-1], data, epochs=1, **QUIET)
    with pytest.raises(TorchsliceError, match="cannot take the 1x6x6 images of tiny"):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(7, 3)), data, epochs=1, **QUIET)
    with pytest.raises(TorchsliceError, match="no parameter that requires a gradient"):
        fit(tiny_net().requires_grad_(False), data, epochs=1, **QUIET)


def test_frozen_parameters_stay():
    model = tiny_net()
    model[0].requires_grad_(False)
    before = state(model)
    fit(model, tiny_data(), epochs=1, **QUIET)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[3].weight, before["3.weight"])


def test_automatic_placement_names_what_it_chose():
    chosen = choose_placement()
    assert chosen.precision in ("fp32", "bf16") and chosen.device.type in ("cpu", "cuda")
    with choose_placement("cpu", "bf16").autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
