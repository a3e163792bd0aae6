"""Batches: every sample once, and the same for any number of processes."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Two:
    """A step about two of three classes."""

    classes: tuple[int, ...]


def two_of_three(generator: torch.Generator) -> Two:
    return Two(tuple(sorted(torch.randperm(3, generator=generator)[:2].tolist())))


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
    first, again, second = ([(flat(x), y) for x, y, _ in batches.epoch(e)] for e in (1, 1, 2))
    assert all(torch.equal(x, z) and torch.equal(y, w) for (x, y), (z, w) in zip(first, again, strict=True))
    assert not torch.equal(torch.cat([y for _, y in first]), torch.cat([y for _, y in second]))
    assert len(batches) == len(first)
    assert len({epoch_seed(s, e, r) for s in range(3) for e in range(3) for r in range(3)}) == 27


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("draw", [None, two_of_three])
def test_processes_share_the_same_global_batches_and_what_was_drawn(kind, draw):
    made = TASKS[kind]()
    settings = {"batch_size": 8, "seed": 0, "draw": draw}
    one = Batches(made, **settings)
    two = [Batches(made, ranks=Ranks(rank, 2), **settings) for rank in (0, 1)]
    parts = list(zip(one.epoch(4), two[0].epoch(4), two[1].epoch(4), strict=True))
    assert len(parts) == len(one) >= 3
    for (inputs, labels, step), (left, left_labels, left_step), (right, right_labels, right_step) in parts:
        assert step == left_step == right_step and (step is None) is (draw is None)
        assert draw is None or labels.unique().tolist() == [*step.classes]
        assert torch.equal(flat(inputs), torch.cat([flat(left), flat(right)]))
        assert torch.equal(labels, torch.cat([left_labels, right_labels]))
        if kind != "images":
            assert torch.equal(flat(inputs).long() % 3, labels)


@given(counts=st.lists(st.integers(1, 20), min_size=2, max_size=6), size=st.integers(2, 30), draw=st.data())
def test_batches_are_of_the_classes_drawn_and_use_every_sample_before_one_comes_again(counts, size, draw):
    labels, every = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)), range(len(counts))
    some = st.sets(st.sampled_from(every), min_size=1, max_size=min(size, len(counts)))
    steps = [Two(tuple(sorted(classes))) for classes in draw.draw(st.lists(some, min_size=5, max_size=12))]
    of_few, of_all = torch.zeros(2, len(labels), dtype=torch.int64)
    for (batch, step), drawn in zip(class_batches(labels, size, steps, torch.Generator()), steps, strict=True):
        assert step is drawn and len(batch) == size
        if len(step.classes) == len(counts):
            of_all += batch.bincount(minlength=len(labels))
        else:
            parts = labels[batch].bincount(minlength=len(counts))
            assert parts.nonzero().flatten().tolist() == [*step.classes]
            assert parts[parts > 0].max() - parts[parts > 0].min() <= 1
            of_few += batch.bincount(minlength=len(labels))
    turns = [of_all, *(of_few[labels == label] for label in every)]
    assert all(own.max() - own.min() <= 1 for own in turns)


def test_a_class_without_a_sample_cannot_be_drawn():
    split = Stored(torch.zeros(4, 2), torch.tensor([0, 2, 0, 2]))
    made = Task("small", ("a", "b", "c"), split, split, split)
    with pytest.raises(TorchsliceError, match="class 'b' of small has no training sample"):
        Batches(made, batch_size=2, seed=0, draw=two_of_three)
    assert len(Batches(made, batch_size=2, seed=0)) == 2


def test_without_augmentation_the_inputs_are_the_training_samples():
    made = tiny_task(flip=False, crop_padding=0)
    images = torch.cat([x for x, *_ in Batches(made, batch_size=8, seed=0).epoch(1)])
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


@pytest.mark.parametrize("draw", [None, two_of_three])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_batch_is_never_larger_than_its_split(draw, ranks):
    made = TASKS["stored"]()
    batches = Batches(made, batch_size=10**12, seed=0, draw=draw, ranks=Ranks(0, ranks))
    whole = len(made.train) - len(made.train) % ranks
    assert [len(labels) for _, labels, _ in batches.epoch(1)] == [whole // ranks]
