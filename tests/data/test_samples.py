"""Samples that a dataset reads one by one through a DataLoader, with and without worker processes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset

from torchslice.data import Samples
from torchslice.data.samples import inputs_and_labels
from torchslice.errors import TorchsliceError


class Squares(Dataset):
    """Item i is ({"number": i, "square": [i * i]}, i % 3); with `noise`, a random number is added to the square."""

    def __init__(self, n: int = 12, *, noise: bool = False, offset: int = 0) -> None:
        self.n, self.noise, self.offset = n, noise, offset

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int):
        square = torch.tensor([float(i * i)]) + self.noise * torch.rand(1)
        return {"number": torch.tensor(i), "square": square}, (i + self.offset) % 3


def squares(n: int = 12, **options) -> Samples:
    return Samples(Squares(n), torch.arange(n), torch.arange(n) % 3, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_read_in_the_order_asked_for(workers):
    batches = [torch.tensor([3, 1]), torch.tensor([11]), torch.tensor([0, 2, 4])]
    got = list(squares(workers=workers).read(batches))
    assert [inputs["number"].tolist() for inputs in got] == [[3, 1], [11], [0, 2, 4]]
    assert got[0]["square"].tolist() == [[9], [1]]
    parts = list(squares(workers=workers).read(iter(batches), part=lambda rows: rows[-1:]))
    assert [inputs["number"].tolist() for inputs in parts] == [[1], [11], [4]]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_samples_are_augmented_by_the_generator(workers):
    split = squares(training=Squares(noise=True), workers=workers)
    batches = list(torch.arange(12).split(3))

    def read(seed):
        return [inputs["square"] for inputs in split.read(batches, generator=torch.Generator().manual_seed(seed))]

    torch.manual_seed(0)
    first = read(1)
    torch.manual_seed(1)
    assert all(map(torch.equal, first, read(1))) and not any(map(torch.equal, first, read(2)))
    plain = torch.cat([inputs["square"] for inputs in split.read(batches)]).flatten()
    assert torch.equal(plain, torch.arange(12.0) ** 2)


def test_nothing_is_read_ahead_of_what_is_asked_for_for_ever():
    asked = []

    def endless():
        for i in range(10**9):
            asked.append(i)
            yield torch.tensor([i % 12])

    reader = squares(workers=1).read(endless())
    for _ in range(3):
        next(reader)
    reader.close()
    assert len(asked) <= 10


def test_splits_are_taken_relabelled_and_joined():
    split = squares().take(torch.arange(12) % 3 > 0)
    renamed = split.relabelled(split.labels - 1)
    assert renamed.labels.tolist() == [0, 1] * 4 and len(renamed) == 8
    other = Samples(Squares(4, offset=1), torch.tensor([3, 0]), torch.tensor([1, 1]))
    both = renamed.join(other)
    (inputs,) = both.read([torch.tensor([8, 0, 9, 7])])
    assert inputs["number"].tolist() == [3, 1, 0, 11] and both.labels[[8, 0, 9, 7]].tolist() == [1, 0, 1, 1]
    again = both.take(torch.tensor([9, 8])).join(renamed)
    assert next(again.read([torch.tensor([0, 1, 2])]))["number"].tolist() == [0, 3, 1]
    assert repr(both) == "10 samples of ConcatDataset" and split.like({"mean": [1.0]}) is split


class Odd(Squares):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def __getitem__(self, i: int):
        if self.what == "sizes":
            return torch.zeros(1 + i % 2), i % 3
        if self.what == "fails":
            raise KeyError("no such file")
        if self.what == "explains":
            raise TorchsliceError("a.png cannot be read as an image. Mend or remove it.")
        return torch.zeros(2), torch.randint(1000, ()).item()  # labels that change


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("sizes", "samples of a batch have different shapes; bring them to one shape in the dataset's transform"),
        ("explains", "^a.png cannot be read as an image. Mend or remove it.$"),
        ("labels", "its items must be the same each time"),
    ],
)
def test_items_that_cannot_be_used_are_explained(workers, what, message):
    split = Samples(Odd(what), torch.arange(12), torch.arange(12) % 3, workers=workers)
    with pytest.raises(TorchsliceError, match=message) as caught:
        list(split.read(torch.arange(12).split(3)))
    assert "Traceback" not in str(caught.value)


def test_an_error_of_the_users_own_dataset_stays_what_it_is():
    split = Samples(Odd("fails"), torch.arange(12), torch.arange(12) % 3)
    with pytest.raises(KeyError, match="no such file"):
        list(split.read(torch.arange(12).split(3)))


def test_a_batch_is_a_pair_of_inputs_and_labels():
    inputs, labels = inputs_and_labels([{"a": torch.zeros(2)}, torch.tensor([1, 0], dtype=torch.uint8)])
    assert labels.dtype == torch.int64 and inputs["a"].shape == (2,)
    for batch, text in [
        (torch.zeros(2, 3), "it yields Tensor"),
        ((1, 2, 3), "it yields 3 things"),
        ({}, "it yields dict"),
    ]:
        with pytest.raises(TorchsliceError, match=rf"must yield pairs \(inputs, labels\).*{text}. Put several inputs"):
            inputs_and_labels(batch)
