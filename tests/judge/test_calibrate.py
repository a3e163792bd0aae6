"""Calibrated logits: by hand, by their properties, and over networks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.nets import Tiny, lively, stripes
from torchslice.data import Stored
from torchslice.errors import TorchsliceError
from torchslice.graph.find import find_neurons
from torchslice.judge import best_temperature, calibrate, calibration_error, predict
from torchslice.judge.calibrate import COLDEST, HOTTEST, likeliest


def test_calibration_error_by_hand() -> None:
    sure, half = [20.0, 0.0], [0.0, 0.0]
    assert calibration_error(torch.tensor([sure] * 4), torch.tensor([0, 0, 0, 1])) == pytest.approx(0.25)
    assert calibration_error(torch.tensor([half] * 4), torch.tensor([0, 0, 1, 1])) == pytest.approx(0)
    both = torch.tensor([sure, sure, half, half])  # bins of two: 1 - 0.5, and 0.5 - 0
    assert calibration_error(both, torch.tensor([0, 1, 1, 1])) == pytest.approx(0.5)


def test_best_temperature_by_hand() -> None:
    # three of four right at a distance of 4; a sixth of every label is spread: sigmoid(4 / T) = 5/6 * 3/4 + 1/6 * 1/2
    found = best_temperature(torch.tensor([[4.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1]))
    share = 5 / 6 * 3 / 4 + 1 / 12
    assert found == pytest.approx(4 / math.log(share / (1 - share)), rel=1e-6)
    assert best_temperature(torch.tensor([[9e9, 0.0]]), torch.tensor([0])) == pytest.approx(HOTTEST)
    assert best_temperature(torch.tensor([[1e-9, 0.0]]), torch.tensor([0])) == pytest.approx(COLDEST)


def test_a_few_right_answers_do_not_make_a_network_sure_of_itself() -> None:
    logits = torch.tensor([[2.0, 0.0]] * 98)  # all right: an error in 200 is left
    temperature = best_temperature(logits, torch.zeros(98, dtype=torch.int64))
    assert (logits[0] / temperature).softmax(0)[1].item() == pytest.approx(1 / 200, rel=1e-4)


@given(st.integers(0, 1000), st.floats(0.3, 3))
def test_temperature_scales_with_the_logits_and_is_best(seed: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(60, 4, generator=generator)
    spread = 1 / 62
    labels = torch.multinomial((logits / 1.7).softmax(1), 1, generator=generator)[:, 0]
    best = best_temperature(logits, labels)
    assert best_temperature(factor * logits, labels) == pytest.approx(factor * best, rel=1e-4)
    loss = [
        nn.functional.cross_entropy(logits / t, labels, label_smoothing=spread).item()
        for t in (best, 0.97 * best, 1.03 * best)
    ]
    assert loss[0] <= min(loss) + 1e-7


class Answering(nn.Module):
    """Takes named inputs and returns its logits in a tuple, as the second entry."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Tiny()

    def forward(self, pixels: torch.Tensor) -> tuple[str, torch.Tensor]:
        return "logits", self.net(pixels)


@pytest.mark.parametrize("named", [False, True])
def test_a_calibrated_network_answers_as_before(named: bool) -> None:
    task, output = stripes(), (lambda result: result[1]) if named else None
    if named:
        splits = {name: task.split(name) for name in ("train", "validation", "test")}
        stored = {
            name: Stored({"pixels": next(iter(split.read([torch.arange(len(split))])))}, split.labels)
            for name, split in splits.items()
        }
        task = replace(task, **stored)
    model = lively(Answering() if named else Tiny())
    kept = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    small, temperature = calibrate(find_neurons(model, task.example, output=output), task)
    before, after = (predict(network, task, output=output) for network in (model, small))
    assert torch.allclose(after * temperature, before, rtol=1e-4, atol=1e-5) and temperature != 1
    assert torch.equal(after.argmax(1), before.argmax(1))
    assert all(torch.equal(tensor, kept[key]) for key, tensor in model.state_dict().items())
    labels = task.validation.labels
    losses = [
        nn.functional.cross_entropy(
            predict(network, task, "validation", output=output), labels, label_smoothing=1 / (len(labels) + 2)
        )
        for network in (model, small)
    ]
    assert losses[1] <= losses[0] + 1e-6


def test_logits_of_no_layer_and_tied_weights_are_refused() -> None:
    class Pooled(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 3, 3)
            self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
            self.tied, self.other.weight = tied, self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.second(self.first(x).relu()).mean((2, 3))
            return self.other(self.one(x).relu()) if self.tied else x.softmax(1)

    for tied, message in ((False, "are no layer's output"), (True, "cannot be calibrated")):
        with pytest.raises(TorchsliceError, match=message):
            calibrate(find_neurons(lively(Pooled(tied)), stripes().example), stripes())


def test_logits_that_are_no_answers_are_refused() -> None:
    task = stripes()
    neurons, labels = find_neurons(lively(Tiny()), task.example), task.validation.labels
    for wrong in (float("nan"), float("inf")):
        logits = torch.zeros(len(labels), 3)
        logits[1, 0] = wrong
        for verb in (
            lambda logits=logits: calibration_error(logits, labels),
            lambda logits=logits: best_temperature(logits, labels),
            lambda logits=logits: calibrate(neurons, task, logits=logits),
        ):
            with pytest.raises(TorchsliceError, match="NaN or infinite"):
                verb()


def test_the_likeliest_shift_by_hand() -> None:
    # one logit, shifted by b, against 0: the slope of mean loss and prior, sigmoid(b) - 3/4 + b / 4, is 0
    layer = likeliest(
        lambda b: (torch.zeros(2, 1).double(), nn.functional.pad(b, (1, 0))),
        torch.zeros(1),
        torch.zeros(4, 1),
        torch.tensor([1, 1, 1, 0]),
    )
    b = layer.bias[1].item()
    assert torch.tensor(b).sigmoid().item() - 0.75 + b / 4 == pytest.approx(0, abs=1e-5) and layer.bias[0] == 0


def test_no_other_layer_is_likelier() -> None:
    logits, labels = torch.randn(80, 4), torch.randint(3, (80,))

    def full(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = values.view(3, 5)
        return rows[:, :4], rows[:, 4]

    def loss(weight: torch.Tensor, bias: torch.Tensor) -> float:
        prior = weight.square().sum() + bias.square().sum()
        return float(nn.functional.cross_entropy(logits @ weight.T + bias, labels) + prior / 160)

    best = likeliest(full, torch.zeros(15), logits, labels)
    least = loss(best.weight.detach(), best.bias.detach())
    for _ in range(20):
        assert loss(best.weight.detach() + 0.02 * torch.randn(3, 4), best.bias.detach() + 0.02 * torch.randn(3)) > least
