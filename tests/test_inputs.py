"""Inputs are trees of tensors: read, cut into batches and put together leaf by leaf, and named in errors."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from torchslice.errors import TorchsliceError
from torchslice.inputs import (
    batch_size,
    call_model,
    check_like,
    describe,
    device_of,
    join,
    leaves,
    logits_of,
    map_leaves,
    map_tensors,
    paths,
    take,
    tensors,
    to_device,
)

TREE = {"pixels": torch.arange(6.0).view(3, 2), "more": (torch.tensor([7, 8, 9]), [True, "text", None])}


def test_functions_reach_every_leaf_and_keep_the_kinds_of_containers() -> None:
    assert map_leaves(lambda leaf: 2 * leaf, {"a": (1, [2]), "b": []}) == {"a": (2, [4]), "b": []}
    doubled = map_tensors(lambda tensor: 2 * tensor, TREE)
    assert doubled["more"][0].tolist() == [14, 16, 18] and doubled["more"][1] == [True, "text", None]
    assert TREE["more"][0].tolist() == [7, 8, 9]
    assert len(leaves(TREE)) == 5 and [len(tensor) for tensor in tensors(TREE)] == [3, 3] and batch_size(TREE) == 3
    assert [name for name, _ in paths(TREE)] == [
        *("inputs['pixels']", "inputs['more'][0]", "inputs['more'][1][0]", "inputs['more'][1][1]"),
        "inputs['more'][1][2]",
    ]


@pytest.mark.parametrize(
    ("rows", "kept"),
    [(torch.tensor([2, 0]), [9, 7]), (slice(1, None), [8, 9]), (torch.tensor([False, True, False]), [8])],
)
def test_samples_are_taken_from_every_tensor(rows, kept) -> None:
    some = take(TREE, rows)
    assert some["more"][0].tolist() == kept and some["pixels"].tolist() == [[2 * k - 14, 2 * k - 13] for k in kept]
    assert some["more"][1] == [True, "text", None]


def test_batches_are_joined_leaf_by_leaf() -> None:
    both = join([TREE, take(TREE, slice(0, 1))])
    assert both["more"][0].tolist() == [7, 8, 9, 7] and both["pixels"].shape == (4, 2)
    assert both["more"][1] == [True, "text", None] and isinstance(both["more"], tuple)


def test_models_are_called_with_what_they_take() -> None:
    class Echo(nn.Module):
        def forward(self, *args, **kwargs):
            return args, kwargs

    assert call_model(Echo(), 1) == ((1,), {})
    assert call_model(Echo(), (1, {"b": 2})) == ((1, {"b": 2}), {}) == call_model(Echo(), [1, {"b": 2}])
    assert call_model(Echo(), {"a": 1, "b": (2,)}) == ((), {"a": 1, "b": (2,)})


def test_logits_are_found_or_named() -> None:
    x = torch.ones(2, 3)
    assert all(logits_of(found) is x for found in (x, {"logits": x}, SimpleNamespace(logits=x)))
    assert logits_of((x, 1), lambda result: result[0]) is x
    for found in ((x,), {"scores": x}, SimpleNamespace(logits=None), None):
        with pytest.raises(TorchsliceError, match=r"are not known. Say where they are: output=lambda result: result"):
            logits_of(found)


def test_devices() -> None:
    assert device_of(nn.ReLU()).type == "cpu" and device_of(nn.Linear(2, 2, device="meta")).type == "meta"
    assert device_of(nn.BatchNorm1d(2, affine=False, device="meta")).type == "meta"
    assert {tensor.device.type for tensor in tensors(to_device(TREE, "meta"))} == {"meta"}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("cat.png", "got str cat.png"),
        (torch.tensor(1.0), "got a tensor float32 []"),
        ({"a": 3}, "got {'a': int 3}"),
        ([], "got ()"),
        ((torch.zeros(2, 3), torch.zeros(1)), "inputs[0] has 2, inputs[1] has 1"),
    ],
)
def test_what_has_no_samples_is_named(given, text: str) -> None:
    with pytest.raises(TorchsliceError, match=re.escape(text)):
        batch_size(given)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({**TREE, "pixels": torch.zeros(3, 4)}, "inputs['pixels'] must be like a tensor float32 [3, 2], got a tensor"),
        ({**TREE, "pixels": torch.zeros(3, 2).long()}, "inputs['pixels'] must be like"),
        ({**TREE, "pixels": "none"}, "inputs['pixels'] must be like a tensor float32 [3, 2], got str none"),
        ({"more": TREE["more"]}, "inputs['pixels'] is missing"),
        ({**TREE, "age": torch.zeros(3)}, "inputs['age'] is not expected"),
        (torch.zeros(3, 2), "inputs['pixels'] is missing"),
    ],
)
def test_inputs_of_another_structure_are_refused_with_the_leaf(given, text: str) -> None:
    with pytest.raises(TorchsliceError, match=re.escape(text)):
        check_like(given, TREE)
    with pytest.raises(TorchsliceError, match=re.escape(text)):
        join([TREE, given])
    check_like(take(TREE, slice(0, 1)), TREE)


def test_descriptions() -> None:
    assert describe(torch.zeros(2, 3, dtype=torch.bool)) == "a tensor bool [2, 3]"
    assert describe([1, (None, "a")]) == "(int 1, (NoneType, str a))"
