"""Networks run where they are told to and in the memory format that suits them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.nets import Viewed, tiny_net, tiny_task
from torchslice.errors import TorchsliceError
from torchslice.judge import recalibrate
from torchslice.training import Training, finetune, fit, placement, predict
from torchslice.training.placement import choose_placement, fast_format, in_format
from torchslice.training.ranks import Ranks


def test_automatic_placement_names_what_it_chose():
    chosen = choose_placement()
    assert chosen.precision in ("fp32", "bf16") and chosen.device.type in ("cpu", "cuda")
    with choose_placement("cpu", "bf16").autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize(("time", "chosen"), [(0.4, "bf16"), (0.95, "fp32"), (20.0, "fp32")])
def test_automatic_precision_is_bf16_where_it_was_measured_to_be_faster(monkeypatch, time, chosen):
    monkeypatch.setattr(placement, "_bf16_time", lambda: time)
    assert choose_placement("cpu").precision == chosen
    assert choose_placement("cpu", "fp32").precision == "fp32"


@pytest.mark.parametrize("first", [True, False])
def test_under_torchrun_the_first_process_decides(monkeypatch, first):
    class Second(Ranks):
        def copy_from_first(self, tensors):
            for tensor in tensors:
                tensor.fill_(first)

    monkeypatch.setattr(placement, "current_ranks", lambda device: Second(1, 2))
    monkeypatch.setattr(placement, "_bf16_time", lambda: 20.0 if first else 0.1)
    assert choose_placement("cpu").precision == ("bf16" if first else "fp32")


def test_the_measurement_looks_at_both_precisions_and_leaves_no_trace(monkeypatch):
    asked, real = [], torch.autocast

    def autocast(*args, enabled):
        asked.append(enabled)
        return real(*args, enabled=enabled)

    monkeypatch.setattr(torch, "autocast", autocast)
    before = torch.get_rng_state()
    placement._bf16_time.cache_clear()
    with torch.no_grad():
        assert placement._bf16_time() > 0
    assert asked.count(True) == asked.count(False) and torch.equal(before, torch.get_rng_state())
    placement._bf16_time()
    assert len(asked) == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("cpu", "fp8"), "unknown precision 'fp8'.*Known: auto, fp32, bf16"),
        (("abacus", "fp32"), "device 'abacus' cannot be used .*Choose auto or cpu"),
        (("cuda:999", "fp32"), "device 'cuda:999' cannot be used"),
    ],
)
def test_an_impossible_choice_is_named(given, message):
    with pytest.raises(TorchsliceError, match=message) as caught:
        choose_placement(*given)
    assert "\n" not in str(caught.value)


def test_a_network_that_flattens_with_view_goes_all_the_way():
    task, training = tiny_task(), Training(epochs=3, batch_size=8, device="cpu", progress=False)
    rows = fit(model := Viewed(), task, training)
    assert rows[-1]["loss"] < rows[0]["loss"]
    model = recalibrate(finetune(model, task, training).model, task)
    (inputs, _) = next(task.batches("train", 100))
    with torch.no_grad():
        assert (predict(model, task, "train") - model(inputs)).abs().max() < 1e-5


def test_the_format_is_channels_last_where_the_network_runs_in_it():
    task = tiny_task()
    images = task.example.expand(2, 3, 6, 6).contiguous()
    assert fast_format(nn.Conv2d(3, 4, 3), images) == torch.channels_last
    assert fast_format(Viewed(), task.example) == torch.contiguous_format
    assert fast_format(nn.Linear(6, 2), torch.zeros(2, 6)) == torch.contiguous_format
    seen = []
    model = tiny_net()
    model[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].stride()))
    predict(model, task)
    assert set(seen) == {(36, 1, 6, 1)}


def test_only_images_of_some_inputs_change_their_format():
    image, rest = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5)
    both = in_format({"image": image, "rest": (rest, "text")}, torch.channels_last)
    assert both["image"].is_contiguous(memory_format=torch.channels_last) and not both["image"].is_contiguous()
    assert both["rest"] == (rest, "text")
