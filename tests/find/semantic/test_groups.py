"""Semantic groups: by hand, beside slow literal references, and on networks whose groups are known."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

import torchslice as ts
from tests.nets import Tiny, lively, stripes
from torchslice import TorchsliceError
from torchslice.find.semantic import ByGroup, Contributions, Groups, class_slices, contributions, groups
from torchslice.find.semantic.groups import best_fit, distances, families, profiles, sets_of, tree
from torchslice.graph.tied import closed

NAMES = ("cat", "dog", "car", "truck")
PLAIN = {"tied": False}


def made(scores: dict[str, list[list[float]]], names: tuple[str, ...] = NAMES) -> Contributions:
    """Contributions, given neuron by neuron: {layer: N rows of C}."""
    plain = {layer: torch.tensor(rows, dtype=torch.float64).T for layer, rows in scores.items()}
    return Contributions(names, {"avg": plain}, torch.arange(1), torch.ones(len(names), dtype=torch.int64))


def found_in(scores: Contributions, **options) -> Groups:
    return groups(None, scores, **PLAIN, **options)  # neurons are asked only what is tied


KNOWN = made(
    {
        "early": [[5, 5, 5, 5], [4, 4, 0.5, 0.5], [0, 0, 0, 0], [6, 6, 6, 5]],
        "late": [[9, 1, 0, 0], [0, 8, 0, 1], [1, 0, 7, 0], [0, 0, 1, 9], [0.2, 0.2, 5, 5], [3, 3, 0, 0]],
    }
)


# -- by hand -----------------------------------------------------------------------------------------------------------
def test_groups_that_are_known_are_found_across_layers():
    found = found_in(KNOWN)
    assert [group.classes for group in found] == [
        *(("cat",), ("dog",), ("car",), ("truck",), ("cat", "dog"), ("car", "truck"), NAMES)
    ]
    kept = {
        group.classes: {layer: mask.nonzero().flatten().tolist() for layer, mask in group.slice.masks.items()}
        for group in found
    }
    assert kept[("cat", "dog")] == {"early": [1], "late": [5]} and kept[("car", "truck")] == {"early": [], "late": [4]}
    assert kept[NAMES] == {"early": [0, 3], "late": []} and kept[("truck",)] == {"early": [], "late": [3]}
    assert found.unused["early"].tolist() == [False, False, True, False] and len(found.unused) == 1
    assert found.families(2) == [("cat", "dog"), ("car", "truck")] and set(found.order[:2]) in (
        {"cat", "dog"},
        {"car", "truck"},
    )
    assert len(found.serving(["cat"])) == 2 + 2 + 1 and len(found.only(["cat", "dog"])) == 4 and len(found.shared) == 2


def test_with_families_the_finest_sets_are_theirs():
    found = found_in(KNOWN, count=2)
    assert [group.classes for group in found] == [("cat", "dog"), ("car", "truck"), NAMES]
    assert [len(group.slice) for group in found] == [4, 3, 2]
    assert [group.classes for group in found_in(KNOWN, count=1)] == [NAMES]


def test_profiles_by_hand():
    # layers of length 1: a = [[.6, 0], [.8, 0]] and b = [[0.6], [.8]]; a class is divided by its mean over 3 neurons
    of = profiles({"a": torch.tensor([[3.0, 0.0], [4.0, 0.0]]), "b": torch.tensor([[6.0], [8.0]])})
    assert of["a"].tolist() == [[pytest.approx(0.5**0.5)] * 2, [0, 0]] and of["b"][0].tolist() == of["a"][0].tolist()


def test_outside_says_how_much_may_go_to_others():
    sets = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 1, 1]]).bool()
    profile = torch.tensor([[1.0, 0.3, 0.3]], dtype=torch.float64)
    assert best_fit(profile, sets, 0.3).tolist() == [0] and best_fit(profile, sets, 0.29).tolist() == [4]
    # one class explains 1 * 2 / 3 * 0.7^2 = .33, two 2 * 1 / 3 * .35^2 = .08


def test_families_by_hand():
    linkage = torch.tensor([[0, 1, 0.1, 2], [2, 3, 0.2, 2], [4, 5, 0.9, 4]]).double()
    assert [families(linkage, count) for count in (1, 2, 3)] == [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[2], [3], [0, 1]]]
    assert sets_of(linkage, 4).int().sum(1).tolist() == [1, 1, 1, 1, 2, 2, 4] and len(sets_of(linkage, 3)) == 5


# -- literal references ------------------------------------------------------------------------------------------------
@st.composite
def several_profiles(draw: st.DrawFn) -> Tensor:
    classes, count = draw(st.integers(2, 6)), draw(st.integers(3, 12))
    rows = st.lists(st.integers(0, 9), min_size=classes, max_size=classes)
    return normalize(torch.tensor(draw(st.lists(rows, min_size=count, max_size=count))).double(), dim=1)


@given(several_profiles(), st.sampled_from([0.0, 0.3, 0.5, 0.9]))
def test_the_best_set_is_that_of_a_slow_search(rows, outside):
    sets = sets_of(tree(distances({"x": rows})), rows.shape[1])
    for row, chosen in zip(rows.tolist(), best_fit(rows, sets, outside).tolist(), strict=True):
        fits = []
        for inside in sets.tolist():
            ins = [v for v, take in zip(row, inside, strict=True) if take]
            outs = [v for v, take in zip(row, inside, strict=True) if not take]
            mean_in, mean_out = sum(ins) / len(ins), sum(outs) / max(len(outs), 1)
            mean = sum(row) / len(row)
            between = len(ins) * (mean_in - mean) ** 2 + len(outs) * (mean_out - mean) ** 2
            fits.append((between if mean_out <= outside * mean_in + 1e-9 else -1) if outs else 0)
        assert fits[chosen] == pytest.approx(max(fits))


@given(several_profiles())
def test_distances_are_those_of_correlation(rows):
    apart = rows - rows.mean(1, keepdim=True)
    linkage = tree(distances({"x": rows[:2], "y": rows[2:]}))
    spread = apart.std(0)
    if (spread > 1e-6).all():
        closest = (1 - torch.corrcoef(apart.T)).fill_diagonal_(9).min()
        assert linkage[0, 2].item() == pytest.approx(float(closest), abs=1e-9)
    assert linkage[-1, 3] == rows.shape[1]


@given(several_profiles(), st.data())
def test_every_neuron_is_in_one_group_or_unused_and_less_outside_shares_more(rows, data):
    names = tuple("abcdef"[: rows.shape[1]])
    scores = made({"x": rows[:2].tolist(), "y": rows[2:].tolist()}, names)
    low, high = sorted(data.draw(st.tuples(*[st.sampled_from([0.0, 0.2, 0.5, 0.8])] * 2)))
    few, many = found_in(scores, outside=low), found_in(scores, outside=high)
    for found in (few, many):
        everyone = [found.unused, *(group.slice for group in found)]
        assert sum(map(len, everyone)) == len(rows) and len(found.serving(names)) + len(found.unused) == len(rows)
        assert found.only([names[0]]) <= found.serving([names[0]])
    assert many.shared <= few.shared and few.linkage.equal(many.linkage)
    scaled = made({"x": (7 * rows[:2]).tolist(), "y": rows[2:].tolist()}, names)
    assert [g.slice for g in found_in(scaled)] == [g.slice for g in found_in(scores)] or rows.sum() == 0


# -- odd networks ------------------------------------------------------------------------------------------------------
def test_profiles_that_agree_are_one_group_and_it_says_so():
    found = found_in(made({"x": [[2, 2, 2, 2], [1, 1, 1, 1]]}))
    assert len(found) == 1 and found[0].classes == NAMES and len(found.shared) == 2
    assert "1 semantic group of 2 neurons" in str(found) and "No neuron tells classes apart" in str(found)


def test_two_classes_and_a_dead_layer():
    found = found_in(made({"x": [[2, 0], [1, 1], [0, 3]], "dead": [[0, 0], [0, 0]]}, ("yes", "no")))
    assert [(group.classes, len(group.slice)) for group in found] == [(("yes",), 1), (("no",), 1), (("yes", "no"), 1)]
    assert found.unused["dead"].all() and len(found.unused) == 2
    assert len(found_in(made({"x": [[0, 0], [0, 0]]}, ("yes", "no")))) == 0


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: found_in(KNOWN, outside=1), r"outside must be in \[0, 1\), got 1"),
        (lambda: found_in(KNOWN, count=5), "count must be 1 to 4, the number of classes; got 5"),
        (lambda: found_in(KNOWN, count=0), "count must be 1 to 4"),
        (lambda: found_in(KNOWN).serving(["kat"]), "unknown class 'kat'. Did you mean 'cat'"),
        (lambda: found_in(KNOWN).families(9), "count must be 1 to 4"),
        (lambda: ByGroup(-0.1), r"outside must be in \[0, 1\), got -0.1"),
    ],
)
def test_what_is_refused(make, text):
    with pytest.raises(TorchsliceError, match=text):
        make()


# -- trained networks --------------------------------------------------------------------------------------------------
TASK = stripes()


@pytest.fixture(scope="module")
def neurons():
    training = ts.Training(epochs=8, learning_rate=0.1, batch_size=30, device="cpu", precision="fp32", progress=False)
    return ts.find_neurons(ts.finetune(lively(Tiny()), TASK, training).model, TASK.example, classes=TASK.classes)


def test_the_slices_of_a_class_are_its_groups(neurons):
    scores = contributions(neurons, TASK, metric="taylor", samples_per_class=20, progress=False)
    found, slices = groups(neurons, scores), class_slices(neurons, TASK, scores, strategy=ByGroup(), progress=False)
    for name, slice_ in slices.items():
        assert found.serving([name]) <= slice_ and not slice_.empty_layers()
        assert len(slice_ - found.serving([name])) <= len(slice_.layers)  # where a layer would be empty
    small = ts.extract(neurons, slices["red"], classes=["red", "blue"])
    assert small(TASK.example).shape == (len(TASK.example), 2)
    plain = json.loads(json.dumps(found.to_plain()))
    assert [group["classes"] for group in plain["groups"]] == [list(group.classes) for group in found]
    assert ts.Slice.from_plain(plain["unused"]) == found.unused and sorted(plain["order"]) == sorted(TASK.classes)


def test_what_leaves_together_is_in_one_group():
    model = lively(ts.models.create("resnet20", num_classes=3, channels=1, width=0.25))
    neurons = ts.find_neurons(model, TASK.example, classes=TASK.classes)
    generator = torch.Generator().manual_seed(0)
    of = {name: torch.rand(3, layer.count, generator=generator) ** 4 for name, layer in neurons.layers.items()}
    scores = Contributions(TASK.classes, {"avg": of}, torch.arange(3), torch.ones(3, dtype=torch.int64))
    found = groups(neurons, scores)
    assert len(found) > 2 and all(closed(neurons.sets, group.slice) == group.slice for group in found)
    assert any(closed(neurons.sets, g.slice) != g.slice for g in groups(neurons, scores, tied=False))


def test_scores_of_another_network_are_refused(neurons):
    scores = contributions(neurons, TASK, samples_per_class=2, progress=False)
    other = ts.find_neurons(ts.models.create("lenet", 3, channels=1, width=0.5), TASK.example)
    with pytest.raises(TorchsliceError, match="contributions of other neurons than the model's"):
        groups(other, scores)
    with pytest.raises(TorchsliceError, match=r"scores must be contributions\(neurons, task\), got dict"):
        groups(neurons, scores["taylor"])
