"""CKA of prefixes: numbers by hand, the literal definition, and what must not matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchslice.semantic.cka import prefix_cka
from torchslice.semantic.grams import Scatter
from torchslice.semantic.selection import by_theta, in_order

THETAS = (0.05, 0.5, 0.9, 0.95, 0.99, 1.0)


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
    values = torch.randn(n, width, generator=generator, dtype=torch.float64) @ torch.randn(
        width, width, generator=generator, dtype=torch.float64
    )
    dead = torch.rand(width, generator=generator) < draw(st.sampled_from([0.0, 0.4]))
    scores = torch.rand(width, generator=generator, dtype=torch.float64) + 0.01
    return values.masked_fill(dead, 0), scores.masked_fill(dead, 0)


def gram(values: Tensor) -> Tensor:
    return Scatter.of(values).gram


def count(values: Tensor, scores: Tensor, theta: float) -> int:
    return int(by_theta(gram(values), scores, theta).sum())


def test_by_hand():
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
    torch.testing.assert_close(prefix_cka(gram(values), order), torch.tensor(expected, dtype=torch.float64))


@given(layers())
def test_a_higher_theta_never_needs_fewer_neurons(layer):
    counts = [count(*layer, theta) for theta in THETAS]
    assert counts == sorted(counts) and counts[0] >= 1


@given(layers(), st.floats(1e-6, 1e6), st.floats(-100, 100))
def test_scaling_the_layer_or_shifting_a_neuron_changes_nothing(layer, scale, shift):
    values, scores = layer
    moved = values * scale
    moved[:, 0] += shift
    order = in_order(scores)
    expected = prefix_cka(gram(values * scale), order)
    torch.testing.assert_close(expected, prefix_cka(gram(values), order))
    shifted = prefix_cka(Scatter.of(moved).resolved(), order)
    if abs(shift) < 100 * scale:  # else the neuron varies too little to be told from a constant
        torch.testing.assert_close(shifted, expected, atol=1e-7, rtol=1e-6)


@given(layers())
def test_dead_neurons_are_never_needed(layer):
    values, scores = layer
    alive = int((values != 0).any(0).sum())
    if alive:
        assert count(values, scores, 1.0) <= alive
        more = torch.cat([values, torch.zeros(len(values), 3, dtype=torch.float64)], 1)
        for theta in THETAS:
            assert count(more, torch.cat([scores, torch.zeros(3)]), theta) == count(values, scores, theta)


@pytest.mark.parametrize("value", [0.0, 0.3, 1e6])
def test_a_constant_layer_is_kept_whole(value):
    values = torch.full((7, 5), value)
    for theta in THETAS:
        assert count(values, torch.rand(5), theta) == 5
    noisy = values * (1 + 1e-8 * torch.randn(7, 5, dtype=torch.float64))  # what two float32 kernels may differ by
    assert not Scatter.of(noisy).resolved().any()


def test_the_smallest_and_largest_numbers_do_no_harm():
    values = torch.randn(9, 4, dtype=torch.float64)
    order = torch.arange(4)
    expected = prefix_cka(gram(values), order)
    for scale in (1e-100, 1e100):
        torch.testing.assert_close(prefix_cka(gram(values * scale), order), expected)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 1000))
def test_pooled_scatters_are_those_of_all_samples(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(sizes), 3, generator=generator) * 3 + 50
    parts = [Scatter.of(part) for part in values.split(sizes)]
    pooled = parts[0]
    for part in parts[1:]:
        pooled += part
    centred = values.double() - values.double().mean(0)
    torch.testing.assert_close(pooled.gram, centred.T @ centred)
    torch.testing.assert_close(pooled.mean, values.double().mean(0))
    assert pooled.count == len(values)
