"""Exact overlaps, and words for gates that have failed."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchslice.find.gates.measures import cohesion, coupling, health_of, jaccard_sum
from torchslice.slices import Slice


def slow_jaccard_sum(masks):
    """One pair at a time."""
    total = 0.0
    for a, b in itertools.combinations(masks, 2):
        either = int((a | b).sum())
        total += int((a & b).sum()) / either if either else 1.0
    return total


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 12),
    width=st.integers(1, 9),
    fraction=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    block=st.integers(1, 5),
)
def test_like_one_pair_at_a_time(seed, rows, width, fraction, block):
    masks = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) < fraction
    assert jaccard_sum(masks, block=block) == pytest.approx(slow_jaccard_sum(masks), abs=1e-5)


def test_by_hand():
    masks = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 1]]).bool()
    assert cohesion(masks) == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert cohesion(masks[:1]) == 1 and cohesion(masks[:0]) == 1
    assert coupling(masks) == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert coupling(torch.cat([torch.ones(3, 4).bool(), masks], 1)) == pytest.approx((5 / 6 + 4 / 7 + 4 / 6) / 3)
    assert coupling(masks[:1]) == 0


def test_coupling_is_the_mean_of_the_slices_own_overlap():
    generator = torch.Generator().manual_seed(0)
    slices = [Slice({"a": torch.rand(9, generator=generator) < 0.5}) for _ in range(5)]
    pairs = [one.jaccard(other) for one, other in itertools.combinations(slices, 2)]
    assert coupling(torch.stack([one["a"] for one in slices])) == pytest.approx(sum(pairs) / len(pairs))


def test_healthy_gates_are_not_complained_about():
    health = health_of({"a": torch.tensor([0.1, 0.5, 0.0]), "b": torch.tensor([0.9, 0.1])})
    assert health.warnings == [] and health.dead_gates == {"a": 1}


def test_collapse_is_said_in_words():
    shared, varied = torch.tensor([1.0, 0.0, 0.999]), torch.tensor([0.5, 0.0, 1.0])
    some = health_of({"a": shared, "b": varied})
    assert some.collapsed == ("a",) and some.dead_layers == ()
    (words,) = some.warnings
    assert words.startswith("Collapsed: all samples share one mask in a, 1 of 2 gated layers")
    (words,) = health_of({"a": shared, "b": shared}).warnings
    assert "in every layer" in words and "lower cohesion_weight" in words


def test_dead_layers_are_said_in_words():
    health = health_of({name: torch.zeros(3) for name in "abcde"})
    assert health.dead_layers == tuple("abcde") and health.collapsed == ()
    assert health.warnings[0].startswith("Dead: no gate is ever on in a, b, c and 2 more")
