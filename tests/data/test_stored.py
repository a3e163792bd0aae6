"""Samples of any structure in memory."""

from __future__ import annotations

import hashlib

import pytest
import torch

from torchslice.data import Stored
from torchslice.errors import TorchsliceError


def named(n: int = 6) -> Stored:
    return Stored({"text": torch.arange(n), "more": (torch.arange(2.0 * n).view(n, 2),)}, torch.arange(n) % 3)


def digest(split) -> str:
    found = hashlib.sha256()
    split.update(found)
    return found.hexdigest()


def test_every_tensor_is_read_by_the_same_rows():
    one, two = named().read([torch.tensor([4, 1]), torch.tensor([0])], part=lambda rows: rows[:1])
    assert one["text"].tolist() == [4] and one["more"][0].tolist() == [[8, 9]] and two["text"].tolist() == [0]
    assert repr(named()) == "6 samples like {'text': a tensor int64 [1], 'more': (a tensor float32 [1, 2])}"


def test_splits_are_taken_relabelled_and_joined():
    split = named()
    some = split.take(split.labels == 2).relabelled(torch.tensor([0, 1]))
    assert some.inputs["text"].tolist() == [2, 5] and some.labels.tolist() == [0, 1] and len(some) == 2
    both = some.join(split)
    assert both.inputs["text"].tolist() == [2, 5, 0, 1, 2, 3, 4, 5] and len(both.labels) == 8
    assert split.like({"mean": [0.5]}) is split and split.preprocessing is None
    with pytest.raises(TorchsliceError, match=r"inputs\['text'\] must be like"):
        split.join(Stored({**split.inputs, "text": torch.zeros(6)}, split.labels))


def test_the_hash_sees_inputs_labels_and_order():
    split = named()
    others = [
        split.take(torch.tensor([1, 0, 2, 3, 4, 5])),
        split.relabelled(split.labels.flip(0)),
        Stored({**split.inputs, "text": split.inputs["text"] + 1}, split.labels),
    ]
    assert digest(split) == digest(named()) and len({digest(s) for s in (split, *others)}) == 4
    halves = Stored(torch.ones(2, 3, dtype=torch.bfloat16).t()[:2], torch.tensor([0, 1]))  # strided, and of any type
    assert digest(halves)


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (torch.zeros(3, 2), torch.tensor([0, 1]), "3 samples need labels"),
        (
            {"a": torch.zeros(3), "b": torch.zeros(2)},
            torch.zeros(3).long(),
            "inputs\\['a'\\] has 3, inputs\\['b'\\] has 2",
        ),
        ("text", torch.zeros(3).long(), "inputs must be tensors with the samples on their first axis"),
    ],
)
def test_what_is_not_labelled_samples_is_refused(inputs, labels, message):
    with pytest.raises(TorchsliceError, match=message):
        Stored(inputs, labels)
