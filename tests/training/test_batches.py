"""Batches: every sample once, and the same for any number of processes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_samples import Squares
from tests.nets import tiny_task
from torchslice.data import Samples, Stored, Task, task
from torchslice.errors import TorchsliceError
from torchslice.training.batches import Batches, class_batches, epoch_order, epoch_seed
from torchslice.training.ranks import Ranks


def squares(workers: int) -> Task:
    split = Samples(Squares(48), torch.arange(48), torch.arange(48) % 3, workers=workers)
    return task(split, validation_fraction=0.2)


TASKS = {
    "images": tiny_task,
    "stored": lambda: task((torch.arange(48.0), torch.arange(48) % 3), validation_fraction=0.2),
    "files": lambda: squares(0),
    "files with workers": lambda: squares(2),
}


def flat(inputs) -> torch.Tensor:
    return inputs["number"] if isinstance(inputs, dict) else inputs


@given(count=st.integers(2, 50), batch=st.integers(2, 16), ranks=st.integers(1, 3))
def test_an_epoch_visits_nearly_every_sample_once(count, batch, ranks):
    batches = epoch_order(count, batch, torch.Generator().manual_seed(1), ranks)
    seen = torch.cat(batches).tolist() if batches else []
    assert len(set(seen)) == len(seen)
    assert all(len(rows) % ranks == 0 and len(rows) >= 2 * ranks for rows in batches)
    if batch % ranks == 0 and batch >= 2 * ranks:
        assert count - len(seen) <= 2 * ranks - 1


@pytest.mark.parametrize("kind", TASKS)
def test_epochs_differ_and_repeat(kind):
    batches = Batches(TASKS[kind](), batch_size=8, seed=3)
    first, again, second = ([(flat(x), y) for x, y in batches.epoch(e)] for e in (1, 1, 2))
    assert all(torch.equal(x, z) and torch.equal(y, w) for (x, y), (z, w) in zip(first, again, strict=True))
    assert not torch.equal(torch.cat([y for _, y in first]), torch.cat([y for _, y in second]))
    assert len(batches) == len(first)
    assert len({epoch_seed(s, e, r) for s in range(3) for e in range(3) for r in range(3)}) == 27


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("sizes", [None, (2, 3)])
def test_processes_share_the_same_global_batches(kind, sizes):
    made = TASKS[kind]()
    settings = {"batch_size": 8, "seed": 0, "classes_per_batch": sizes}
    one = Batches(made, **settings)
    two = [Batches(made, ranks=Ranks(rank, 2), **settings) for rank in (0, 1)]
    parts = list(zip(one.epoch(4), two[0].epoch(4), two[1].epoch(4), strict=True))
    assert len(parts) == len(one) >= 3
    for (inputs, labels), (left, left_labels), (right, right_labels) in parts:
        assert torch.equal(flat(inputs), torch.cat([flat(left), flat(right)]))
        assert torch.equal(labels, torch.cat([left_labels, right_labels]))
        if kind != "images":
            assert torch.equal(flat(inputs).long() % 3, labels)


@given(
    counts=st.lists(st.integers(1, 20), min_size=2, max_size=6),
    size=st.integers(2, 30),
    sets=st.lists(st.integers(2, 8), min_size=1, max_size=3),
)
def test_batches_of_few_classes_have_equal_parts_and_use_every_sample_of_a_class_before_one_comes_again(
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


def test_classes_without_a_sample_are_never_drawn():
    for batch in class_batches(torch.tensor([0, 3, 0, 3]), 4, [2], 5, torch.Generator()):
        assert len(batch) == 4 and sorted(set(batch.tolist())) == [0, 1, 2, 3]


def test_without_augmentation_the_inputs_are_the_training_samples():
    made = tiny_task(flip=False, crop_padding=0)
    images = torch.cat([x for x, _ in Batches(made, batch_size=8, seed=0).epoch(1)])
    plain = torch.cat([x for x, _ in made.batches("train", 8)])
    assert torch.equal(images.flatten(1).sum(1).sort().values, plain.flatten(1).sum(1).sort().values)


@pytest.mark.parametrize(("size", "ranks"), [(1, 1), (0, 1), (7, 2), (2, 2)])
def test_a_batch_size_that_cannot_be_shared_is_an_error(size, ranks):
    with pytest.raises(TorchsliceError, match=f"batch_size {size} cannot be shared by {ranks} process"):
        Batches(tiny_task(), batch_size=size, seed=0, ranks=Ranks(0, ranks))


def test_two_samples_for_each_process_are_enough():
    for ranks in (1, 2):
        assert len(Batches(tiny_task(), batch_size=2 * ranks, seed=0, ranks=Ranks(0, ranks))) == 24 // (2 * ranks)


def test_too_few_samples_are_an_error():
    split = Stored(torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(
        TorchsliceError, match=r"1 training sample\(s\) of small are too few to train on; give at least 2"
    ):
        Batches(Task("small", ("a", "b"), split, split, split), batch_size=8, seed=0)
