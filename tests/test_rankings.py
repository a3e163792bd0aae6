"""Rankings: orders, their prefixes, how they are made and joined, and how a share is spread over the layers."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchslice.errors import TorchsliceError
from torchslice.rankings import Ranking, by_best_rank, by_mean_score, by_score, by_turns, widths
from torchslice.slices import Slice, union

WIDTHS = {"conv1": 3, "block.conv2": 5, "hidden": 1}


@st.composite
def rankings(draw: st.DrawFn) -> Ranking:
    """Any ranking of one model of three layers."""
    return Ranking({n: torch.tensor(draw(st.permutations(range(w)))) for n, w in WIDTHS.items()})


COUNTS = st.fixed_dictionaries({n: st.integers(0, w) for n, w in WIDTHS.items()})


def one(*order: int) -> Ranking:
    return Ranking({"conv1": torch.tensor(order)})


def test_prefixes_by_hand():
    ranking = one(2, 0, 1)
    kept = [ranking.prefix({"conv1": count})["conv1"].int().tolist() for count in range(4)]
    assert kept == [[0, 0, 0], [0, 0, 1], [1, 0, 1], [1, 1, 1]]
    assert str(ranking) == "Ranking(3 neurons in 1 layers)" and ranking.layers == {"conv1": 3}


@given(rankings(), COUNTS, COUNTS)
def test_slices_of_one_ranking_are_nested_and_the_full_one_is_all(ranking, a, b):
    larger = {name: max(a[name], b[name]) for name in WIDTHS}
    assert ranking.prefix(a) <= ranking.prefix(larger) >= ranking.prefix(b)
    assert {name: int(mask.sum()) for name, mask in ranking.prefix(a).masks.items()} == a
    assert ~ranking.prefix(WIDTHS) == Slice({n: torch.zeros(w, dtype=torch.bool) for n, w in WIDTHS.items()})


@given(rankings())
def test_plain_round_trip_survives_json(ranking):
    again = Ranking.from_plain(json.loads(json.dumps(ranking.to_plain())))
    assert again == ranking and hash(again) == hash(ranking)


def test_a_ranking_cannot_be_changed_from_outside():
    order = torch.tensor([1, 0])
    ranking = Ranking({"conv1": order})
    order[0], ranking["conv1"][1] = 0, 1
    assert ranking["conv1"].tolist() == [1, 0] != one(0, 1)["conv1"].tolist()


def test_ranking_by_score_by_hand():
    assert by_score({"conv1": torch.tensor([1.0, 3.0, 1.0, 2.0])})["conv1"].tolist() == [1, 3, 0, 2]
    # rows over their maxima: [1, .8, 0] and [.5, .8, 1]; means .75, .8, .5
    scores = torch.tensor([[10.0, 8.0, 0.0], [1.0, 1.6, 2.0]])
    assert by_mean_score({"conv1": scores})["conv1"].tolist() == [1, 0, 2]
    assert by_mean_score({"conv1": scores[:1]})["conv1"].tolist() == [0, 1, 2]
    assert by_mean_score({"conv1": torch.zeros(2, 3)})["conv1"].tolist() == [0, 1, 2]


def test_turns_by_hand():
    scores = torch.tensor([[10.0, 9.0, 1.0], [5.0, 4.0, 0.0]])  # over their maxima [1, .9, .1] and [1, .8, 0]
    first, second = by_turns({"first": scores, "last": scores})
    assert first["first"].tolist() == second["first"].tolist() == [0, 1, 2]
    # class 0 takes neuron 0, which then costs 0.3: class 1 prefers 0.8 to 1 - 0.3, and later 1 - 0.3 to 0
    assert first["last"].tolist() == [0, 1, 2] and second["last"].tolist() == [1, 0, 2]
    assert [of["only"].tolist() for of in by_turns({"only": scores})] == [of["last"].tolist() for of in (first, second)]
    cheap = by_turns({"first": scores, "last": scores}, cost=0.1)  # 1 - 0.1 is more than 0.8
    assert [ranking["last"].tolist() for ranking in cheap] == [[0, 1, 2]] * 2


@given(st.integers(2, 4), st.integers(1, 9), st.data())
def test_turns_share_nothing_while_they_can_where_it_costs_much_and_all_where_it_is_free(classes, width, drawn):
    rows = st.lists(st.integers(0, 9), min_size=width, max_size=width)
    scores = torch.tensor([drawn.draw(rows) for _ in range(classes)])
    layers = {"first": scores, "last": scores}
    own = [by_score({"last": of})["last"].tolist() for of in scores]
    assert [ranking["last"].tolist() for ranking in by_turns(layers, cost=0.0)] == own
    for ranking in by_turns(layers):
        assert ranking["first"].equal(by_mean_score({"first": scores})["first"])
    apart = [set(ranking["last"][: width // classes].tolist()) for ranking in by_turns(layers, cost=100.0)]
    assert len(set().union(*apart)) == width // classes * classes


def test_the_best_rank_in_any_class_by_hand():
    # best ranks 0, 0, 1, 1; of neurons 0 and 1 the second has the better mean rank, (0 + 1) / 2 against (0 + 3) / 2
    assert by_best_rank([one(0, 1, 2, 3), one(1, 3, 2, 0)])["conv1"].tolist() == [1, 0, 3, 2]
    assert by_best_rank([one(2, 0, 1)]) == one(2, 0, 1)


@given(st.lists(rankings(), min_size=1, max_size=4), st.integers(0, 5))
def test_equal_prefixes_of_classes_are_a_prefix_of_the_joined_ranking(some, length):
    together = union(ranking.prefix({n: min(length, w) for n, w in WIDTHS.items()}) for ranking in some)
    counts = {layer: int(mask.sum()) for layer, mask in together.masks.items()}
    assert by_best_rank(some).prefix(counts) == together
    assert by_best_rank(reversed(some)) == by_best_rank(some)


def test_widths_by_hand():
    layers = {"a": 16, "b": 16, "c": 16}
    assert widths(layers, 0.25, powers=(0.5, 1.5)) == {"a": 8, "b": 4, "c": 2}
    assert widths(layers, 0.25, powers=(1, 1), steps=dict.fromkeys(layers, 8)) == {"a": 8, "b": 8, "c": 8}
    assert widths({"a": 3, "b": 10}, 0.01, steps={"a": 8, "b": 4}) == {"a": 3, "b": 4}
    assert widths({"a": 3}, 0.01) == {"a": 1}


@given(st.floats(0.001, 1), st.floats(0.001, 1), st.sampled_from([1, 8]))
def test_a_larger_share_gives_no_layer_less_and_the_whole_gives_all(one, other, step):
    layers = {"a": 30, "b": 64, "c": 7, "d": 1}
    steps = dict.fromkeys(layers, step)
    less, more = (widths(layers, share, steps=steps) for share in sorted((one, other)))
    assert all(1 <= less[name] <= more[name] <= layers[name] for name in layers)
    assert widths(layers, 1.0, steps=steps) == layers


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: one(0, 0, 1), r"layer 'conv1': a ranking names every neuron of a layer once.*\[0, 0, 1\]"),
        (lambda: Ranking({"conv1": torch.empty(0, dtype=torch.int64)}), "names every neuron of a layer once"),
        (lambda: one(0, 1).prefix({"conv1": 3}), "layer 'conv1' has 2 neurons; the prefix has 3"),
        (lambda: one(0, 1).prefix({}), "layer 'conv1' is without one"),
        (lambda: one(0, 1).prefix({"conv1": 1, "x": 1}), "layer 'x' is not in the ranking"),
        (lambda: by_best_rank([one(0, 1), one(0, 1, 2)]), "rankings of different models"),
        (lambda: Ranking.from_plain({"conv1": "abc"}), "layer 'conv1': expected the neurons of a layer, got abc"),
        (lambda: Ranking.from_plain({"conv1": [0, True]}), "expected the neurons of a layer"),
        (lambda: Ranking.from_plain({"conv1": [0, 10**30]}), "layer 'conv1' has 2 neurons; the ranking names others"),
        (lambda: widths({"a": 3}, 0.0), r"share must be in \(0, 1\], got 0.0"),
    ],
)
def test_what_is_wrong_is_said(wrong, says):
    with pytest.raises(TorchsliceError, match=says):
        wrong()
