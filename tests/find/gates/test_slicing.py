"""Class slices: the threshold rule, and independence of batch size and order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.nets import tiny_net, tiny_task
from torchslice.errors import TorchsliceError
from torchslice.find.gates import attach, class_slices, report, statistics
from torchslice.find.gates.slicing import often_on
from torchslice.graph.find import find_neurons

QUIET = {"progress": False}


def slow_often_on(frequency, threshold):
    """The rule as written: lower the threshold by 0.05 until one neuron survives."""
    rows = []
    for rates in frequency.tolist():
        limit = threshold
        while not any(rate >= limit - 1e-9 for rate in rates):
            limit -= 0.05
        rows.append([rate >= limit - 1e-9 for rate in rates])
    return torch.tensor(rows)


@pytest.fixture
def gated():
    """Gates that tell the classes of the tiny data apart a little."""
    model = attach(find_neurons(tiny_net(), tiny_task().example))
    with torch.no_grad():
        for gate in model.gates:
            gate.excite.bias.normal_(0, 0.5)
    return model


@given(
    rates=st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=4),
    threshold=st.sampled_from([0.9, 0.5, 0.05, 1.0]),
)
def test_the_threshold_sinks_until_something_survives(rates, threshold):
    frequency = torch.tensor(rates, dtype=torch.float64) / 40
    kept = often_on(frequency, threshold)
    assert torch.equal(kept, slow_often_on(frequency, threshold))
    assert kept.any(1).all()


def test_the_rule_by_hand():
    frequency = torch.tensor([[0.9, 0.89, 1.0], [0.84, 0.86, 0.85], [0.1, 0.79, 0.8], [0.0, 0.0, 0.0]])
    kept = often_on(frequency, 0.9).int().tolist()
    assert kept == [[1, 0, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1]]


def test_counts_are_those_of_a_look_at_every_image(gated):
    task = tiny_task(30)
    found = statistics(gated, task, batch_size=7, **QUIET)
    gated.eval()
    with torch.no_grad():
        gated(next(iter(task.train.read([torch.arange(30)]))))
    assert found.samples.tolist() == task.train.labels.bincount().tolist()
    for name, values in gated.gate_values.items():
        rows = [values[task.train.labels == c] for c in range(3)]
        on = torch.stack([(row > 0).double().mean(0) for row in rows])
        torch.testing.assert_close(found.frequency[name], on)
        torch.testing.assert_close(found.mean[name].float(), torch.stack([row.mean(0) for row in rows]))
        assert 0 < on.mean() < 1  # the gates do differ


def test_batch_size_and_order_play_no_part(gated):
    task = tiny_task(30)
    mixed = replace(task, train=task.train.take(torch.randperm(len(task.train))))
    expected = class_slices(gated, task, **QUIET)
    assert list(expected) == list(task.classes) and len({*expected.values()}) > 1
    for batch_size in (1, 7, 30):
        assert class_slices(gated, mixed, batch_size=batch_size, **QUIET) == expected


def test_layers_without_gates_are_kept_whole(gated):
    for slice_ in class_slices(gated, tiny_task(), **QUIET).values():
        assert slice_["0"].all() and not slice_.empty_layers()
        gated.neurons.check(slice_)


def test_only_the_training_split_is_run(gated):
    task = tiny_task()
    expected = class_slices(gated, task, **QUIET)
    for other in ("validation", "test"):
        object.__setattr__(task, other, None)
    assert class_slices(gated, task, **QUIET) == expected


def test_the_mode_of_the_model_is_kept(gated):
    gated.train()
    before = gated.model[1].running_mean.clone()
    statistics(gated, tiny_task(), **QUIET)
    assert gated.training and torch.equal(before, gated.model[1].running_mean)


def test_the_report_is_exact(gated):
    task = tiny_task(30)
    slices = class_slices(gated, task, frequency_threshold=0.5, **QUIET)
    result = report(gated, task, slices, batch_size=7, **QUIET)
    gated.eval()
    with torch.no_grad():
        gated(next(iter(task.train.read([torch.arange(30)]))))
    masks = torch.cat([gated.gate_values[name] > 0 for name in gated.layers], 1)
    for label, name in enumerate(task.classes):
        kept = torch.cat([slices[name][layer] for layer in gated.layers])
        own = masks[task.train.labels == label][:, kept]
        pairs = [
            (a & b).sum() / (a | b).sum() if (a | b).any() else torch.tensor(1.0)
            for i, a in enumerate(own)
            for b in own[i + 1 :]
        ]
        assert result.classes[name]["cohesion"] == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-6)
        assert result.classes[name]["neuron_retention"] == pytest.approx(kept.float().mean().item())
    text = str(result)
    assert "class 0" in text and f"coupling {result.coupling:.3f}" in text
    assert result.to_plain()["cohesion"] == result.cohesion


def test_what_cannot_be_sliced_is_named(gated):
    task = tiny_task()
    with pytest.raises(TorchsliceError, match=r"frequency_threshold must be in \(0, 1\], got 0"):
        class_slices(gated, task, frequency_threshold=0, **QUIET)
    with pytest.raises(
        TorchsliceError, match="needed is a model with gates, got Sequential; make one with gates.attach"
    ):
        class_slices(gated.model, task, **QUIET)
    few = replace(task, train=task.train.take(task.train.labels != 1))
    with pytest.raises(TorchsliceError, match=r"class 'class 1' of tiny has no training sample.*task.restrict"):
        class_slices(gated, few, **QUIET)
    with pytest.raises(TorchsliceError, match="there is no slice for class 'class 0'"):
        report(gated, task, {}, **QUIET)
