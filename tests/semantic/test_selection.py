"""Selection by contribution: order, shares, mass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchslice.errors import TorchsliceError
from torchslice.semantic.selection import (
    balanced,
    by_mass,
    by_theta,
    in_order,
    prefix_mass,
    reach,
    tapered,
    top_share,
)

SCORES = st.lists(st.integers(0, 5), min_size=1, max_size=12).map(lambda s: torch.tensor(s, dtype=torch.float64))
SHARES = st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.75, 0.9, 1.0])


@given(SCORES)
def test_ties_are_broken_by_index(scores):
    expected = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert in_order(scores).tolist() == expected


@given(SCORES, SHARES)
def test_a_share_is_the_first_neurons_and_at_least_one(scores, share):
    kept = top_share(scores, share)
    assert kept.sum() == max(1, round(share * len(scores)))
    assert kept.nonzero().flatten().tolist() == sorted(in_order(scores)[: kept.sum()].tolist())
    rows = torch.stack([scores, scores.flip(0)])
    assert torch.equal(top_share(rows, share)[0], kept)


@given(SCORES, SHARES)
def test_mass_is_the_smallest_set_that_holds_it(scores, theta):
    kept, total = by_mass(scores, theta), scores.sum()
    if total == 0:
        assert kept.all()
        return
    held = sorted(scores.tolist(), reverse=True)
    enough = next(k for k in range(1, len(held) + 1) if sum(held[:k]) >= theta * total - 1e-9)
    assert kept.sum() == enough and scores[kept].sum() == sum(held[:enough])


def test_by_hand():
    scores = torch.tensor([1.0, 6.0, 3.0])
    assert prefix_mass(scores, in_order(scores)).tolist() == pytest.approx([0.6, 0.9, 1.0])
    assert by_mass(scores, 0.6).tolist() == [False, True, False]
    assert by_mass(scores, 0.9).tolist() == [False, True, True]
    assert by_mass(scores, 0.91).all()
    # three neurons that are equally important to the layer: sim = 1 / sqrt(3), 2 / sqrt(6), 1
    assert by_theta(torch.eye(3), scores, 0.57).tolist() == [False, True, False]
    assert by_theta(torch.eye(3), scores, 0.58).tolist() == [False, True, True]


def test_the_first_k_that_reaches_theta_counts_though_the_curve_may_fall_again():
    curve = torch.tensor([0.5, 0.9, 0.8, 1.0])
    assert [reach(curve, theta) for theta in (0.5, 0.85, 0.95, 1.0)] == [1, 2, 4, 4]
    assert [reach(curve, 0.85, at_least=k) for k in (1, 2, 3, 4)] == [2, 2, 4, 4]


@pytest.mark.parametrize("value", [0, -0.5, 1.0001, float("nan")])
def test_theta_and_share_are_in_their_range(value):
    scores = torch.tensor([1.0, 2.0])
    with pytest.raises(TorchsliceError, match=rf"theta must be in \(0, 1\], got {value}"):
        by_mass(scores, value)
    with pytest.raises(TorchsliceError, match=rf"theta must be in \(0, 1\], got {value}"):
        by_theta(torch.eye(2), scores, value)
    with pytest.raises(TorchsliceError, match=rf"share must be in \(0, 1\], got {value}"):
        top_share(scores, value)


def test_mass_of_negative_contributions_is_refused():
    with pytest.raises(TorchsliceError, match=r'at least 0, the smallest is -1; take criterion="cka"'):
        by_mass(torch.tensor([2.0, -1.0]), 0.9)


def test_a_tapered_budget_by_hand():
    widths = {"a": 10, "b": 10, "c": 10}
    assert tapered(widths, 0.5, 0.25) == {"a": 8, "b": 5, "c": 2}  # shares 0.8, 0.5, 0.2
    assert tapered(widths, 0.5, 1.0) == {"a": 5, "b": 5, "c": 5}
    assert tapered({"a": 10, "b": 90}, 0.5, 0.1) == {"a": 10, "b": 40}  # the first layer can give no more than it has
    assert tapered({"a": 100, "b": 2}, 0.01, 0.1) == {"a": 1, "b": 1}


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), SHARES, SHARES)
def test_a_tapered_budget_is_kept_to_and_never_grows_with_depth(widths, share, taper):
    counts = tapered(dict(enumerate(widths)), share, taper).values()
    assert abs(sum(counts) - share * sum(widths)) <= 0.5 * len(widths) + sum(1 for n in counts if n == 1)
    shares = [count / width for count, width in zip(counts, widths, strict=True)]
    rough = [0.5 / width for width in widths]
    pairs = zip(shares, shares[1:], rough, rough[1:], counts, list(counts)[1:], strict=False)
    assert all(a + e >= b - f or second == 1 for a, b, e, f, _, second in pairs)
    assert all(1 <= count <= width for count, width in zip(counts, widths, strict=True))


@given(st.integers(2, 5), st.integers(1, 12), st.data())
def test_a_balanced_choice_is_as_large_as_asked_and_without_cost_the_best_of_each_class(classes, width, drawn):
    rows = st.lists(st.integers(0, 9), min_size=width, max_size=width)
    scores = torch.tensor([drawn.draw(rows) for _ in range(classes)], dtype=torch.float64)
    count = drawn.draw(st.integers(1, width))
    kept = balanced(scores, count)
    assert kept.sum(1).tolist() == [count] * classes
    assert torch.equal(balanced(scores, count, cost=0.0), top_share(scores, count / width))
    assert balanced(scores, count, cost=100.0).any(0).sum() == min(width, count * classes)


def test_a_balanced_choice_by_hand():
    scores = torch.tensor([[10.0, 9.0, 1.0], [5.0, 4.0, 0.0]])
    # class 0 takes neuron 0, which then costs 0.3 * 3 / 2 = 0.45: class 1 prefers 0.8 to 1 - 0.45
    assert balanced(scores, 1).tolist() == [[True, False, False], [False, True, False]]
    assert balanced(scores, 1, cost=0.1).tolist() == [[True, False, False], [True, False, False]]
