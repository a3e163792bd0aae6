"""Drawing from any split: as evenly as the classes allow, by the seed alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchslice.data import Stored, hold_out, limit
from torchslice.data.splits import check_labels, rank_in_class
from torchslice.errors import TorchsliceError


def numbered(labels: list[int]) -> Stored:
    """Samples whose input is their number."""
    return Stored(torch.arange(len(labels)), torch.tensor(labels, dtype=torch.int64))


def ids(split: Stored) -> list[int]:
    return split.inputs.tolist()


labels = st.lists(st.integers(0, 4), min_size=1, max_size=60)


@given(labels, st.integers(0, 3))
def test_rank_in_class_numbers_every_class_from_zero(labels, seed):
    rank = rank_in_class(torch.tensor(labels), seed)
    for label in set(labels):
        assert sorted(rank[torch.tensor(labels) == label].tolist()) == list(range(labels.count(label)))


@given(labels, st.floats(0.01, 0.99), st.integers(0, 3))
def test_hold_out_divides_every_class_by_the_fraction(labels, fraction, seed):
    rest, held = hold_out(numbered(labels), fraction, seed=seed)
    assert sorted(ids(rest) + ids(held)) == list(range(len(labels)))
    assert ids(rest) == sorted(ids(rest)) and ids(held) == sorted(ids(held))
    for label in set(labels):
        total, out = labels.count(label), held.labels.tolist().count(label)
        assert out == 0 if total == 1 else 1 <= out <= total - 1
        assert abs(out - fraction * total) <= 1


@given(labels, st.integers(1, 60))
def test_limit_draws_as_evenly_as_the_classes_allow(labels, count):
    drawn = limit(numbered(labels), count)
    assert len(drawn) == min(count, len(labels)) and ids(drawn) == sorted(ids(drawn))
    taken = {label: drawn.labels.tolist().count(label) for label in set(labels)}
    most = max(taken.values())
    assert all(n >= most - 1 or n == labels.count(label) for label, n in taken.items())


def test_drawing_depends_on_the_seed_alone():
    split = numbered([0, 1] * 50)
    assert ids(limit(split, 10, seed=1)) == ids(limit(split, 10, seed=1)) != ids(limit(split, 10, seed=2))
    assert ids(hold_out(split, 0.5, seed=1)[0]) != ids(hold_out(split, 0.5, seed=2)[0])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    hold_out(split, 0.5, seed=1)
    limit(split, 10)
    assert torch.equal(state, torch.get_rng_state())
    assert limit(split, 100) is split


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_a_fraction_must_leave_something_on_both_sides(fraction):
    with pytest.raises(TorchsliceError, match="must be between 0 and 1, got"):
        hold_out(numbered([0, 1]), fraction, seed=0)


def test_a_limit_must_be_at_least_one():
    with pytest.raises(TorchsliceError, match="at least 1 sample, not to 0"):
        limit(numbered([0, 1]), 0)


@pytest.mark.parametrize("labels", [torch.tensor([0, 2, 1], dtype=kind) for kind in (torch.uint8, torch.int16)])
def test_labels_of_every_whole_number_become_int64(labels):
    assert check_labels(labels, 3).dtype == torch.int64 and check_labels([0, 2, 1], 3).tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(3), r"3 samples need labels that are whole numbers \[3\]; got torch.float32 \[3\]"),
        (torch.zeros(2).long(), r"whole numbers \[3\]; got torch.int64 \[2\]"),
        (torch.zeros(3, 1).long(), r"whole numbers \[3\]; got torch.int64 \[3, 1\]"),
        (torch.zeros(3).bool(), r"got torch.bool"),
        (torch.tensor([0, -1, 0]), r"labels must be 0, 1, 2, \.\.\., got -1"),
    ],
)
def test_labels_of_the_wrong_form_are_refused(labels, message):
    with pytest.raises(TorchsliceError, match=message):
        check_labels(labels, 3)
