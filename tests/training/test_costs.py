"""What a network costs: counted by hand, and times taken in turns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.battery.zoo import prepared
from tests.nets import Tiny, assert_equal, state
from torchslice.errors import TorchsliceError
from torchslice.training import Latency, cost, costs, latency, latency_ms
from torchslice.training.costs import Cost


def test_cost_by_hand():
    # conv1 8x8 pixels x 8 outputs x 9 weights; conv2 64 x 6 x 72; head 6 x 3. Biases and norms cost parameters only.
    found = cost(Tiny(), torch.zeros(5, 1, 8, 8))
    assert found.macs == 64 * 8 * 9 + 64 * 6 * 72 + 18
    assert found.parameters == (72 + 8) + 16 + (432 + 6) + 12 + (18 + 3)
    assert str(found) == "567 parameters, 32,274 MACs per sample"


def test_grouped_convolution_and_shared_parameters():
    assert cost(nn.Conv2d(4, 8, 3, groups=4, bias=False), torch.zeros(1, 4, 5, 5)) == Cost(72, 9 * 72)
    shared = nn.Linear(3, 3, bias=False)
    assert cost(nn.Sequential(shared, shared), torch.zeros(1, 3)) == Cost(9, 18)


def test_attention_is_counted():
    # 4 projections of 5 tokens, 5 x 16 x 16 each, and scores and sums of 2 heads: 2 x 2 x 5 x 5 x 8
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True).eval()
    assert cost(layer, torch.zeros(1, 5, 16)).macs == 4 * 5 * 256 + 2 * 2 * 5 * 5 * 8 + 2 * 5 * 16 * 32
    assert torch.backends.mha.get_fastpath_enabled()


def test_any_inputs():
    neurons = prepared("dictionary")
    # 64 pixels x 8 x 27; 16 x 12 x 72; attributes 5 x 6; hidden 18 x 14; head 14 x 10
    assert cost(neurons.model, neurons.example).macs == 64 * 8 * 27 + 16 * 12 * 72 + 30 + 252 + 140
    assert latency(neurons.model, neurons.example, batch_sizes=(3,), repeats=1)[3].median_ms > 0


def test_the_model_is_left_as_it_was():
    model = Tiny().train()
    model.norm1.eval()
    before = state(model)
    cost(model, torch.randn(2, 1, 8, 8))
    latency(model, torch.randn(2, 1, 8, 8), batch_sizes=(3,), repeats=1, warm_up=0)
    assert model.training and model.drop.training and not model.norm1.training
    assert_equal(before, state(model))


def test_median_and_quartiles_by_hand(monkeypatch):
    ticks = iter([0.0, 0.001, 1.0, 1.005, 2.0, 2.002, 3.0, 3.004, 4.0, 4.003])  # seconds: 1, 5, 2, 4, 3 ms
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(ticks))
    found = latency(nn.Identity(), torch.zeros(1, 2), batch_sizes=(4,), repeats=5, warm_up=0)[4]
    assert (found.median_ms, found.lower_quartile_ms, found.upper_quartile_ms) == pytest.approx((3, 2, 4))
    assert (found.batch_size, found.repeats) == (4, 5)
    assert str(Latency(4, 3.0, 2.0, 4.0, 5)) == "3.00 ms (2.00 to 4.00) at batch 4"


def test_models_take_turns():
    class Spy(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x):
            calls.append((self.name, len(x), self.training, torch.is_grad_enabled()))
            return x

    calls: list[tuple] = []
    found = latency_ms({"a": Spy("a"), "b": Spy("b")}, torch.zeros(2, 1), batch_sizes=(1, 5), repeats=3, warm_up=1)
    assert [call[0] for call in calls] == list("abba" * 4)
    assert {call[1:] for call in calls} == {(1, False, False), (5, False, False)}
    assert set(found) == {"a", "b"} and set(found["a"]) == {1, 5} and found["b"][5].repeats == 3


def test_a_larger_network_takes_longer():
    nets = {"small": nn.Linear(512, 8), "large": nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])}
    found = latency_ms(nets, torch.randn(2, 512), batch_sizes=(64,), repeats=5)
    assert found["small"][64].median_ms < found["large"][64].median_ms


@pytest.mark.parametrize("bad", [{"repeats": 0}, {"batch_sizes": ()}, {"batch_sizes": (0, 1)}])
def test_bad_settings(bad):
    with pytest.raises(TorchsliceError, match="latency needs repeats >= 1 and batch sizes >= 1, got"):
        latency(nn.Identity(), torch.zeros(1, 1), **bad)
