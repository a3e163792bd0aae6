"""Tasks as values: three splits that share no sample, their classes, their fingerprint."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from itertools import chain

import pytest
import torch

from torchslice.data import Images, Samples, Stored, Task, joined
from torchslice.data import task as make_task
from torchslice.errors import TorchsliceError


def numbered(labels: list[int], channels: int = 1) -> Images:
    """Images of 2x2 whose pixels are the number of the sample."""
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, channels, 2, 2)
    return Images(images.contiguous(), torch.tensor(labels, dtype=torch.int64))


def ids(split: Images) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


@pytest.fixture
def task() -> Task:
    """Sixty samples of three classes: 48 to train on and to validate with, 12 to test."""
    return make_task(numbered([0, 1, 2] * 20), classes=["cat", "dog", "fox"], name="toy", validation_fraction=0.25)


def test_the_splits_of_a_task_share_no_sample(task):
    parts = [ids(split) for split in (task.train, task.validation, task.test)]
    assert [len(part) for part in parts] == [36, 12, 12]
    assert sorted(chain(*parts)) == list(range(60))
    assert str(task) == "Task(toy: 3 classes, train: 36 images of 1x2x2, validation: 12, test: 12)"
    assert task.split("test") is task.test
    with pytest.raises(TorchsliceError, match="unknown split 'tests'. Did you mean 'test'"):
        task.split("tests")


def test_the_seed_moves_the_validation_split_but_never_the_test_split():
    first, again, second = (make_task(numbered([0, 1] * 50), classes="ab", seed=seed) for seed in (0, 0, 1))
    assert ids(first.test) == ids(second.test)
    assert ids(first.validation) == ids(again.validation) != ids(second.validation)
    assert first.fingerprint == again.fingerprint != second.fingerprint


def test_all_splits_are_normalised_by_the_training_images(task):
    measured = task.train.measured()
    assert {(split.mean, split.std) for split in (task.train, task.validation, task.test)} == {
        (measured.mean, measured.std)
    }
    images = torch.cat([inputs for inputs, _ in task.batches("train", 10)])
    assert images.dtype == torch.float32 and torch.equal(task.example, images[:2])
    torch.testing.assert_close(images.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(images.std(correction=0), torch.tensor(1.0))
    assert task.preprocessing == {"mean": list(measured.mean), "std": list(measured.std), "input_shape": [1, 2, 2]}


def test_batches_are_in_order_whole_and_not_augmented(task):
    plain = replace(task, train=replace(task.train, crop_padding=1, flip=True))
    got = list(plain.batches("train", 10))
    assert [len(labels) for _, labels in got] == [10, 10, 10, 6] and len(list(plain.batches("test", 1))) == 12
    assert torch.equal(torch.cat([x for x, _ in got]), torch.cat([x for x, _ in task.batches("train", 36)]))
    assert torch.equal(torch.cat([y for _, y in got]), task.train.labels)
    parts = [
        [y for _, y in task.batches("test", 5, part=lambda rows, r=rank: rows.tensor_split(2)[r])] for rank in (0, 1)
    ]
    assert torch.equal(torch.cat([y for part in parts for y in part]), task.test.labels)
    with pytest.raises(TorchsliceError, match="batch_size must be at least 1, got 0"):
        next(task.batches("test", 0))


def test_restrict_renumbers_the_labels_in_the_order_given(task):
    pets = task.restrict(["fox", "cat"])
    assert pets.classes == ("fox", "cat") and pets.preprocessing == task.preprocessing
    for name in ("train", "validation", "test"):
        before, after = task.split(name), pets.split(name)
        assert ids(after) == [i for i, label in zip(ids(before), before.labels, strict=True) if label != 1]
        assert after.labels.tolist() == [{2: 0, 0: 1}[i] for i in before.labels.tolist() if i != 1]
    assert task.restrict(["dog"]).train.labels.unique().tolist() == [0]


def test_class_indices_keep_the_order_and_help_with_names(task):
    assert task.class_indices(["fox", "cat"]) == [2, 0]
    with pytest.raises(TorchsliceError) as caught:
        task.class_indices(["cta"])
    assert str(caught.value) == "unknown class of toy: 'cta'. Did you mean 'cat'? Known: cat, dog, fox."
    for names, text in [([], "none"), (["cat", "cat"], "cat, cat")]:
        with pytest.raises(TorchsliceError, match=f"at least one class, each once; got {text}"):
            task.restrict(names)


def test_limit_shrinks_the_splits_that_are_named(task):
    small = task.limit(train=6, test=3)
    assert [len(small.train), len(small.validation), len(small.test)] == [6, 12, 3]
    assert small.train.labels.bincount().tolist() == [2, 2, 2]
    assert ids(task.limit(train=6, seed=1).train) != ids(small.train)
    with pytest.raises(TorchsliceError, match="at least 1 sample, not to 0"):
        task.limit(validation=0)


def test_tasks_are_joined_with_the_known_classes_first(task):
    both = joined(task.restrict(["cat", "fox"]), task.restrict(["dog"]))
    assert both.classes == ("cat", "fox", "dog") and both.name == "toy and toy"
    assert len(both.train) == 36 and both.train.labels.bincount().tolist() == [12, 12, 12]
    for number, label in zip(ids(both.test), both.test.labels.tolist(), strict=True):
        assert ids(task.test).index(number) >= 0 and label == {0: 0, 2: 1, 1: 2}[number % 3]
    assert both.preprocessing == task.preprocessing
    with pytest.raises(TorchsliceError, match="class 'cat' is named twice"):
        joined(task, task.restrict(["cat"]))
    stored = make_task((torch.zeros(40, 2), torch.arange(40) % 2), classes=["a", "b"])
    with pytest.raises(TorchsliceError, match="keep their samples in different ways .*make both alike"):
        joined(task, stored)


def test_samples_prepared_as_a_network_needs_them(task):
    about = {"mean": [0.25], "std": [2.0], "input_shape": [1, 2, 2]}
    assert task.like(about).preprocessing == about and task.like(None) is task
    with pytest.raises(TorchsliceError, match="the network takes images of 3x4x4, and these are 1x2x2"):
        task.like({**about, "input_shape": [3, 4, 4]})


def test_values_cannot_be_changed(task):
    for thing in (task, task.train, Stored(torch.zeros(1), torch.zeros(1).long())):
        with pytest.raises(FrozenInstanceError):
            thing.labels = torch.zeros(3)


def test_a_task_of_the_wrong_form_is_refused():
    split, more = numbered([0, 1] * 9), numbered([0, 1, 2])
    for splits, classes, text in [
        (
            (split, split, more),
            "ab",
            r"toy, test split: there is a label 2, but 2 classes are named; labels must be in 0\.\.1",
        ),
        ((split, numbered([]), split), "ab", "toy, validation split: it has no samples. Every split needs some"),
        ((split, split, split), "aa", "class 'a' is named twice"),
    ]:
        with pytest.raises(TorchsliceError, match=text):
            Task("toy", tuple(classes), *splits)


def test_a_task_of_files_tells_its_fingerprint_without_reading_them():
    class Unread(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            raise AssertionError("read")

    split = Samples(Unread(), torch.arange(6), torch.arange(6) % 2)
    one, other = (Task("files", ("a", "b"), s, split, split) for s in (split, split.take(torch.arange(5))))
    assert one.fingerprint == Task("files", ("a", "b"), split, split, split).fingerprint != other.fingerprint
