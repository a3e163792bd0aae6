"""The Boolean algebra of slices, their figures and their plain form."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchslice.errors import TorchsliceError
from torchslice.slices import Slice

WIDTHS = {"conv1": 3, "block.conv2": 5, "hidden": 1}


@st.composite
def slices(draw: st.DrawFn) -> Slice:
    """Any slice of one model of three layers."""
    return Slice({n: torch.tensor(draw(st.lists(st.booleans(), min_size=w, max_size=w))) for n, w in WIDTHS.items()})


def one(*kept: bool) -> Slice:
    return Slice({"conv1": torch.tensor(kept)})


EMPTY = Slice({n: torch.zeros(w, dtype=torch.bool) for n, w in WIDTHS.items()})
FULL = ~EMPTY


@given(slices(), slices(), slices())
def test_slices_form_a_boolean_algebra(a, b, c):
    assert a | b == b | a and a & b == b & a
    assert (a | b) | c == a | (b | c) and (a & b) & c == a & (b & c)
    assert a & (b | c) == (a & b) | (a & c) and a | (b & c) == (a | b) & (a | c)
    assert a | (a & b) == a == a & (a | b)
    assert a | EMPTY == a == a & FULL
    assert a | ~a == FULL and a & ~a == EMPTY


@given(slices(), slices())
def test_complement_difference_and_de_morgan(a, b):
    assert ~~a == a
    assert ~(a | b) == ~a & ~b and ~(a & b) == ~a | ~b
    assert a - b == a & ~b


@given(slices(), slices())
def test_order_and_counts_agree_with_sets(a, b):
    def as_set(s):
        return {(n, i) for n, mask in s.masks.items() for i in mask.nonzero().flatten().tolist()}

    x, y = as_set(a), as_set(b)
    assert (a <= b) == (x <= y) and (a == b) == (x == y) and bool(a) == bool(x)
    assert len(a) == len(x) and len(a | b) + len(a & b) == len(a) + len(b)
    assert a.neuron_retention == len(x) / 9
    assert a.jaccard(b) == (len(x & y) / len(x | y) if x | y else 1.0)


@given(slices())
def test_plain_round_trip_survives_json(a):
    assert Slice.from_plain(json.loads(json.dumps(a.to_plain()))) == a


@given(slices(), slices())
def test_layers_are_known_by_name_whatever_their_order(a, b):
    turned = Slice(dict(reversed(a.masks.items())))
    assert turned == a and hash(turned) == hash(a)
    assert turned | b == a | b


def test_figures_by_hand():
    cat, dog = one(True, False, True), one(True, True, False)
    assert (len(cat), cat.total, cat.neuron_retention) == (2, 3, 2 / 3)
    assert cat.jaccard(dog) == 1 / 3
    assert len(cat - dog) == 1 and (cat - dog)["conv1"].tolist() == [False, False, True]
    assert EMPTY.empty_layers() == list(WIDTHS) and FULL.empty_layers() == []
    assert str(cat) == "Slice(2 of 3 neurons, 66.7%, in 1 layers)"
    assert str(Slice({})) == "Slice(0 of 0 neurons, 100.0%, in 0 layers)"


def test_a_slice_cannot_be_changed_from_outside():
    mask = torch.tensor([True, False, True])
    s = Slice({"conv1": mask})
    mask[1] = True
    s["conv1"][1] = True
    s.masks["conv1"][1] = True
    assert s["conv1"].tolist() == [True, False, True]


@pytest.mark.parametrize("mask", [torch.ones(3), torch.ones(2, 2, dtype=torch.bool), torch.ones(0, dtype=torch.bool)])
def test_a_mask_must_be_a_bool_vector(mask):
    with pytest.raises(TorchsliceError, match=r"layer 'conv1': a slice needs a bool tensor \[N\] per layer, got torch"):
        Slice({"conv1": mask})


def test_slices_of_different_models_do_not_combine():
    wide = Slice({"conv1": torch.ones(4, dtype=torch.bool)})
    with pytest.raises(TorchsliceError, match="layer 'conv1' has 3 neurons in one and 4 in the other"):
        one(True, True, False) | wide
    with pytest.raises(TorchsliceError, match="layer 'conv2' has no neurons in one and 1 in the other"):
        one(True, True, False) & Slice({"conv1": one(True, True, True)["conv1"], "conv2": torch.tensor([True])})
    with pytest.raises(TorchsliceError, match="only be combined with a slice, not with set"):
        FULL | {1}
    assert wide != FULL and FULL != "full"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"width": 3, "kept": [3]}, "has 3 neurons; the slice names 3"),
        ({"width": 3, "kept": [-1]}, "has 3 neurons; the slice names -1"),
        ({"width": 0, "kept": []}, "a layer has 1 to 10,000,000 neurons, not 0"),
        ({"width": -2, "kept": []}, "a layer has 1 to 10,000,000 neurons, not -2"),
        ({"width": 10**11, "kept": []}, "100000000000"),
        ({"width": float("inf"), "kept": []}, "inf"),
        ({"width": 10**400, "kept": []}, "10000"),
        ({"width": 3, "kept": [10**30]}, "the slice names 1000"),
        *(
            (entry, "expected {'width': N, 'kept'")
            for entry in (
                *([1, 2], None, 5, "a", {"kept": [1]}, {"width": 3}),
                *({"width": width, "kept": []} for width in ("many", "3", True, 2.5, None)),
                *({"width": 3, "kept": kept} for kept in (None, "012", {}, 1, [True], [0.0], [[0]], ["1"])),
            )
        ),
    ],
)
def test_damaged_plain_data_is_refused(entry, message):
    with pytest.raises(TorchsliceError, match="layer 'conv1'") as caught:
        Slice.from_plain({"conv1": entry})
    assert message in str(caught.value)


@pytest.mark.parametrize("plain", [None, 5, [], "conv1"])
def test_plain_data_of_no_slice_is_refused(plain):
    with pytest.raises(TorchsliceError, match="expected the slice of every layer"):
        Slice.from_plain(plain)
