import json

import pytest
import torch

from torchslice.core.hold import masked
from torchslice.errors import TorchsliceError
from torchslice.slices import Slice
from torchslice.use.costs import cost
from torchslice.use.evaluate import accuracy
from torchslice.use.finetune import finetune
from torchslice.use.stages import STAGES, Stages, evaluate_stages

from .nets import Tiny, lively, stripes

PART = Slice({"conv1": torch.arange(8) < 5, "conv2": torch.arange(6) % 2 == 0})
TRAINING = {"batch_size": 30, "precision": "fp32", "device": "cpu", "progress": False}
DATA = stripes()


@pytest.fixture(scope="module")
def model():
    return finetune(lively(Tiny()), DATA, epochs=8, learning_rate=0.1, **TRAINING).model


@pytest.fixture(scope="module")
def stages(model) -> Stages:
    settings = {"epochs": 3, "learning_rate": 0.05, "scratch_epochs": 6, "latency_repeats": 1}
    return evaluate_stages(model, DATA, part=PART, classes=["blue", "red"], **settings, **TRAINING)


def test_every_stage_is_there_and_says_what_it_costs(model, stages):
    assert [row.name for row in stages.rows] == list(STAGES)
    whole, part = cost(model, DATA.example), cost(stages.models["extracted"], DATA.example)
    # conv1 8 -> 5 and conv2 6 -> 3 of 8 -> 5 inputs and head 6 -> 3 inputs and 3 -> 2 outputs
    assert part.macs == 64 * 5 * 9 + 64 * 3 * 45 + 6 and part.parameters == 50 + 10 + 138 + 6 + 8
    for name in ("extracted", "fine-tuned", "random slice, fine-tuned", "from scratch"):
        row = stages[name]
        assert (row.parameters, row.macs) == (part.parameters, part.macs)
        assert row.param_retention == part.parameters / whole.parameters and row.mac_retention == part.macs / whole.macs
        assert cost(stages.models[name], DATA.example) == part
    assert stages["full"].param_retention == 1 > stages["full, fine-tuned"].param_retention > 0.95
    assert stages["masked"].neuron_retention == stages["random slice, fine-tuned"].neuron_retention == 8 / 14
    assert stages["from scratch"].neuron_retention is None and stages["masked"].latency is None
    assert set(stages["fine-tuned"].latency) == {1, 64}
    assert (stages["fine-tuned"].epochs, stages["from scratch"].epochs, stages["extracted"].epochs) == (3, 6, 0)


def test_accuracies_are_those_of_the_networks(model, stages):
    task = DATA.restrict(["red", "blue"])  # the model's order
    assert stages.classes == ("red", "blue")
    for name in set(STAGES) - {"full", "masked"}:
        score = accuracy(stages.models[name], task)
        assert stages[name].accuracy == score.overall, name
        assert stages[name].class_accuracy == dict(zip(("red", "blue"), score.per_class, strict=True))
    logits = model(task.normalise(task.test.images))
    truth = torch.tensor([0, 2])[task.test.labels]
    assert stages["full"].accuracy == pytest.approx((logits.argmax(1) == truth).double().mean().item())
    with masked(model, PART, DATA.example), torch.no_grad():
        answers = model(task.normalise(task.test.images))[:, [0, 2]].argmax(1)
    assert stages["masked"].accuracy == stages["extracted"].accuracy
    assert stages["masked"].accuracy == pytest.approx((answers == task.test.labels).double().mean().item())
    assert stages["fine-tuned"].accuracy > 0.9 < stages["full, fine-tuned"].accuracy


def test_arms_differ_and_the_model_is_unchanged(model, stages):
    weights = [stages.models[name].conv2.weight for name in STAGES if name not in ("full", "masked", "recalibrated")]
    assert len({tuple(w.flatten().tolist()) for w in weights}) == len(weights)
    assert torch.equal(stages.models["recalibrated"].conv2.weight, stages.models["extracted"].conv2.weight)
    assert not torch.equal(
        stages.models["recalibrated"].norm2.running_var, stages.models["extracted"].norm2.running_var
    )
    assert torch.equal(stages.models["restricted"].conv1.weight, model.conv1.weight)
    assert stages.models["full"] is model and not model.training


def test_it_prints_and_becomes_plain_data(stages):
    text = str(stages)
    assert "2 classes: red, blue" in text and "ms, batch 64" in text and "from scratch, epoch" in text
    assert f"{stages['fine-tuned'].accuracy:.2%}" in text
    plain = json.loads(json.dumps(stages.to_plain()))
    assert plain["classes"] == ["red", "blue"] and len(plain["stages"]) == len(STAGES)
    assert plain["stages"][0]["latency"]["64"]["median_ms"] > 0
    with pytest.raises(TorchsliceError, match="there is no stage 'tuned'; there are: full, restricted, masked"):
        stages["tuned"]


def test_without_training_and_controls(model):
    stages = evaluate_stages(model, DATA, part=PART, classes=["red", "blue"], epochs=0, latency_repeats=1)
    assert [row.name for row in stages.rows] == [
        "full", "restricted", "masked", "extracted", "recalibrated", "random slice, recalibrated"
    ]  # fmt: skip
    stages = evaluate_stages(
        model, DATA, part=PART, classes=["red", "blue"], epochs=0, controls=False, latency_repeats=1
    )
    assert stages.rows[-1].name == "recalibrated"


def test_wrong_use(model):
    with pytest.raises(TorchsliceError, match="Did you mean 'red'"):
        evaluate_stages(model, DATA, part=PART, classes=["reed", "blue"])
    with pytest.raises(TorchsliceError, match="at least two classes"):
        evaluate_stages(model, DATA, part=PART, classes=["red"])
    with pytest.raises(TorchsliceError, match="slice of another model"):
        evaluate_stages(model, DATA, part=Slice({"conv1": torch.ones(8, dtype=torch.bool)}), classes=["red", "blue"])
