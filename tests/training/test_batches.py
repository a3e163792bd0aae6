"""Batches: every image once, the same for any number of processes, and augmentation that is right pixel by pixel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.training.tiny import tiny_data

from torchslice.errors import TorchsliceError
from torchslice.training.batches import (
    TrainingBatches,
    class_batches,
    crop_and_flip,
    epoch_order,
    epoch_seed,
    in_order,
)
from torchslice.training.ranks import Ranks

CPU = torch.device("cpu")


def slow_crop_and_flip(images, top, left, flip, padding):
    """Do what `crop_and_flip` does, one image at a time, with slicing and `Tensor.flip`."""
    height, width = images.shape[2:]
    cut = []
    for image, y, x, mirror in zip(F.pad(images, (padding,) * 4), top.tolist(), left.tolist(), flip, strict=True):
        piece = image[:, y : y + height, x : x + width]
        cut.append(piece.flip(2) if mirror else piece)
    return torch.stack(cut)


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_every_image_is_cropped_and_flipped_on_its_own(padding):
    images = torch.randint(1, 256, (16, 3, 5, 7), dtype=torch.uint8)
    top, left = torch.randint(2 * padding + 1, (2, 16))
    flip = torch.arange(16) % 2 == 0
    got = crop_and_flip(images, top, left, flip, padding)
    assert torch.equal(got, slow_crop_and_flip(images, top, left, flip, padding))
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_a_crop_by_hand():
    image = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8)
    none = torch.tensor([0])
    assert crop_and_flip(image, none, none, torch.tensor([False]), 1).flatten().tolist() == [0, 0, 0, 1]
    assert crop_and_flip(image, none + 1, none + 1, torch.tensor([True]), 1).flatten().tolist() == [2, 1, 4, 3]


@given(count=st.integers(2, 50), batch=st.integers(2, 16), ranks=st.integers(1, 3))
def test_an_epoch_visits_nearly_every_image_once(count, batch, ranks):
    batches = epoch_order(count, batch, torch.Generator().manual_seed(1), ranks)
    seen = torch.cat(batches).tolist() if batches else []
    assert len(set(seen)) == len(seen)
    assert all(len(rows) % ranks == 0 and len(rows) >= 2 * ranks for rows in batches)
    if batch % ranks == 0 and batch >= 2 * ranks:
        assert count - len(seen) <= 2 * ranks - 1


def test_epochs_differ_and_repeat():
    batches = TrainingBatches(tiny_data(), batch_size=8, seed=3, device=CPU)
    first, again, second = (torch.cat([y for _, y in batches.epoch(e)]) for e in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert len(batches) == 3
    assert len({epoch_seed(s, e, r) for s in range(3) for e in range(3) for r in range(3)}) == 27


def test_processes_share_the_same_global_batches():
    data = tiny_data()
    one = TrainingBatches(data, batch_size=8, seed=0, device=CPU)
    two = [TrainingBatches(data, batch_size=8, seed=0, device=CPU, ranks=Ranks(r, 2)) for r in (0, 1)]
    parts = zip(one.epoch(4), two[0].epoch(4), two[1].epoch(4), strict=True)
    for (images, labels), (left, left_labels), (right, right_labels) in parts:
        assert torch.equal(images, torch.cat([left, right]))
        assert torch.equal(labels, torch.cat([left_labels, right_labels]))


@given(
    counts=st.lists(st.integers(1, 20), min_size=2, max_size=6),
    size=st.integers(2, 30),
    sets=st.lists(st.integers(2, 8), min_size=1, max_size=3),
)
def test_batches_of_few_classes_have_equal_parts_and_use_every_image_of_a_class_before_one_comes_again(
    counts, size, sets
):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    allowed = {min(s, len(counts), size) for s in sets}
    seen = torch.zeros(len(labels), dtype=torch.int64)
    for batch in class_batches(labels, size, sets, 12, torch.Generator().manual_seed(0)):
        parts = labels[batch].bincount()
        parts = parts[parts > 0]
        assert len(batch) == size and len(parts) in allowed
        assert parts.max() - parts.min() <= 1
        seen += batch.bincount(minlength=len(labels))
    turns = [seen[labels == label] for label in range(len(counts))]
    assert all(own.max() - own.min() <= 1 for own in turns)


def test_batches_of_few_classes_are_the_same_for_any_number_of_processes():
    data = tiny_data()
    settings = {"batch_size": 8, "seed": 0, "device": CPU, "classes_per_batch": (2, 3)}
    one = TrainingBatches(data, **settings)
    two = [TrainingBatches(data, ranks=Ranks(rank, 2), **settings) for rank in (0, 1)]
    parts = list(zip(one.epoch(1), two[0].epoch(1), two[1].epoch(1), strict=True))
    assert len(parts) == len(one) == 3
    for (images, labels), (left, left_labels), (right, right_labels) in parts:
        assert torch.equal(images, torch.cat([left, right]))
        assert torch.equal(labels, torch.cat([left_labels, right_labels]))


@pytest.mark.parametrize("size", [1, 0, 4, -1])
def test_a_set_of_classes_that_cannot_be_is_an_error(size):
    with pytest.raises(TorchsliceError, match=rf"a batch has images of 2 to 3 classes; got {size}\."):
        TrainingBatches(tiny_data(), batch_size=8, seed=0, device=CPU, classes_per_batch=(2, size))


def test_order_is_kept_and_nothing_augmented_outside_training():
    data = tiny_data()
    got = list(in_order(data, data.validation, batch_size=4, device=CPU))
    assert torch.equal(torch.cat([x for x, _ in got]), data.normalise(data.validation.images))
    assert torch.equal(torch.cat([y for _, y in got]), data.validation.labels)
    parts = [list(in_order(data, data.validation, batch_size=4, device=CPU, ranks=Ranks(r, 2))) for r in (0, 1)]
    assert torch.equal(torch.cat([y for part in parts for _, y in part]), data.validation.labels)


def test_without_augmentation_the_images_are_the_training_images():
    data = tiny_data(flip=False, crop_padding=0)
    images = torch.cat([x for x, _ in TrainingBatches(data, batch_size=8, seed=0, device=CPU).epoch(1)])
    plain = data.normalise(data.train.images)
    assert torch.equal(images.flatten(1).sum(1).sort().values, plain.flatten(1).sum(1).sort().values)


@pytest.mark.parametrize(("size", "ranks"), [(1, 1), (0, 1), (7, 2), (2, 2)])
def test_a_batch_size_that_cannot_be_shared_is_an_error(size, ranks):
    with pytest.raises(TorchsliceError, match=f"batch_size {size} cannot be shared by {ranks} process"):
        TrainingBatches(tiny_data(), batch_size=size, seed=0, device=CPU, ranks=Ranks(0, ranks))


def test_too_few_images_are_an_error():
    with pytest.raises(TorchsliceError, match=r"too few to train on; give at least 2"):
        TrainingBatches(tiny_data(1), batch_size=8, seed=0, device=CPU)
