"""Training, finding and judging on inputs of any structure: every verb x every kind of input."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import torchslice as ts
from tests.battery.trained import KINDS, QUICK, sealed, trained
from tests.nets import assert_equal, state
from torchslice.graph.neurons import Neurons
from torchslice.judge import calibrate, evaluate_stages, predict, recalibrate
from torchslice.rankings import by_best_rank, widths
from torchslice.slices import union
from torchslice.training import Outcome

NAMES = pytest.mark.parametrize("name", KINDS)
METRICS = ["avg", "var", "ens", "taylor"]


def fresh(name: str) -> Neurons:
    """The neurons of an untrained network of the same kind."""
    torch.manual_seed(1)
    _, task = trained(name)
    return ts.find_neurons(KINDS[name](num_classes=4), task.example, classes=task.classes)


@NAMES
def test_fit_learns_and_accuracy_agrees_with_the_network(name: str) -> None:
    neurons, task = trained(name)
    assert ts.accuracy(neurons.model, task).overall > 0.9
    (inputs, labels) = next(task.batches("test", 100))
    with torch.no_grad():
        logits = neurons.logits(inputs)
    assert torch.allclose(predict(neurons.model, task), logits, atol=1e-5)
    assert ts.accuracy(neurons.model, task).overall == (logits.argmax(1) == labels).double().mean()


@NAMES
def test_fit_resumes(name: str, tmp_path) -> None:
    _, task = trained(name)
    whole, resumed = fresh(name).model, fresh(name).model
    rows = ts.fit(whole, sealed(task), replace(QUICK, epochs=3), folder=tmp_path / "a")
    ts.fit(resumed, sealed(task), replace(QUICK, epochs=2), folder=tmp_path / "b")
    more = ts.fit(resumed, sealed(task), replace(QUICK, epochs=3), folder=tmp_path / "b")
    assert len(rows) == len(more) == 3
    again = fresh(name).model
    assert ts.fit(again, sealed(task), replace(QUICK, epochs=3), folder=tmp_path / "a") == rows
    assert_equal(state(again), state(whole))


@NAMES
def test_contributions_and_semantic_slices(name: str) -> None:
    neurons, task = trained(name)
    before = state(neurons.model)
    options = {"samples_per_class": 12, "progress": False}
    metrics = [*METRICS, "deeplift"] if name == "two inputs" else METRICS
    scores = ts.semantic.contributions(neurons, sealed(task), metric=metrics, **options)
    other = ts.semantic.contributions(neurons, sealed(task), metric=metrics, batch_size=7, **options)
    for metric in metrics:
        for layer, found in scores[metric].items():
            assert found.shape == (4, neurons.layers[layer].count) and found.isfinite().all()
            torch.testing.assert_close(found, other[metric][layer], rtol=1e-4, atol=1e-7)
        assert any(found.any() for found in scores[metric].values())
    for strategy in (ts.semantic.ReachTheta(0.8), ts.semantic.PerClass(0.5), ts.semantic.PerLayer(0.5)):
        slices = ts.semantic.class_slices(neurons, sealed(task), scores, strategy=strategy, metric="taylor")
        pair = slices["ant"] | slices["dog"]
        small = ts.extract(neurons, pair, classes=["ant", "dog"])
        held = predict(ts.masked(neurons, pair), task)[:, [0, 3]]
        assert torch.allclose(predict(small, task), held, atol=1e-4)
    assert_equal(state(neurons.model), before)


@NAMES
def test_gates(name: str) -> None:
    _, task = trained(name)
    gated = ts.gates.attach(fresh(name))
    rows = ts.fit(gated, sealed(task), replace(QUICK, epochs=4), objective=ts.gates.objective())
    assert rows[-1]["loss"] < rows[0]["loss"]
    slices = ts.gates.class_slices(gated, sealed(task), progress=False)
    assert list(slices) == list(task.classes) and all(not s.empty_layers() for s in slices.values())
    assert str(ts.gates.report(gated, sealed(task), slices))
    plain = gated.fold(None)
    assert [type(m) for m in plain.modules()] == [type(m) for m in fresh(name).model.modules()]
    made = ts.reuse(gated, sealed(task), slices, classes=["bee", "cat"], tune=False)
    assert predict(made.model, task.restrict(made.classes)).shape == (12, 2)


@NAMES
def test_sub_tasks(name: str) -> None:
    neurons, (_, task) = fresh(name), trained(name)
    rankings = ts.subtasks.rank(neurons, sealed(task), progress=False)
    objective = ts.subtasks.objective(neurons, rankings)
    training = replace(QUICK, epochs=8, learning_rate=0.1)
    rows = ts.fit(neurons.model, sealed(task), training, objective=objective)
    assert rows[-1]["loss"] < rows[0]["loss"]
    ranking = by_best_rank([rankings["ant"], rankings["cat"]])
    small = ts.extract(
        neurons, ranking.prefix(widths(ranking.layers, 0.5, steps=neurons.steps(8))), classes=["ant", "cat"]
    )
    better = recalibrate(small, sealed(task).restrict(["ant", "cat"]))
    assert ts.accuracy(better, task.restrict(["ant", "cat"])).overall > 0.8


@NAMES
def test_a_sub_model_is_recalibrated_tuned_and_calibrated(name: str) -> None:
    neurons, task = trained(name)
    pair = task.restrict(["bee", "dog"])
    small = ts.extract(neurons, neurons.random(0.5, seed=2), classes=["bee", "dog"])
    before = state(small)
    recalibrated = recalibrate(small, sealed(pair))
    tuned = ts.finetune(recalibrated, sealed(pair), QUICK)
    assert isinstance(tuned, Outcome) and len(tuned.log) == 3
    scores = [ts.accuracy(network, pair, "validation").overall for network in (recalibrated, tuned.model)]
    assert scores[1] == tuned.best["validation_accuracy"] >= scores[0]
    found = ts.find_neurons(tuned.model, pair.example, classes=pair.classes)
    calibrated, temperature = calibrate(found, sealed(pair))
    assert torch.allclose(predict(calibrated, pair) * temperature, predict(tuned.model, pair), rtol=1e-3, atol=1e-3)
    assert_equal(state(small), before)


@NAMES
def test_reuse_and_evaluate_stages(name: str) -> None:
    neurons, task = trained(name)
    slices = {label: neurons.random(0.5, seed=seed) for seed, label in enumerate(task.classes)}
    before = state(neurons.model)
    made = ts.reuse(neurons, sealed(task), slices, classes=["dog", "ant"], training=QUICK)
    assert made.classes == ("ant", "dog") and made.slice == slices["ant"] | slices["dog"]
    assert ts.accuracy(made.model, task.restrict(made.classes)).overall > 0.8
    stages = evaluate_stages(
        neurons, task, union(slices.values()), classes=["ant", "dog"], training=QUICK, latency_repeats=1
    )
    assert stages["full"].accuracy > 0.9 and stages["masked"].accuracy == stages["extracted"].accuracy
    assert stages["extracted"].param_retention < 1 and str(stages)
    assert_equal(state(neurons.model), before)


@NAMES
def test_output_picks_the_logits_everywhere(name: str) -> None:
    neurons, task = trained(name)

    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(neurons.model)

        def forward(self, *inputs, **named):
            return "logits", self.inner(*inputs, **named)

    def output(result):
        found = result[1]
        return found["logits"] if isinstance(found, dict) else getattr(found, "logits", found)

    wrapped = ts.find_neurons(Pair(), task.example, classes=task.classes, output=output)
    slices = {label: wrapped.random(0.5, seed=seed) for seed, label in enumerate(task.classes)}
    scores = ts.semantic.contributions(wrapped, sealed(task), samples_per_class=8, progress=False)
    plain = ts.semantic.contributions(neurons, sealed(task), samples_per_class=8, progress=False)
    for layer, found in plain["taylor"].items():
        torch.testing.assert_close(scores["taylor"][f"inner.{layer}"], found)
    made = ts.reuse(wrapped, sealed(task), slices, classes=["ant", "dog"], training=replace(QUICK, epochs=1))
    assert predict(made.model, task.restrict(made.classes), output=output).shape == (12, 2)
    gated = ts.gates.attach(wrapped)
    ts.fit(gated, sealed(task), replace(QUICK, epochs=1), objective=ts.gates.objective(), output=output)
    ts.gates.class_slices(gated, sealed(task), progress=False)
    stages = evaluate_stages(wrapped, task, wrapped.random(0.5), classes=["ant", "dog"], training=None, controls=False)
    assert stages["full"].accuracy > 0.9
