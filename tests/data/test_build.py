"""data.task: every kind of source gives the same task, and every bad one is explained before anything else."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from torchslice.data import Images, Samples, Stored, build, task
from torchslice.errors import TorchsliceError

N = 60
NUMBERS, LABELS = torch.arange(float(N)), torch.arange(N) % 3
CLASSES = ["cat", "dog", "fox"]


class Numbers(Dataset):
    """Item i is ({"number": i}, i % 3), like those of a user."""

    classes = CLASSES

    def __init__(self, n: int = N) -> None:
        self.n, self.read = n, 0

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int):
        if not 0 <= i < self.n:
            raise IndexError(i)
        self.read += 1
        return {"number": NUMBERS[i]}, i % 3


class Targets(Numbers):
    """It tells its labels, as the data sets of torchvision do."""

    def __init__(self, n: int = N) -> None:
        super().__init__(n)
        self.targets = [i % 3 for i in range(n)]


class Stream(IterableDataset):
    def __iter__(self):
        return (({"number": NUMBERS[i]}, int(LABELS[i])) for i in range(N))


def batches():
    return [({"number": NUMBERS[i : i + 8]}, LABELS[i : i + 8]) for i in range(0, N, 8)]


SOURCES = {
    "a pair of tensors": (({"number": NUMBERS}, LABELS), Stored),
    "a list of batches": (batches(), Stored),
    "a generator function": (lambda: iter(batches()), Stored),
    "a loader of a stream": (DataLoader(Stream(), batch_size=7), Stored),
    "a dataset": (Numbers(), Samples),
    "a dataset with targets": (Targets(), Samples),
    "a loader": (DataLoader(Numbers(), batch_size=7, shuffle=True), Samples),
    "a loader with workers": (DataLoader(Targets(), batch_size=7, num_workers=1), Samples),
    "a subset": (Subset(Targets(2 * N), range(N)), Samples),
    "joined datasets": (ConcatDataset([Subset(Targets(), range(30)), Subset(Targets(), range(30, N))]), Samples),
    "a split": (Stored({"number": NUMBERS}, LABELS), Stored),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_gives_the_same_task(kind):
    source, expected = SOURCES[kind]
    made = task(source, classes=CLASSES, validation_fraction=0.25)
    assert made.classes == tuple(CLASSES) and isinstance(made.train, expected)
    assert [len(made.train), len(made.validation), len(made.test)] == [36, 12, 12]
    seen = []
    for name in ("train", "validation", "test"):
        for inputs, labels in made.batches(name, 10):
            assert list(inputs) == ["number"] and torch.equal(inputs["number"].long() % 3, labels)
            seen += inputs["number"].tolist()
    assert sorted(seen) == NUMBERS.tolist()
    assert set(made.example) == {"number"} and made.example["number"].shape == (2,)
    same = task(({"number": NUMBERS}, LABELS), classes=CLASSES, validation_fraction=0.25)
    assert torch.equal(next(made.batches("test", 12))[0]["number"], next(same.batches("test", 12))[0]["number"])


def test_two_inputs_as_a_pair():
    made = task(((NUMBERS, NUMBERS + 1), LABELS))
    assert isinstance(made.example, tuple) and torch.equal(made.example[0] + 1, made.example[1])


def test_splits_that_are_given_are_kept_and_only_the_others_drawn():
    made = task(Numbers(), test=Numbers(9), validation_fraction=0.5)
    assert [len(made.train), len(made.validation), len(made.test)] == [30, 30, 9]
    made = task(Numbers(), validation=Numbers(9))
    assert [len(made.train), len(made.validation), len(made.test)] == [48, 9, 12]
    made = task(batches(), batches()[:2], DataLoader(Numbers(9)))
    assert [len(made.train), len(made.validation), len(made.test)] == [N, 16, 9]


def test_class_names_come_from_the_dataset_behind_the_loader():
    assert task(DataLoader(Subset(Targets(), range(30)))).classes == tuple(CLASSES)
    assert task(batches()).classes == ("0", "1", "2")
    assert task(Numbers(), classes=["x", "y", "z"]).classes == ("x", "y", "z")


def test_labels_that_a_dataset_tells_are_not_read():
    told, read = Targets(), Numbers()
    task(told)
    task(read)
    assert told.read <= 4 < N <= read.read
    told = Targets()
    task(ConcatDataset([Subset(told, range(20)), told]))
    assert told.read <= 4
    assert len(task(ConcatDataset([told, Numbers()]), test=Numbers(9), validation=Numbers(9)).train) == 2 * N


def test_a_loaders_choice_of_samples_and_collate_function_are_kept():
    chosen = DataLoader(Targets(), sampler=SubsetRandomSampler(range(30)))
    assert len(task(chosen, test=Numbers(9), validation=Numbers(9)).train) == 30

    def collate(items):
        return torch.stack([inputs["number"] for inputs, _ in items]), torch.tensor([label for _, label in items])

    made = task(DataLoader(Numbers(), collate_fn=collate))
    assert made.example.shape == (2,)


def test_images_are_normalised_by_the_training_images_unless_they_say_how():
    images = torch.randint(256, (30, 1, 2, 2), dtype=torch.uint8)
    split, own = Images(images, torch.arange(30) % 2), Images(images, torch.arange(30) % 2, (0.5,), (0.5,))
    made = task(split, test=own)
    assert made.train.mean == made.validation.mean != (0.5,) and made.test.mean == (0.5,)


def test_preprocessing_is_kept_for_what_is_saved():
    about = {"mean": [0.5], "note": "grey"}
    assert task(batches(), preprocessing=about).preprocessing == about
    assert task(Numbers(), preprocessing=about).restrict(["cat", "dog"]).preprocessing == about
    assert task(batches()).preprocessing is None


class Sizes(Targets):
    def __getitem__(self, i: int):
        return torch.zeros(3, 8 + i % 2, 8), i % 3


class Three(Targets):
    def __getitem__(self, i: int):
        return torch.zeros(3), torch.zeros(2), i % 3


class Lies(Targets):
    def __getitem__(self, i: int):
        return torch.zeros(3), (i + 1) % 3


def once():
    yield from batches()


def with_labels(labels) -> list:
    return [(torch.zeros(len(labels), 2), torch.as_tensor(labels))]


BAD = {
    "a single tensor": (torch.zeros(9, 3), "pairs (inputs, labels)"),
    "three things": (
        [(torch.zeros(2), torch.zeros(2), torch.tensor([0, 1]))],
        "train: a loader must yield pairs (inputs",
    ),
    "three things of a dataset": (Three(), "it yields 3 things. Put several inputs into one tuple or dictionary"),
    "only inputs": (DataLoader(TensorDataset(torch.zeros(9, 3))), "it yields 1 things"),
    "labels that are too large": (with_labels([0, 1, 3]), "train has a label 3; labels must be whole numbers in 0..2"),
    "labels that are negative": (with_labels([0, 1, -1]), "labels must be 0, 1, 2, ..., got -1"),
    "labels that are no whole numbers": (with_labels([0.0, 1.0]), "whole numbers"),
    "labels of several axes": (with_labels([[0, 1], [1, 0]]), "whole numbers [2]; got torch.int64 [2, 2]"),
    "another number of labels": ([(torch.zeros(3, 2), torch.tensor([0, 1]))], "3 samples need labels"),
    "a class without samples": (with_labels([0, 1] * 9), "class 'fox' of toy has no training sample"),
    "other inputs in a later batch": (
        [*batches(), ({"number": torch.zeros(2, 3)}, torch.tensor([0, 1]))],
        "inputs['number'] must be like a tensor float32 [8], got a tensor float32 [2, 3]",
    ),
    "a missing leaf in a later batch": ([*batches(), ({}, torch.tensor([0, 1]))], "inputs must be tensors"),
    "a generator": (once(), "train is an iterator (generator), which can be read only once. Give a function"),
    "no batch": ([], "train yields no batch"),
    "an empty dataset": (Targets(0), "train: the dataset is empty"),
    "images of different sizes": (Sizes(), "have different shapes; bring them to one shape in the dataset's transform"),
    "a number": (3, "train must be a DataLoader, a dataset, or batches (inputs, labels); got int"),
    "a sampler of one's own": (
        DataLoader(Targets(), sampler=WeightedRandomSampler([1.0] * N, 5)),
        "its sampler (WeightedRandomSampler) would be replaced",
    ),
    "a batch sampler of one's own": (DataLoader(Targets(), batch_sampler=[[0, 1, 2], [3, 4, 5]]), "would be replaced"),
    "a sampler with replacement": (
        DataLoader(Targets(), sampler=RandomSampler(Targets(), replacement=True, num_samples=10)),
        "would be replaced",
    ),
    "labels that differ from those told": (Lies(), "its items must be the same each time"),
    "a list of samples": ([(torch.zeros(3), 0), (torch.zeros(3), 1)] * 9, "labels"),
    "text as labels": ([(torch.zeros(2, 3), ["a", "b"])], "labels"),
    "nothing as labels": ([(torch.zeros(2, 3), None)], "labels"),
    "ragged labels": ([(torch.zeros(2, 3), [[0], [1, 2]])], "labels"),
    "a class": (TensorDataset, "train must be"),
    "an array": (torch.zeros(9, 3).numpy(), "train"),
    "text as inputs": ([("cat.png", torch.tensor([0]))], "inputs must be tensors with the samples on their first axis"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_task_is_explained(kind):
    source, text = BAD[kind]
    with pytest.raises(TorchsliceError, match=re.escape(text)) as caught:
        task(source, classes=CLASSES, name="toy")
    assert "\n" not in str(caught.value)


def test_the_split_that_is_wrong_is_named():
    for name in ("validation", "test"):
        with pytest.raises(TorchsliceError, match=f"{name} has a label 7"):
            task(batches(), **{name: with_labels([0, 7])}, classes=CLASSES)
        with pytest.raises(TorchsliceError, match=f"{name} is an iterator"):
            task(batches(), **{name: once()})


def test_a_single_class_is_no_task():
    with pytest.raises(TorchsliceError, match=r"toy has 1 class\(es\); a classifier needs at least two"):
        task(with_labels([0] * 30), name="toy")


def test_test_and_validation_inputs_must_be_like_those_of_training():
    for name in ("validation", "test"):
        with pytest.raises(TorchsliceError, match="inputs"):
            task(batches(), **{name: with_labels([0, 1, 2])})


def test_huge_labels_take_no_memory():
    for labels in ([0, 10**9], [0, 2**62]):
        with pytest.raises(TorchsliceError, match=r"labels must be whole numbers in 0\.\.99999"):
            task(with_labels(labels))


def test_batches_that_do_not_fit_into_memory_are_refused_as_soon_as_that_is_known(monkeypatch):
    monkeypatch.setattr(build, "MEMORY_GB", 1e-6)
    read = []

    def many():
        for batch in batches() * 100:
            read.append(1)
            yield {"number": batch[0]["number"].repeat(1, 100).view(len(batch[1]), -1)}, batch[1]

    with pytest.raises(TorchsliceError, match="take more than 1e-06 GiB of memory. Give a DataLoader over a dataset"):
        task(many)
    assert len(read) < 3


def test_too_few_samples_for_three_splits():
    with pytest.raises(TorchsliceError, match="validation split: it has no samples"):
        task(with_labels([0, 0, 1, 1]))
    for fraction in (0.0, 1.0, -0.5):
        with pytest.raises(TorchsliceError, match="must be between 0 and 1, got"):
            task(batches(), validation_fraction=fraction)
