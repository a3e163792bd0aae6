"""Cohesion and coupling: by hand, against the literal double loop, and where there is nothing to compare."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchslice.find.gates.losses import pair_losses, unit_rows


def slow_losses(layers, labels):
    """The formulas as written: a mean over pairs i < j in every layer, then a mean over the layers."""
    cohesion, coupling = [], []
    for values in layers:
        same, different = [], []
        for i, j in itertools.combinations(range(len(values)), 2):
            lengths = values[i].norm() * values[j].norm()
            similarity = (values[i] @ values[j] / lengths).item() if lengths > 0 else 0.0
            (same if labels[i] == labels[j] else different).append(similarity)
        cohesion.append(sum(1 - s for s in same) / len(same) if same else 0.0)
        coupling.append(sum(different) / len(different) if different else 0.0)
    return sum(cohesion) / len(layers), sum(coupling) / len(layers)


def test_by_hand():
    values = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
    labels = torch.tensor([5, 5, 1])
    # cos(0, 1) = 0.6 in one class; cos(0, 2) = 0 and cos(1, 2) = 0.8 between two
    assert [loss.item() for loss in pair_losses([values], labels, 6)] == pytest.approx([0.4, 0.4], abs=1e-6)
    both = [values, torch.ones(3, 7)]  # in the second layer all are alike
    assert [loss.item() for loss in pair_losses(both, labels, 6)] == pytest.approx([0.2, 0.7], abs=1e-6)


@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 9),
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    classes=st.integers(1, 4),
)
def test_like_the_literal_formula_and_in_range(seed, batch, widths, classes):
    generator = torch.Generator().manual_seed(seed)
    # a third of the values and some rows are zero, as behind a relu
    layers = [torch.randn(batch, n, generator=generator).sub(0.4).relu() for n in widths]
    labels = torch.randint(classes, (batch,), generator=generator)
    cohesion, coupling = pair_losses(layers, labels, classes)
    expected = slow_losses(layers, labels)
    assert (cohesion.item(), coupling.item()) == pytest.approx(expected, abs=2e-6)
    assert 0 <= cohesion <= 1 and 0 <= coupling <= 1


@pytest.mark.parametrize(
    ("values", "labels", "expected"),
    [
        (torch.rand(1, 4), [0], (0, 0)),  # no pair at all
        (torch.rand(3, 4), [0, 1, 2], (0, None)),  # no pair of one class
        (torch.rand(3, 4), [1, 1, 1], (None, 0)),  # one class
        (torch.zeros(3, 4), [0, 0, 1], (1, 0)),  # nothing is on
        (torch.ones(3, 4), [0, 0, 1], (0, 1)),  # everything is on
        (torch.full((2, 4), 1e-30), [0, 0], (None, 0)),  # squares underflow
    ],
)
def test_edge_cases_have_finite_values_and_gradients(values, labels, expected):
    values = values.clone().requires_grad_()
    losses = pair_losses([values], torch.tensor(labels), 3)
    sum(losses).backward()
    for loss, number in zip(losses, expected, strict=True):
        assert 0 <= loss <= 1 and (number is None or loss.item() == pytest.approx(number, abs=1e-6))
    assert values.grad.isfinite().all()


def test_the_gradient_is_that_of_the_similarity_matrix():
    values, labels = torch.rand(8, 6, dtype=torch.float64), torch.arange(8) % 3
    one, other = values.float().requires_grad_(), values.clone().requires_grad_()
    cohesion, coupling = pair_losses([one], labels, 3)
    (0.5 * cohesion + 1.5 * coupling).backward()
    rows = other / other.norm(dim=1, keepdim=True)
    similar = rows @ rows.T
    same = (labels[:, None] == labels) & ~torch.eye(8, dtype=torch.bool)
    (0.5 * (1 - similar)[same].mean() + 1.5 * similar[labels[:, None] != labels].mean()).backward()
    torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-6)


def test_rows_of_zeros_get_no_gradient():
    values = torch.tensor([[0.0, 0.0], [1.0, 2.0]], requires_grad=True)
    unit_rows([values]).sum().backward()
    assert values.grad[0].eq(0).all() and values.grad[1].ne(0).all()


def test_autocast_does_not_coarsen_them():
    values, labels = torch.rand(16, 300), torch.arange(16) % 4
    plain = pair_losses([values], labels, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert pair_losses([values], labels, 4) == plain
