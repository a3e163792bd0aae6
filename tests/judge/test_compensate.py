"""Least squares after a cut: hand-computed and literal references, what is fitted and what is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchslice.cut.extract import extract
from torchslice.data import Stored, Task
from torchslice.data import task as make_task
from torchslice.errors import TorchsliceError
from torchslice.graph.find import find_neurons
from torchslice.judge.compensate import _read, compensate, correction
from torchslice.slices import Slice


def task_of(inputs: Tensor) -> Task:
    split = Stored(inputs, torch.arange(len(inputs)) % 2)
    return make_task(split, split, split, classes=["a", "b"])


@pytest.mark.parametrize("ridge", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("rows", [40, 5])
def test_the_correction_is_ridge_regression(rows: int, ridge: float) -> None:
    torch.manual_seed(0)
    read, missing = torch.randn(rows, 7), torch.randn(rows, 3)
    found = correction(read, missing, ridge=ridge).numpy()
    penalty = ridge * rows * float(read.square().mean())
    above, below = np.vstack([read, penalty**0.5 * np.eye(7)]), np.vstack([missing, np.zeros((7, 3))])
    expected = np.linalg.lstsq(above, below, rcond=None)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_never_active_gets_no_weight() -> None:
    assert torch.equal(correction(torch.zeros(4, 2), torch.ones(4, 3)), torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 5),
        nn.Conv1d(4, 5, 3, padding=1, stride=2),
        nn.Conv2d(4, 5, (3, 2), padding=(2, 1), stride=(2, 1), dilation=(1, 2)),
        nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 5, 3, padding="same", padding_mode="circular"),
        nn.Conv2d(4, 5, 1),
        nn.Conv3d(4, 5, (3, 3, 1), padding="same"),
    ],
    ids=str,
)
def test_rows_times_weights_are_the_outputs_of_the_layer(layer: nn.Module) -> None:
    shape = (6, 5, 7)[: 2 if isinstance(layer, nn.Linear) else layer.weight.dim() - 2]
    inputs = torch.randn(3, *shape, 4) if isinstance(layer, nn.Linear) else torch.randn(3, 4, *shape)
    with torch.no_grad():
        outputs = layer(inputs) if isinstance(layer, nn.Linear) else layer(inputs).movedim(1, -1)
        at = torch.unravel_index(torch.randperm(outputs[..., 0].numel())[:20], outputs.shape[:-1])
        found = _read(layer, inputs, at) @ layer.weight.flatten(1).T + layer.bias
    torch.testing.assert_close(found, outputs[at])


def twins() -> nn.Sequential:
    """A network whose second neuron is twice the first, and whose third is its own."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0], [2.0, -2.0], [0.0, 1.0]]))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[1.0, 4.0, 1.0], [0.0, -1.0, 2.0]]))
    return model.eval()


def test_a_twin_takes_over_what_its_twin_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(correction.__kwdefaults__, "ridge", 0.0)
    torch.manual_seed(0)
    model, task = twins(), task_of(torch.randn(50, 2))
    neurons = find_neurons(model, task.example)
    made = compensate(neurons, Slice({"0": torch.tensor([True, False, True])}), task)
    expected = torch.tensor([[1.0 + 2 * 4.0, 1.0], [0.0 - 2 * 1.0, 2.0]])
    torch.testing.assert_close(made[2].weight.detach(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made(task.train.inputs), model(task.train.inputs), rtol=1e-3, atol=1e-3)
    assert torch.equal(made[0].weight, model[0].weight[[0, 2]]), "it reads what it read, so nothing is missing there"
    assert made[2].weight.requires_grad


def test_the_bias_takes_over_what_is_always_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(correction.__kwdefaults__, "ridge", 0.0)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        model[0].weight[1].zero_()
        model[0].bias[1] = 3.0  # a neuron that is 3 whatever it sees
    task = task_of(torch.randn(50, 2))
    made = compensate(find_neurons(model, task.example), Slice({"0": torch.tensor([True, False, True])}), task)
    torch.testing.assert_close(made[2].bias, model[2].bias + 3.0 * model[2].weight[:, 1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made[2].weight, model[2].weight[:, [0, 2]], rtol=1e-4, atol=1e-4)


class Odd(nn.Module):
    """Layers that are not fitted: one in groups, and two that share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
        self.one, self.two, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.two.weight = self.one.weight

    def forward(self, images: Tensor) -> Tensor:
        x = self.grouped(self.first(images).relu()).relu().mean((2, 3))
        return self.last(self.two(self.one(x).relu()).relu())


def test_groups_and_shared_weights_stay_as_they_were_cut() -> None:
    torch.manual_seed(0)
    model, task = Odd().eval(), task_of(torch.randn(40, 3, 8, 8))
    neurons = find_neurons(model, task.example)
    slice_ = neurons.random(0.5, seed=0)
    cut, made = extract(neurons, slice_).state_dict(), compensate(neurons, slice_, task).state_dict()
    changed = {name.partition(".")[0] for name in cut if not torch.allclose(cut[name], made[name], atol=1e-5)}
    assert changed == {"last"}


class Routed(nn.Module):
    """Samples go to one of two experts, as what they look like after the second layer says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Linear(16, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(input=self.first(x).relu()).relu()
        chosen = (x.mean(1) > x.mean()).long()
        parts = [expert(x[chosen == number]) for number, expert in enumerate(self.experts)]
        return self.last(torch.cat(parts)[torch.argsort(torch.argsort(chosen, stable=True))].relu())


def test_layers_that_are_given_other_samples_after_the_cut_stay_as_they_were_cut() -> None:
    torch.manual_seed(0)
    model, inputs = Routed().eval(), torch.randn(200, 6)
    task = task_of(inputs)
    neurons = find_neurons(model, task.example)
    slice_ = Slice({**neurons.full().masks, "first": torch.arange(16) % 2 == 0})
    cut, made = extract(neurons, slice_).state_dict(), compensate(neurons, slice_, task).state_dict()
    changed = {name.rpartition(".")[0] for name in cut if not torch.allclose(cut[name], made[name], atol=1e-5)}
    assert changed == {"last"}


def test_nothing_changes_where_nothing_is_cut_and_the_seed_decides_the_rest() -> None:
    torch.manual_seed(0)
    task = task_of(torch.randn(60, 5))
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    neurons = find_neurons(model, task.example)
    torch.testing.assert_close(compensate(neurons, neurons.full(), task)(task.example), model(task.example))
    half = neurons.random(0.5, seed=0)
    one, same, other = (compensate(neurons, half, task, samples=30, seed=seed)(task.example) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.allclose(one, other)


def test_bad_input() -> None:
    task = task_of(torch.randn(20, 2))
    neurons = find_neurons(twins(), task.example)
    with pytest.raises(TorchsliceError, match="samples must be at least 1, got 0"):
        compensate(neurons, neurons.full(), task, samples=0)
    with pytest.raises(TorchsliceError, match="two classes"):
        compensate(neurons, neurons.full(), task, classes=[1])
    with pytest.raises(TorchsliceError, match="empty"):
        compensate(neurons, Slice({"0": torch.zeros(3, dtype=torch.bool)}), task)
