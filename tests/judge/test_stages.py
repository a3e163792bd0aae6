"""Every stage of a sub-model and every control arm, each with its own accuracy and cost."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.nets import Tiny, lively, stripes
from torchslice.cut.extract import masked
from torchslice.errors import TorchsliceError
from torchslice.graph.find import find_neurons
from torchslice.judge import STAGES, Stages, accuracy, cost, evaluate_stages, repair
from torchslice.slices import Slice
from torchslice.training import Training, finetune

SLICE = Slice({"conv1": torch.arange(8) < 5, "conv2": torch.arange(6) % 2 == 0})
QUICK = Training(epochs=3, learning_rate=0.05, batch_size=30, precision="fp32", device="cpu", progress=False)
TASK = stripes()


@pytest.fixture(scope="module")
def neurons():
    model = finetune(lively(Tiny()), TASK, replace(QUICK, epochs=8, learning_rate=0.1)).model
    return find_neurons(model, TASK.example)


@pytest.fixture(scope="module")
def stages(neurons) -> Stages:
    scratch = replace(QUICK, epochs=6)
    return evaluate_stages(
        neurons, TASK, SLICE, classes=["blue", "red"], training=QUICK, scratch=scratch, latency_repeats=1
    )


def test_every_stage_is_there_and_says_what_it_costs(neurons, stages):
    assert [row.name for row in stages.rows] == list(STAGES)
    whole, part = cost(neurons.model, TASK.example), cost(stages.models["extracted"], TASK.example)
    # conv1 8 -> 5 and conv2 6 -> 3 of 8 -> 5 inputs and head 6 -> 3 inputs and 3 -> 2 outputs
    assert part.macs == 64 * 5 * 9 + 64 * 3 * 45 + 6 and part.parameters == 50 + 10 + 138 + 6 + 8
    for name in ("extracted", "fine-tuned", "random slice, fine-tuned", "from scratch"):
        row = stages[name]
        assert (row.parameters, row.macs) == (part.parameters, part.macs)
        assert row.param_retention == part.parameters / whole.parameters and row.mac_retention == part.macs / whole.macs
        assert cost(stages.models[name], TASK.example) == part
    assert stages["full"].param_retention == 1 > stages["full, fine-tuned"].param_retention > 0.95
    assert stages["masked"].neuron_retention == stages["random slice, fine-tuned"].neuron_retention == 8 / 14
    assert stages["from scratch"].neuron_retention is None and stages["masked"].latency is None
    assert set(stages["fine-tuned"].latency) == {1, 64}
    assert (stages["fine-tuned"].epochs, stages["from scratch"].epochs, stages["extracted"].epochs) == (3, 6, 0)


def test_accuracies_are_those_of_the_networks(neurons, stages):
    task = TASK.restrict(["red", "blue"])  # the model's order
    assert stages.classes == ("red", "blue")
    for name in set(STAGES) - {"full", "masked"}:
        score = accuracy(stages.models[name], task)
        assert stages[name].accuracy == score.overall, name
        assert stages[name].class_accuracy == dict(zip(("red", "blue"), score.per_class, strict=True))
    inputs, labels = next(task.batches("test", 1000))
    with torch.no_grad():
        correct = neurons.logits(inputs).argmax(1) == torch.tensor([0, 2])[labels]
        held = masked(neurons, SLICE)(inputs)[:, [0, 2]].argmax(1) == labels
    assert stages["full"].accuracy == pytest.approx(correct.double().mean().item())
    assert stages["masked"].accuracy == stages["extracted"].accuracy == pytest.approx(held.double().mean().item())
    assert stages["fine-tuned"].accuracy > 0.9 < stages["full, fine-tuned"].accuracy


def test_arms_differ_and_the_model_is_unchanged(neurons, stages):
    weights = [stages.models[name].conv2.weight for name in STAGES if name not in ("full", "masked")]
    assert len({tuple(w.flatten().tolist()) for w in weights}) == len(weights)
    expected = repair(neurons, SLICE, TASK.restrict(["red", "blue"]), classes=[0, 2])
    assert torch.equal(stages.models["repaired"].conv2.weight, expected.model.conv2.weight)
    assert torch.equal(stages.models["restricted"].conv1.weight, neurons.model.conv1.weight)
    assert stages.models["full"] is neurons.model and not neurons.model.training


def test_it_prints_and_becomes_plain_data(stages):
    text = str(stages)
    assert "2 classes: red, blue" in text and "ms, batch 64" in text and "from scratch, epoch" in text
    assert f"{stages['fine-tuned'].accuracy:.2%}" in text
    plain = json.loads(json.dumps(stages.to_plain()))
    assert plain["classes"] == ["red", "blue"] and len(plain["stages"]) == len(STAGES)
    assert plain["stages"][0]["latency"]["64"]["median_ms"] > 0
    with pytest.raises(TorchsliceError, match="unknown stage 'tuned'.*Known: full, restricted, masked"):
        stages["tuned"]


def test_another_baseline_training_and_controls_left_out(neurons):
    def names(**settings):
        found = evaluate_stages(neurons, TASK, SLICE, classes=["red", "blue"], latency_repeats=1, **settings)
        return found, [row.name for row in found.rows]

    plain = ["full", "restricted", "masked", "extracted", "repaired"]
    assert names(training=None)[1] == [*plain, "random slice, repaired"]
    assert names(training=None, controls=False)[1] == plain
    once = replace(QUICK, epochs=1)
    assert names(training=None, scratch=once)[1][-1] == "from scratch"
    other = find_neurons(lively(Tiny(), seed=1), TASK.example)
    found, _ = names(training=replace(once, learning_rate=1e-9), baseline=other)
    assert torch.allclose(found.models["full, fine-tuned"].conv1.weight, other.model.conv1.weight)
    assert found["full, fine-tuned"].latency != found["restricted"].latency  # it may be of another architecture
    with pytest.raises(TorchsliceError, match="logit 0 of the network is 'blue'"):
        names(baseline=find_neurons(other.model, TASK.example, classes=TASK.classes[::-1]))


def test_wrong_use(neurons):
    with pytest.raises(TorchsliceError, match="Did you mean 'red'"):
        evaluate_stages(neurons, TASK, SLICE, classes=["reed", "blue"])
    with pytest.raises(TorchsliceError, match="at least two classes"):
        evaluate_stages(neurons, TASK, SLICE, classes=["red"])
    with pytest.raises(TorchsliceError, match="slice of another model"):
        evaluate_stages(neurons, TASK, Slice({"conv1": torch.ones(8, dtype=torch.bool)}), classes=["red", "blue"])
