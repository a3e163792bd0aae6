"""Merging: what is added to the union, how classes are clustered; nothing ever shrinks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchslice.semantic.cka import prefix_cka
from torchslice.semantic.merge import complete, groups_of, overlap, tree
from torchslice.semantic.selection import in_order, prefix_mass, reach


def masks_of(*rows: str) -> Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


@st.composite
def several_masks(draw: st.DrawFn) -> Tensor:
    classes, width = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    row = st.lists(st.booleans(), min_size=width, max_size=width)
    return torch.tensor(draw(st.lists(row, min_size=classes, max_size=classes)))


def test_overlap_by_hand():
    found = overlap(masks_of("xx..", ".xx.", "...x", "...."))
    assert found[0].tolist() == pytest.approx([1, 1 / 3, 0, 0])
    assert found[3].tolist() == [0, 0, 0, 1]  # nothing and nothing are the same


@given(several_masks())
def test_overlap_is_jaccard_of_every_pair(masks):
    for i, row in enumerate(overlap(masks).tolist()):
        for j, value in enumerate(row):
            a, b = (set(masks[k].nonzero().flatten().tolist()) for k in (i, j))
            assert value == pytest.approx(len(a & b) / len(a | b) if a | b else 1)


def test_groups_by_hand():
    overlaps = torch.tensor([[1, 0.9, 0.2, 0.3], [0.9, 1, 0.4, 0.1], [0.2, 0.4, 1, 0.5], [0.3, 0.1, 0.5, 1]])
    linkage = tree(overlaps)
    # 0 and 1 at 0.1, 2 and 3 at 0.5, all at the mean of 0.8, 0.7, 0.6, 0.9
    assert linkage[:, 2].tolist() == pytest.approx([0.1, 0.5, 0.75]) and linkage[:, 3].tolist() == [2, 2, 4]
    assert groups_of(linkage) == [[0, 1], [2, 3]]
    assert groups_of(linkage, cut=0.6) == [[0, 1], [2], [3]]
    assert groups_of(linkage, cut=0.1) == [[0, 1, 2, 3]]


@given(several_masks())
def test_groups_hold_every_class_once_in_order(masks):
    groups = groups_of(tree(overlap(masks)))
    assert sorted(label for group in groups for label in group) == list(range(len(masks)))
    assert groups == sorted(groups) and all(group == sorted(group) for group in groups)
    for group in groups:  # average linkage joins as long as the mean overlap is at least a half
        for other in groups:
            if group is not other and len(group) == len(other) == 1:
                assert overlap(masks)[group[0], other[0]] < 0.5


def test_one_class_is_one_group():
    linkage = tree(overlap(masks_of("x.")))
    assert linkage.shape == (0, 4) and groups_of(linkage) == [[0]]


@given(several_masks(), st.sampled_from([0.3, 0.9, 0.99, 1.0]), st.integers(0, 1000))
def test_completing_reaches_theta_and_takes_nothing_away(masks, theta, seed):
    generator = torch.Generator().manual_seed(seed)
    width = masks.shape[1]
    mask = masks.any(0)
    mask[0] = True
    values = torch.randn(20, width, generator=generator, dtype=torch.float64)
    gram, scores = values.T @ values, torch.rand(width, generator=generator)
    whole = complete(mask, scores, theta, lambda order: prefix_cka(gram, order))
    assert (mask <= whole).all()

    def reached(kept: Tensor) -> float:
        inside = in_order(kept.double())
        return prefix_cka(gram, inside)[int(kept.sum()) - 1].item()

    assert reached(whole) >= theta - 1e-9
    added = whole & ~mask
    if added.any():  # the last one added, that of least contribution, was needed
        last = torch.where(added, scores, torch.inf).argmin()
        without = whole.clone()
        without[last] = False
        assert reached(without) < theta
        left = scores[~whole]
        assert not len(left) or left.max() <= scores[added].min()


def test_completing_by_mass_by_hand():
    scores = torch.tensor([1.0, 3.0, 6.0])
    for theta, expected in ((0.1, [1, 0, 0]), (0.7, [1, 0, 1]), (0.71, [1, 1, 1])):
        kept = complete(masks_of("x..")[0], scores, theta, lambda order: prefix_mass(scores, order))
        assert kept.int().tolist() == expected
    assert reach(prefix_mass(scores, torch.tensor([0, 2, 1])), 0.7) == 2
