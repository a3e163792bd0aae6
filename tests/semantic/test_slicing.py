"""Slices of trained networks: the method as written, slow and literal, beside ours; and slices that can be used."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tests.semantic.test_cka import literal_cka
from tests.training.tiny import tiny_data, tiny_net
from tests.use.nets import Tiny, lively, stripes
from torch import Tensor, nn

from torchslice.core.find import find_neurons
from torchslice.core.hold import masked
from torchslice.errors import TorchsliceError
from torchslice.modular import attach_gates, mean_gate_values
from torchslice.semantic import Rule, SemanticSlices, contributions, grams, prefix_similarity, slice_model, slices_from
from torchslice.use import evaluate_stages, extract, finetune, retention

DATA = stripes()
QUIET = {"device": "cpu", "progress": False}
LAYERS = {"conv1": 8, "conv2": 6}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    settings = {"batch_size": 30, "precision": "fp32", **QUIET}
    return finetune(lively(Tiny()), DATA, epochs=8, learning_rate=0.1, **settings).model


@pytest.fixture(scope="module")
def scores(model):
    return contributions(model, DATA, metric=["taylor", "var"], samples_per_class=20, **QUIET)


@pytest.fixture(scope="module")
def found(model, scores) -> SemanticSlices:
    return slice_model(model, DATA, scores, metric="taylor", theta=0.9, **QUIET)


def activations(model: Tiny, images: Tensor) -> dict[str, Tensor]:
    """What the neurons give after norm and activation, [B, N, H, W]."""
    with torch.no_grad():
        one = model.norm1(model.conv1(images)).relu()
        return {"conv1": one, "conv2": model.norm2(model.conv2(one)).relu()}


def literal_slices(model, scores, metric, mean_theta, slope, positions):
    """Steps 1 and 2 of the method, one class, layer and prefix at a time."""
    split = DATA.train.take(scores.samples)
    result: dict[str, list[list[int]]] = {}
    for layer, values in activations(model, DATA.normalise(split.images)).items():
        place = 0.25 if layer == "conv1" else 0.75  # (l - 1/2) / L
        theta = 1 - (1 - mean_theta) * (slope + 1) * place**slope
        x = values.mean((2, 3)) if positions == "mean" else values.permute(0, 2, 3, 1)

        def rows(x: Tensor) -> Tensor:
            return x.reshape(-1, x.shape[-1]).double()

        chosen = []
        for label in range(3):
            mine = rows(x[split.labels == label])
            order = sorted(range(mine.shape[1]), key=lambda i: -scores[metric][layer][label, i].item())
            k = next(k for k in range(1, len(order) + 1) if literal_cka(mine[:, order[:k]], mine) >= theta - 1e-9)
            chosen.append(sorted(order[:k]))
        critical = sorted({i for part in chosen for i in part})
        together = scores[metric][layer].sum(0)
        while literal_cka(rows(x)[:, critical], rows(x)) < theta - 1e-9:
            critical = sorted([*critical, max(set(range(len(together))) - {*critical}, key=lambda i: together[i])])
        result[layer] = [*chosen, critical]
    return result


@pytest.mark.parametrize("metric", ["taylor", "var"])
@pytest.mark.parametrize(
    ("positions", "theta", "slope"),
    [
        *[("mean", 0.7, 0.0), ("mean", 0.9, 0.0), ("mean", 0.9, 1.0), ("mean", 0.99, 2.0), ("mean", 1.0, 2.0)],
        *[("all", 0.9, 0.0), ("all", 0.9, 2.0), ("all", 0.99, 1.0)],
    ],
)
def test_slices_are_those_of_the_method_as_written(model, scores, metric, theta, slope, positions):
    few = torch.cat([scores.samples[DATA.train.labels[scores.samples] == label][:3] for label in range(3)])
    scores = scores if positions == "mean" else replace(scores, samples=few)
    ours = slice_model(model, DATA, scores, metric=metric, theta=theta, slope=slope, positions=positions, **QUIET)
    parts = [*ours.by_class.values(), ours.critical]
    kept = {layer: [part[layer].nonzero().flatten().tolist() for part in parts] for layer in LAYERS}
    assert kept == literal_slices(model, scores, metric, theta, slope, positions)


def test_the_settings_make_a_difference(model, scores, found):
    others = [
        {"theta": 0.99},
        {"criterion": "mass"},
        {"metric": "var"},
        {"positions": "mean"},
        {"slope": 0.0},
        {"slicer": "category"},
        {"slicer": "global", "share": 0.25},
    ]
    settings = [{"metric": "taylor", "theta": 0.9, **other} for other in others]
    slices = [found, *(slice_model(model, DATA, scores, **setting, **QUIET) for setting in settings)]
    assert len({tuple(one.by_class.values()) for one in slices}) == len(slices)
    assert len({str(one.rule) for one in slices}) == len(slices)


def test_batch_size_order_and_memory_play_no_part(model, scores, found):
    mixed = replace(scores, samples=scores.samples.flip(0))
    for settings in ({"batch_size": 7}, {"batch_size": 1}, {"memory_gb": 1e-9}):
        again = slice_model(model, DATA, mixed, metric="taylor", theta=0.9, **settings, **QUIET)
        assert again.by_class == found.by_class and again.critical == found.critical


def test_layers_share_a_run_as_far_as_memory_goes(model, scores, monkeypatch):
    runs = []

    def counted(*arguments, layers, **options):
        runs.append(layers)
        return prefix_similarity(*arguments, layers=layers, **options)

    monkeypatch.setattr("torchslice.semantic.slicing.prefix_similarity", counted)
    for memory_gb in (16 * (64 + 36) / 2**30, 16 * (64 + 35) / 2**30):
        slice_model(model, DATA, scores, metric="taylor", memory_gb=memory_gb, **QUIET)
    assert runs == [["conv1", "conv2"], ["conv1"], ["conv2"]]


def test_one_run_gives_the_slices_of_every_theta_and_metric(model, scores, found):
    similarity = prefix_similarity(model, DATA, scores, **QUIET)
    again = slices_from(scores, Rule("taylor", theta=0.9), similarity)
    assert again.by_class == found.by_class and again.critical == found.critical
    for metric in scores.metrics:
        parts = [slices_from(scores, Rule(metric, theta=theta), similarity) for theta in (0.5, 0.8, 0.95, 1.0)]
        for smaller, larger in pairwise(parts):
            assert all(smaller.by_class[name] <= larger.by_class[name] for name in DATA.classes)
        assert parts[0].critical != parts[-1].critical
    with pytest.raises(TorchsliceError, match=r"CKA of position means >= 0.95.*\) needs prefix_similarity.*'mean'"):
        slices_from(scores, Rule("taylor", positions="mean"), similarity)


def test_nothing_shrinks_on_the_way(found, scores):
    for name, part in found.by_class.items():
        assert part <= found.critical and not part.empty_layers(), name
    for layer, groups in found.groups.items():
        assert sorted(name for group in groups for name in group.classes) == sorted(DATA.classes)
        for group in groups:
            assert group.part <= found.critical
            assert all(found.by_class[name] <= group.part for name in group.classes)
        masks = [set(part[layer].nonzero().flatten().tolist()) for part in found.by_class.values()]
        jaccard = torch.tensor([[len(a & b) / len(a | b) for b in masks] for a in masks], dtype=torch.float64)
        torch.testing.assert_close(found.overlap[layer], jaccard)
        assert found.linkage[layer].shape == (2, 4)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_shares_need_no_look_at_the_data(model, scores, share, monkeypatch):
    monkeypatch.setattr(grams, "class_scatters", None)
    rule = {"metric": "taylor", "share": share, **QUIET}
    ours = slice_model(model, DATA, scores, slicer="category", **rule)
    same = slice_model(model, DATA, scores, slicer="global", **rule)
    for layer, width in LAYERS.items():
        count = max(1, round(share * width))
        for row, part in zip(scores["taylor"][layer], ours.by_class.values(), strict=True):
            assert part[layer].sum() == count and part[layer][row.argmax()]
        assert same.critical[layer].sum() == count and len(same.groups[layer]) == 1
        assert same.critical[layer][scores["taylor"][layer].sum(0).argmax()]
    assert set(same.by_class.values()) == {same.critical}
    assert ours.critical == ours.by_class["red"] | ours.by_class["green"] | ours.by_class["blue"]


def test_mass_completes_by_mass(model, scores):
    ours = slice_model(model, DATA, scores, metric="taylor", criterion="mass", theta=0.8, slope=1.0, **QUIET)
    asked = {"conv1": 0.9, "conv2": 0.7}
    for layer, values in scores["taylor"].items():
        for row, part in zip(values, ours.by_class.values(), strict=True):
            assert row[part[layer]].sum() >= asked[layer] * row.sum()
        together = values.mean(0)
        assert together[ours.critical[layer]].sum() >= asked[layer] * together.sum()


def test_constant_layers_are_kept_whole_and_dead_neurons_are_not_needed(model):
    odd = copy.deepcopy(model)
    with torch.no_grad():
        odd.norm1.weight[[1, 4]] = 0
        odd.norm1.bias[[1, 4]] = -1  # dead after the activation function
        odd.norm2.weight.zero_()  # conv2 is constant
        odd.norm2.bias.fill_(0.3)
    scores = contributions(odd, DATA, metric="var", correct_only=False, samples_per_class=20, **QUIET)
    for theta in (0.5, 1.0):
        ours = slice_model(odd, DATA, scores, theta=theta, **QUIET)
        for part in (*ours.by_class.values(), ours.critical):
            assert part["conv2"].all()
            assert not part["conv1"][[1, 4]].any() and part["conv1"].any()


RULES = [
    *({"positions": "mean"}, {"positions": "all"}, {"criterion": "mass"}),
    *({"slicer": "category", "share": 0.5}, {"slicer": "global", "share": 0.5}),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(map(str, rule.values())))
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_every_rule_has_an_answer_for_a_layer_that_is_dead_or_constant(model, rule, value):
    odd = copy.deepcopy(model)
    with torch.no_grad():
        odd.norm1.weight.zero_()
        odd.norm1.bias.fill_(value)  # and so conv2 is constant as well
    scores = contributions(odd, DATA, metric="avg", correct_only=False, samples_per_class=20, **QUIET)
    assert (scores["avg"]["conv1"] == 0).all() == (value == 0)
    ours = slice_model(odd, DATA, scores, theta=0.9, **rule, **QUIET)
    kept = int(ours.critical["conv1"].sum())
    assert kept == (4 if "share" in rule else 8)  # by mass, seven of eight equal neurons hold less than 90 %
    assert not ours.critical.empty_layers()
    extract(odd, ours.critical, DATA.example)


@pytest.mark.parametrize("positions", ["mean", "all"])
def test_activations_that_are_not_finite_are_an_error(model, scores, positions):
    odd = copy.deepcopy(model)
    with torch.no_grad():
        odd.norm2.bias[1] = float("nan")
    rule = {"metric": "var", "positions": positions, **QUIET}
    slice_model(model, DATA, scores, **rule)
    with pytest.raises(TorchsliceError, match="layer 'conv2' for class 'red' are NaN or infinite"):
        slice_model(odd, DATA, scores, **rule)


def test_the_slices_are_used_like_any_other(model, found):
    example = DATA.example
    for part in (*found.by_class.values(), found.critical, found.groups["conv2"][0].part):
        small = extract(model, part, example, classes=[0, 2])
        with masked(model, part, example), torch.no_grad():
            expected = model(example)[:, [0, 2]]
        torch.testing.assert_close(small(example), expected)
    kept = retention(model, find_neurons(model, example), found.by_class["red"])
    assert kept.neuron == found.by_class["red"].neuron_retention < 1
    part = found.by_class["red"] | found.by_class["blue"]
    settings = {"epochs": 0, "controls": False, "latency_repeats": 1}
    stages = evaluate_stages(model, DATA, part=part, classes=["red", "blue"], **settings)
    assert stages["masked"].accuracy == stages["extracted"].accuracy
    assert stages["masked"].neuron_retention == part.neuron_retention


def test_networks_that_were_trained_modular(model):
    gated = attach_gates(copy.deepcopy(model), DATA.example)
    means = mean_gate_values(gated, DATA, **QUIET)
    for plain in (gated.fold(), gated.fold({layer: mean.mean(0) for layer, mean in means.items()})):
        scores = contributions(plain, DATA, correct_only=False, samples_per_class=20, **QUIET)
        ours = slice_model(plain, DATA, scores, theta=0.9, **QUIET)
        assert ours.rule.metric == "taylor" and len(ours.critical) < sum(LAYERS.values())
        extract(plain, ours.critical, DATA.example)


def test_tokens_are_positions():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.head = nn.Linear(6, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:  # [B, 1, 6, 6], rows are tokens
            return self.head(torch.relu(self.hidden(x[:, 0])).mean(1))

    data, model = tiny_data(), Tokens()
    scores = contributions(model, data, metric="avg", correct_only=False, **QUIET)
    images = data.normalise(data.train.images[data.train.labels == 0])
    values = torch.relu(model.hidden(images[:, 0])).detach().double()  # [B, tokens, N]
    for positions, rows in (("mean", values.mean(1)), ("all", values.flatten(0, 1))):
        curve = prefix_similarity(model, data, scores, positions=positions, **QUIET).curves["avg"]["hidden"][0]
        order = scores["avg"]["hidden"][0].argsort(descending=True, stable=True)
        expected = [literal_cka(rows[:, order[:k]], rows) for k in range(1, 11)]
        torch.testing.assert_close(curve, torch.tensor(expected, dtype=torch.float64))


def test_the_model_and_its_mode_are_left_alone():
    data, model = tiny_data(), tiny_net(inplace=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    slice_model(model, data, contributions(model, data, correct_only=False, **QUIET), **QUIET)
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_it_prints_and_becomes_plain_data(found):
    text = str(found)
    assert "semantic slicer, taylor contributions, CKA of whole maps >= 0.9 on average, slope 1" in text
    assert all(layer in text for layer in LAYERS) and f"{found.critical.neuron_retention:.1%}" in text
    plain = json.loads(json.dumps(found.to_plain()))
    rule = {
        "metric": "taylor",
        "slicer": "semantic",
        "criterion": "cka",
        "theta": 0.9,
        "slope": 1.0,
        "positions": "all",
    }
    assert plain["rule"] == rule
    again = SemanticSlices.from_plain(plain)
    assert again.by_class == found.by_class and again.critical == found.critical and again.groups == found.groups
    assert again.rule == found.rule and again.to_plain() == plain
    assert Rule("var", "global", share=0.3).to_plain() == {"metric": "var", "slicer": "global", "share": 0.3}
    for damaged in ({}, {**plain, "rule": {"colour": 1}}, {**plain, "classes": []}, {**plain, "critical": None}):
        with pytest.raises(TorchsliceError, match="no semantic slices.*slice the model again"):
            SemanticSlices.from_plain(damaged)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"theta": 0}, r"theta must be in \(0, 1\], got 0"),
        ({"theta": 1.01}, r"theta must be in \(0, 1\], got 1.01"),
        ({"theta": float("nan")}, r"theta must be in \(0, 1\], got nan"),
        ({"slicer": "category", "share": 0}, r"share must be in \(0, 1\], got 0"),
        ({"slicer": "categroy"}, "unknown slicer 'categroy'. Did you mean 'category'"),
        ({"criterion": "mas"}, "unknown criterion 'mas'. Did you mean 'mass'"),
        ({"positions": "some"}, "unknown positions 'some'.*mean, all"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"metric": None}, "several metrics; choose one: metric='taylor' or metric='var'"),
        ({"metric": "avg"}, "no scores of metric 'avg', only of taylor, var"),
    ],
)
def test_settings_that_are_refused(model, scores, settings, text):
    with pytest.raises(TorchsliceError, match=text):
        slice_model(model, DATA, scores, **{"metric": "taylor", **settings}, **QUIET)


def test_contributions_of_something_else_are_refused(model, scores):
    only = replace(scores, scores={"var": {"conv1": scores["var"]["conv1"]}})
    with pytest.raises(
        TorchsliceError, match="of another model: layer 'conv2' has no neurons there and 6 in the model"
    ):
        slice_model(model, DATA, only, **QUIET)
    wider = replace(scores, scores={"var": {**scores["var"], "conv1": torch.ones(3, 9)}})
    with pytest.raises(TorchsliceError, match="layer 'conv1' has 9 neurons there and 8 in the model"):
        slice_model(model, DATA, wider, **QUIET)
    with pytest.raises(TorchsliceError, match="to other classes than the 2 of stripes"):
        slice_model(model, DATA.restrict(["red", "blue"]), scores, metric="var", **QUIET)
