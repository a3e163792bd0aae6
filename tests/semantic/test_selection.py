"""Selection by contribution: order, shares, mass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchslice.errors import TorchsliceError
from torchslice.semantic.selection import by_mass, by_theta, in_order, prefix_mass, reach, top_share

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
