"""Selection by contribution: order, fractions, mass, similarity to the whole layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchslice import TorchsliceError
from torchslice.find.semantic.grams import Scatter
from torchslice.find.semantic.selection import (
    complete,
    first_to_reach,
    in_order,
    prefix_cka,
    prefix_mass,
    top_fraction,
)

SCORES = st.lists(st.integers(0, 5), min_size=1, max_size=12).map(lambda s: torch.tensor(s, dtype=torch.float64))
FRACTIONS = st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.75, 0.9, 1.0])
THETAS = (0.05, 0.5, 0.9, 0.95, 0.99, 1.0)


def by_mass(scores: Tensor, theta: float) -> Tensor:
    return first_to_reach(in_order(scores), prefix_mass(scores, in_order(scores)), theta)


def by_cka(values: Tensor, scores: Tensor, theta: float) -> Tensor:
    order = in_order(scores)
    return first_to_reach(order, prefix_cka(Scatter.of(values).gram, order), theta)


# -- order, fractions, mass --------------------------------------------------------------------------------------------
@given(SCORES)
def test_ties_are_broken_by_index(scores):
    expected = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert in_order(scores).tolist() == expected


@given(SCORES, FRACTIONS)
def test_a_fraction_is_the_first_neurons_and_at_least_one(scores, fraction):
    kept = top_fraction(scores, fraction)
    assert kept.sum() == max(1, round(fraction * len(scores)))
    assert kept.nonzero().flatten().tolist() == sorted(in_order(scores)[: kept.sum()].tolist())
    rows = torch.stack([scores, scores.flip(0)])
    assert torch.equal(top_fraction(rows, fraction)[0], kept)


@given(SCORES, FRACTIONS)
def test_mass_is_the_smallest_set_that_holds_it(scores, theta):
    kept, total = by_mass(scores, theta), scores.sum()
    if total == 0:
        assert kept.all()
        return
    held = sorted(scores.tolist(), reverse=True)
    enough = next(k for k in range(1, len(held) + 1) if sum(held[:k]) >= theta * total - 1e-9)
    assert kept.sum() == enough and scores[kept].sum() == sum(held[:enough])


def test_mass_by_hand():
    scores = torch.tensor([1.0, 6.0, 3.0])
    assert prefix_mass(scores, in_order(scores)).tolist() == pytest.approx([0.6, 0.9, 1.0])
    assert by_mass(scores, 0.6).tolist() == [False, True, False]
    assert by_mass(scores, 0.9).tolist() == [False, True, True]
    assert by_mass(scores, 0.91).all()
    with pytest.raises(TorchsliceError, match=r'at least 0, the smallest is -1; take criterion="cka"'):
        by_mass(torch.tensor([2.0, -1.0]), 0.9)


def test_the_first_k_that_reaches_theta_counts_though_the_curve_may_fall_again():
    order, curve = torch.arange(4), torch.tensor([0.5, 0.9, 0.8, 1.0])
    counts = [int(first_to_reach(order, curve, theta).sum()) for theta in (0.5, 0.85, 0.95, 1.0)]
    assert counts == [1, 2, 4, 4]
    assert [int(first_to_reach(order, curve, 0.85, at_least=k).sum()) for k in (1, 2, 3, 4)] == [2, 2, 4, 4]


# -- similarity to the whole layer -------------------------------------------------------------------------------------
def literal_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA as published: HSIC of the two [n, n] Gram matrices, both centred by H = I - 1/n."""
    n = len(x)
    centring = torch.eye(n, dtype=torch.float64) - 1 / n
    k, l = (centring @ (z @ z.T) @ centring for z in (x, y))  # noqa: E741
    alike = torch.trace(k @ l) / (torch.trace(k @ k) * torch.trace(l @ l)).sqrt()
    return alike.nan_to_num(nan=0.0).item()


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Activations [n, N] of which a few neurons are dead, and contributions [N] in which those are the smallest."""
    n, width = draw(st.integers(2, 12)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    mixed = torch.randn(width, width, generator=generator, dtype=torch.float64)
    values = torch.randn(n, width, generator=generator, dtype=torch.float64) @ mixed
    dead = torch.rand(width, generator=generator) < draw(st.sampled_from([0.0, 0.4]))
    scores = torch.rand(width, generator=generator, dtype=torch.float64) + 0.01
    return values.masked_fill(dead, 0), scores.masked_fill(dead, 0)


def test_cka_by_hand():
    # G = [[2, 0], [0, 1]]: G2 sums to 5; the first neuron alone gives 4 / sqrt(4 * 5)
    matrix = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert prefix_cka(matrix, torch.tensor([0, 1])).tolist() == pytest.approx([4 / 20**0.5, 1])
    assert prefix_cka(matrix, torch.tensor([1, 0])).tolist() == pytest.approx([1 / 5**0.5, 1])
    # G = [[1, 1, 0], [1, 1, 0], [0, 0, 2]], the two equal neurons are one of weight 2: G2 rows 2, 2, 4, sum 8
    matrix = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    assert prefix_cka(matrix, torch.tensor([0, 2, 1])).tolist() == pytest.approx([2 / 8**0.5, 6 / 40**0.5, 1])


@given(layers())
def test_all_prefixes_are_those_of_the_literal_definition(layer):
    values, scores = layer
    order = in_order(scores)
    expected = [literal_cka(values[:, order[:k]], values) for k in range(1, len(order))] + [1.0]
    found = prefix_cka(Scatter.of(values).gram, order)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@given(layers())
def test_a_higher_theta_never_needs_fewer_neurons_and_dead_ones_are_never_needed(layer):
    values, scores = layer
    counts = [int(by_cka(values, scores, theta).sum()) for theta in THETAS]
    assert counts == sorted(counts) and counts[0] >= 1
    alive = int((values != 0).any(0).sum())
    if alive:
        assert counts[-1] <= alive
        more, zeros = torch.cat([values, torch.zeros(len(values), 3)], 1), torch.zeros(3)
        assert counts == [int(by_cka(more, torch.cat([scores, zeros]), theta).sum()) for theta in THETAS]


@given(layers(), st.floats(1e-6, 1e6), st.floats(-100, 100))
def test_scaling_the_layer_or_shifting_a_neuron_changes_nothing(layer, scale, shift):
    values, scores = layer
    moved = values * scale
    moved[:, 0] += shift
    order = in_order(scores)
    expected = prefix_cka(Scatter.of(values * scale).gram, order)
    torch.testing.assert_close(expected, prefix_cka(Scatter.of(values).gram, order))
    shifted = prefix_cka(Scatter.of(moved).resolved(), order)
    if abs(shift) < 100 * scale:  # else the neuron varies too little to be told from a constant
        torch.testing.assert_close(shifted, expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.3, 1e6])
def test_a_constant_layer_is_kept_whole(value):
    values = torch.full((7, 5), value)
    assert all(by_cka(values, torch.rand(5), theta).all() for theta in THETAS)
    noisy = values * (1 + 1e-8 * torch.randn(7, 5, dtype=torch.float64))  # what two float32 kernels may differ by
    assert not Scatter.of(noisy).resolved().any()


def test_the_smallest_and_largest_numbers_do_no_harm():
    values, order = torch.randn(9, 4, dtype=torch.float64), torch.arange(4)
    for scale in (1e-100, 1e100):
        found = prefix_cka(Scatter.of(values * scale).gram, order)
        torch.testing.assert_close(found, prefix_cka(Scatter.of(values).gram, order))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 1000))
def test_pooled_scatters_are_those_of_all_samples(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(sizes), 3, generator=generator) * 3 + 50
    pooled, *others = (Scatter.of(part) for part in values.split(sizes))
    for other in others:
        pooled += other
    centred = values.double() - values.double().mean(0)
    torch.testing.assert_close(pooled.gram, centred.T @ centred)
    torch.testing.assert_close(pooled.mean, values.double().mean(0))
    assert pooled.count == len(values)


# -- completing a union ------------------------------------------------------------------------------------------------
@given(SCORES.filter(lambda s: len(s) > 1), st.data(), st.sampled_from([0.3, 0.9, 0.99, 1.0]), st.integers(0, 1000))
def test_completing_reaches_theta_and_takes_nothing_away(scores, drawn, theta, seed):
    width = len(scores)
    mask = torch.tensor(drawn.draw(st.lists(st.booleans(), min_size=width, max_size=width)))
    mask[0] = True
    values = torch.randn(20, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = values.T @ values
    whole = complete(mask, scores, theta, lambda order: prefix_cka(gram, order))
    assert (mask <= whole).all()

    def reached(kept: Tensor) -> float:
        return prefix_cka(gram, in_order(kept.double()))[int(kept.sum()) - 1].item()

    assert reached(whole) >= theta - 1e-9
    added = whole & ~mask
    if added.any():  # the last one added, that of least contribution, was needed
        least = torch.where(added, scores, torch.inf).min()
        last = int((added & (scores == least)).nonzero().max())
        without = whole.clone()
        without[last] = False
        assert reached(without) < theta
        assert (scores[~whole] <= least).all()


def test_completing_by_mass_by_hand():
    scores = torch.tensor([1.0, 3.0, 6.0])
    for theta, expected in ((0.1, [1, 0, 0]), (0.7, [1, 0, 1]), (0.71, [1, 1, 1])):
        kept = complete(torch.tensor([True, False, False]), scores, theta, lambda order: prefix_mass(scores, order))
        assert kept.int().tolist() == expected
