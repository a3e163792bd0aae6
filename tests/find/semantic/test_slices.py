"""Slices of trained networks: the method as written, slow and literal, beside ours; and slices that can be used."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import torchslice as ts
from tests.find.semantic.nets import inputs_of
from tests.find.semantic.test_selection import literal_cka
from tests.nets import Tiny, lively, stripes, tiny_task
from torchslice import TorchsliceError
from torchslice.cut.extract import masked
from torchslice.find.semantic import (
    ByGroup,
    Contributions,
    PerClass,
    PerLayer,
    ReachTheta,
    SemanticSlices,
    Similarity,
    class_slices,
    contributions,
    grams,
    similarity,
)
from torchslice.find.semantic.whole import cka, complete_network
from torchslice.graph.neurons import Neurons

TASK = stripes()
LAYERS = {"conv1": 8, "conv2": 6}
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def neurons():
    training = ts.Training(epochs=8, learning_rate=0.1, batch_size=30, device="cpu", precision="fp32", progress=False)
    model = ts.finetune(lively(Tiny()), TASK, training).model
    return ts.find_neurons(model, TASK.example)


@pytest.fixture(scope="module")
def scores(neurons):
    return contributions(neurons, TASK, metric=["taylor", "var"], samples_per_class=20, **QUIET)


@pytest.fixture(scope="module")
def found(neurons, scores) -> SemanticSlices:
    return class_slices(neurons, TASK, scores, metric="taylor", strategy=ReachTheta(0.9), **QUIET)


def same(one: SemanticSlices, other: SemanticSlices) -> bool:
    return one == other and one.critical == other.critical


def changed(neurons, change):
    """The same neurons in a copy of the network whose parameters are changed."""
    odd = copy.deepcopy(neurons.model)
    with torch.no_grad():
        change(odd)
    return neurons.on(odd)


# -- theta -------------------------------------------------------------------------------------------------------------
def literal_slices(model, scores, metric, strategy):
    """Steps 1 and 2 of the method, one class, layer and prefix at a time."""
    labels, images = TASK.train.labels[scores.samples], inputs_of(TASK, scores.samples)
    with torch.no_grad():
        one = model.norm1(model.conv1(images)).relu()
        activations = {"conv1": one, "conv2": model.norm2(model.conv2(one)).relu()}  # [B, N, H, W]
    result: dict[str, list[list[int]]] = {}
    for layer, values in activations.items():
        depth = 0.25 if layer == "conv1" else 0.75  # (l - 1/2) / L
        theta = 1 - (1 - strategy.theta) * (strategy.slope + 1) * depth**strategy.slope
        x = values.permute(0, 2, 3, 1)

        def rows(x: Tensor) -> Tensor:
            return x.reshape(-1, x.shape[-1]).double()

        chosen = []
        for label in range(3):
            mine = rows(x[labels == label])
            order = sorted(range(mine.shape[1]), key=lambda i: -scores[metric][layer][label, i].item())
            k = next(k for k in range(1, len(order) + 1) if literal_cka(mine[:, order[:k]], mine) >= theta - 1e-9)
            chosen.append(sorted(order[:k]))
        critical = sorted({i for kept in chosen for i in kept})
        together = scores[metric][layer].sum(0)
        while literal_cka(rows(x)[:, critical], rows(x)) < theta - 1e-9:
            critical = sorted([*critical, max(set(range(len(together))) - {*critical}, key=lambda i: together[i])])
        result[layer] = [*chosen, critical]
    return result


@pytest.mark.parametrize("metric", ["taylor", "var"])
@pytest.mark.parametrize(("theta", "slope"), [(0.7, 0.0), (0.9, 0.0), (0.9, 2.0), (0.99, 1.0), (1.0, 2.0)])
def test_slices_are_those_of_the_method_as_written(neurons, scores, metric, theta, slope):
    few = torch.cat([scores.samples[TASK.train.labels[scores.samples] == label][:3] for label in range(3)])
    scores, strategy = replace(scores, samples=few), ReachTheta(theta, slope)
    ours = strategy.choose(scores, metric, similarity(neurons, TASK, scores, **QUIET))
    kept = {
        layer: [one[layer].nonzero().flatten().tolist() for one in (*ours.values(), ours.critical)] for layer in LAYERS
    }
    assert kept == literal_slices(neurons.model, scores, metric, strategy)


def test_batch_size_and_order_play_no_part(neurons, scores, found):
    mixed = replace(scores, samples=scores.samples.flip(0))
    for batch_size in (1, 7):
        settings = {"strategy": ReachTheta(0.9), "batch_size": batch_size, **QUIET}
        assert same(class_slices(neurons, TASK, mixed, metric="taylor", **settings), found)


def test_layers_share_a_run_as_far_as_memory_goes(neurons, scores, found, monkeypatch):
    runs = Counter()
    handle = neurons.model.conv2.register_forward_pre_hook(lambda module, inputs: runs.update([len(inputs[0])]))
    for matrices, expected in ((64 + 36, 1), (64 + 35, 2), (0, 2)):
        runs.clear()
        monkeypatch.setattr(grams, "MEMORY_GB", 16 * matrices / 2**30)
        assert same(class_slices(neurons, TASK, scores, metric="taylor", strategy=ReachTheta(0.9), **QUIET), found)
        assert runs[20] == 3 * expected  # all samples of the three classes
    handle.remove()


def test_one_similarity_gives_the_slices_of_every_theta_and_metric(neurons, scores, found):
    similar = similarity(neurons, TASK, scores, **QUIET)
    assert same(ReachTheta(0.9).choose(scores, "taylor", similar), found)
    for metric in scores.metrics:
        chosen = [ReachTheta(theta).choose(scores, metric, similar) for theta in (0.5, 0.8, 0.95, 1.0)]
        for smaller, larger in pairwise(chosen):
            assert all(smaller[name] <= larger[name] for name in TASK.classes)
        assert chosen[0].critical != chosen[-1].critical
    with pytest.raises(
        TorchsliceError, match=r"criterion='cka'\) needs similarities: give similarity\(neurons, task, s"
    ):
        ReachTheta().choose(scores, "taylor")


def test_nothing_shrinks_on_the_way(found):
    for name, one in found.items():
        assert one <= found.critical and not one.empty_layers(), name


def test_a_union_that_is_unlike_the_layer_on_all_classes_together_is_completed():
    """Each class needs neuron 0 only, and neuron 2 tells the classes apart: G = diag(1, 1, 10)."""
    scores = Contributions(("a", "b"), {"avg": {"x": torch.tensor([[3.0, 2.0, 1.0]] * 2)}}, *[torch.ones(2)] * 2)
    similar = Similarity({"avg": {"x": torch.ones(2, 3)}}, {"x": torch.tensor([1.0, 1.0, 10.0]).diag()})
    # CKA of the first 1, 2, 3 neurons of contribution: 1 / sqrt(102), 2 / sqrt(2 * 102), 1
    for theta, kept in ((0.09, [1, 0, 0]), (0.13, [1, 1, 0]), (0.9, [1, 1, 1])):
        ours = ReachTheta(theta, slope=0.0).choose(scores, similarity=similar)
        assert ours["a"]["x"].tolist() == ours["b"]["x"].tolist() == [True, False, False]
        assert ours.critical["x"].int().tolist() == kept


@torch.no_grad()
def logits_of(neurons, slice_, inputs):
    return masked(neurons, slice_)(inputs)


def test_critical_neurons_are_completed_until_the_network_answers_alike(neurons):
    """A neuron whose activations are scaled down and whose outgoing weights up means little in its layer, not after."""

    def scaled(odd):
        odd.norm2.weight[0] /= 1000
        odd.norm2.bias[0] /= 1000
        columns = odd.head.weight.view(3, 6, -1)
        columns[:, 0] *= 1000

    odd, added = changed(neurons, scaled), []
    scores = contributions(odd, TASK, metric="avg", samples_per_class=20, **QUIET)
    torch.testing.assert_close(odd.logits(TASK.example), neurons.logits(TASK.example), rtol=1e-3, atol=1e-4)
    inputs = inputs_of(TASK, scores.samples)
    for theta in (0.3, 0.9, 0.97):
        strategy = ReachTheta(theta)
        by_layer = strategy.choose(scores, None, similarity(odd, TASK, scores, **QUIET)).critical
        ours = class_slices(odd, TASK, scores, strategy=strategy, **QUIET).critical
        assert by_layer <= ours and cka(logits_of(odd, ours, inputs), odd.logits(inputs).detach()) >= theta - 1e-6
        added.append(len(ours - by_layer))
    assert max(added) > 0
    assert complete_network(odd, TASK, scores["avg"], odd.full(), 1.0, scores.samples) == odd.full()


def test_mass_reaches_theta_of_every_layer(scores):
    ours = ReachTheta(0.8, 1.0, "mass").choose(scores, "taylor")
    for layer, asked in {"conv1": 0.9, "conv2": 0.7}.items():
        values = scores["taylor"][layer]
        for row, one in zip(values, ours.values(), strict=True):
            assert row[one[layer]].sum() >= asked * row.sum()
        assert values.mean(0)[ours.critical[layer]].sum() >= asked * values.mean(0).sum()


# -- fractions ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_fractions_by_class_and_by_layer(scores, fraction):
    ours, one = (strategy(fraction).choose(scores, "taylor") for strategy in (PerClass, PerLayer))
    for layer, width in LAYERS.items():
        count = max(1, round(fraction * width))
        for row, slice_ in zip(scores["taylor"][layer], ours.values(), strict=True):
            assert slice_[layer].sum() == count and slice_[layer][row.argmax()]
        assert one.critical[layer].sum() == count
        assert one.critical[layer][scores["taylor"][layer].sum(0).argmax()]
    assert set(one.values()) == {one.critical}
    assert ours.critical == ours["red"] | ours["green"] | ours["blue"]


# -- every strategy ----------------------------------------------------------------------------------------------------
STRATEGIES = [
    *(ReachTheta(0.9), ReachTheta(0.99), ReachTheta(0.9, slope=0.0), ReachTheta(0.9, criterion="mass")),
    *(PerClass(0.5), PerLayer(0.5), PerLayer(0.25), ByGroup(), ByGroup(0.1)),
]


def residual_scores(seed: int) -> tuple[Neurons, Contributions]:
    """Return the neurons of a residual network for TASK, and random contributions of them."""
    model = lively(ts.models.create("resnet20", num_classes=3, channels=1, width=0.25))
    neurons = ts.find_neurons(model, TASK.example)
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(3, layer.count, generator=generator) for name, layer in neurons.layers.items()}
    return neurons, Contributions(TASK.classes, {"avg": scores}, torch.arange(3), torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("strategy", [PerClass(0.5), PerLayer(0.4), ReachTheta(0.9, criterion="mass")])
def test_tied_slices_give_networks_as_small_as_they_are(strategy):
    neurons, scores = residual_scores(seed=1)
    tied, untied = (
        class_slices(neurons, TASK, scores, strategy=strategy, tied=tied, **QUIET) for tied in (True, False)
    )
    kept = [ts.retention(neurons, found["red"] | found["blue"]) for found in (tied, untied)]
    assert kept[0].built_mac == pytest.approx(kept[0].mac) and kept[1].built_mac > 1.02 * kept[1].mac
    assert all(slice_ == neurons.closed(slice_) <= tied.critical for slice_ in tied.values())


def test_what_leaves_together_is_chosen_by_its_mean_score():
    neurons, scores = residual_scores(seed=2)
    stream = [name for name, layer in neurons.layers.items() if layer.coupled and layer.count == 4]
    assert len(stream) == 4  # the stem and the ends of three blocks
    of = scores["avg"]
    mean = sum(of[name].double() / of[name].norm() for name in stream)
    found = class_slices(neurons, TASK, scores, strategy=PerClass(0.25), **QUIET)
    for label, slice_ in enumerate(found.values()):
        assert {slice_[name].nonzero().item() for name in stream} == {int(mean[label].argmax())}


def test_settings_make_a_difference_and_are_kept(neurons, scores):
    made = [class_slices(neurons, TASK, scores, metric="taylor", strategy=one, **QUIET) for one in STRATEGIES]
    made.append(class_slices(neurons, TASK, scores, metric="var", strategy=STRATEGIES[0], **QUIET))
    assert len({tuple(one.values()) for one in made}) == len(made) == len({str(one).splitlines()[0] for one in made})
    assert [one.strategy for one in made[:-1]] == STRATEGIES and made[-1].metric == "var"


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_every_strategy_has_an_answer_for_a_layer_that_is_dead_or_constant(neurons, strategy, value):
    def constant(odd):
        odd.norm1.weight.zero_()
        odd.norm1.bias.fill_(value)  # and so conv2 is constant as well

    odd = changed(neurons, constant)
    scores = contributions(odd, TASK, metric="avg", correct_only=False, samples_per_class=20, **QUIET)
    assert (scores["avg"]["conv1"] == 0).all() == (value == 0)
    ours = class_slices(odd, TASK, scores, strategy=strategy, **QUIET)
    assert not any(one.empty_layers() for one in (*ours.values(), ours.critical))
    if strategy.compares:
        assert all(one["conv1"].all() for one in ours.values())  # nothing is like it but the whole


def test_dead_neurons_are_not_needed(neurons):
    def dead(odd):
        odd.norm1.weight[[1, 4]] = 0
        odd.norm1.bias[[1, 4]] = -1

    odd = changed(neurons, dead)
    scores = contributions(odd, TASK, metric="var", correct_only=False, samples_per_class=20, **QUIET)
    for theta in (0.5, 1.0):
        ours = class_slices(odd, TASK, scores, strategy=ReachTheta(theta), **QUIET)
        for one in (*ours.values(), ours.critical):
            assert not one["conv1"][[1, 4]].any() and one["conv1"].any()


def test_activations_that_are_not_finite_are_an_error(neurons, scores):
    odd = changed(neurons, lambda odd: odd.norm2.bias[1].fill_(float("nan")))
    similarity(neurons, TASK, scores, **QUIET)
    with pytest.raises(TorchsliceError, match="layer 'conv2' for class 'red' are NaN or infinite"):
        similarity(odd, TASK, scores, **QUIET)


def test_tokens_are_positions():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.head = nn.Linear(6, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:  # [B, 1, 6, 6], rows are tokens
            return self.head(torch.relu(self.hidden(x[:, 0])).mean(1))

    task, model = tiny_task(), Tokens()
    neurons = ts.find_neurons(model, task.example)
    scores = contributions(neurons, task, metric="avg", correct_only=False, **QUIET)
    images = inputs_of(task)[task.train.labels == 0]
    values = torch.relu(model.hidden(images[:, 0])).detach().double()  # [B, tokens, N]
    rows, order = values.flatten(0, 1), scores["avg"]["hidden"][0].argsort(descending=True, stable=True)
    curve = similarity(neurons, task, scores, **QUIET).curves["avg"]["hidden"][0]
    expected = [literal_cka(rows[:, order[:k]], rows) for k in range(1, 11)]
    torch.testing.assert_close(curve, torch.tensor(expected, dtype=torch.float64))


# -- the result --------------------------------------------------------------------------------------------------------
def test_the_slices_are_a_mapping_and_used_like_any_other(neurons, found):
    assert list(found) == list(TASK.classes) and len(found) == 3 and dict(found)["red"] == found["red"]
    for slice_ in (*found.values(), found.critical):
        small, held = ts.extract(neurons, slice_, classes=[0, 2]), masked(neurons, slice_)
        torch.testing.assert_close(small(TASK.example), held(TASK.example)[:, [0, 2]])
    assert found["red"].neuron_retention < 1


def test_without_scores_they_are_measured(neurons, found):
    scores = contributions(neurons, TASK, seed=3, **QUIET)
    ours = class_slices(neurons, TASK, seed=3, strategy=PerClass(0.5), **QUIET)
    assert same(ours, PerClass(0.5).choose(scores)) and ours.metric == "taylor"


def test_it_prints_and_becomes_plain_data(found):
    text = str(found)
    assert text.startswith("ReachTheta(theta=0.9, slope=1.0, criterion='cka') by taylor\n")
    assert all(layer in text for layer in LAYERS) and f"{found.critical.neuron_retention:.1%}" in text
    plain = json.loads(json.dumps(found.summary()))
    options = {"theta": 0.9, "slope": 1.0, "criterion": "cka"}
    assert plain["strategy"] == {"strategy": "ReachTheta", **options} and plain["metric"] == "taylor"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ReachTheta(0), r"theta must be in \(0, 1\], got 0"),
        (lambda: ReachTheta(float("nan")), r"theta must be in \(0, 1\], got nan"),
        (lambda: ReachTheta(slope=-1), "slope must be a number of at least 0, got -1"),
        (lambda: ReachTheta(criterion="mas"), "unknown criterion 'mas'. Did you mean 'mass'"),
        (lambda: PerClass(0), r"neuron_fraction must be in \(0, 1\], got 0"),
        (lambda: PerLayer(1.01), r"neuron_fraction must be in \(0, 1\], got 1.01"),
    ],
)
def test_settings_that_are_refused(make, text):
    with pytest.raises(TorchsliceError, match=text):
        make()


def test_contributions_of_something_else_are_refused(neurons, scores):
    wider = replace(scores, scores={"var": {**scores["var"], "conv1": torch.ones(3, 9)}})
    with pytest.raises(TorchsliceError, match="contributions of other neurons than the model's"):
        class_slices(neurons, TASK, wider, **QUIET)
    with pytest.raises(TorchsliceError, match="to other classes than those of stripes"):
        class_slices(neurons, TASK.restrict(["red", "blue"]), scores, metric="var", **QUIET)
    with pytest.raises(TorchsliceError, match="by taylor, var and none is named"):
        class_slices(neurons, TASK, scores, **QUIET)
    with pytest.raises(TorchsliceError, match="batch_size must be at least 1, got 0"):
        similarity(neurons, TASK, scores, batch_size=0, **QUIET)
