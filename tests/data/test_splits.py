"""Splits and data sets as values: drawing, holding out, restricting, normalising."""

from dataclasses import FrozenInstanceError
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchslice.data import Data, Split
from torchslice.data.splits import channel_statistics, hold_out, rank_in_class
from torchslice.errors import TorchsliceError


def numbered(labels: list[int], channels: int = 1) -> Split:
    """Images of 2x2 whose pixels are the number of the sample."""
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, channels, 2, 2)
    return Split(images.contiguous(), torch.tensor(labels, dtype=torch.int64))


def ids(split: Split) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


@pytest.fixture
def data() -> Data:
    """Sixty samples of three classes: 48 to train on and to validate with, 12 to test."""
    return Data.build("toy", numbered([0, 1, 2] * 20), classes=["cat", "dog", "fox"], validation_share=0.25)


labels = st.lists(st.integers(0, 4), min_size=1, max_size=60)


@given(labels, st.integers(0, 3))
def test_rank_in_class_numbers_every_class_from_zero(labels, seed):
    rank = rank_in_class(torch.tensor(labels), seed)
    for label in set(labels):
        assert sorted(rank[torch.tensor(labels) == label].tolist()) == list(range(labels.count(label)))


@given(labels, st.floats(0.01, 0.99), st.integers(0, 3))
def test_hold_out_divides_every_class_by_the_share(labels, share, seed):
    split = numbered(labels)
    rest, held = hold_out(split, share, seed=seed)
    assert sorted(ids(rest) + ids(held)) == list(range(len(labels)))
    assert ids(rest) == sorted(ids(rest)) and ids(held) == sorted(ids(held))
    for label in set(labels):
        total, out = labels.count(label), held.labels.tolist().count(label)
        assert out == 0 if total == 1 else 1 <= out <= total - 1
        assert abs(out - share * total) <= 1


@given(labels, st.integers(1, 60))
def test_limit_draws_as_evenly_as_the_classes_allow(labels, count):
    drawn = numbered(labels).limit(count)
    assert len(drawn) == min(count, len(labels))
    taken = {label: drawn.labels.tolist().count(label) for label in set(labels)}
    most = max(taken.values())
    assert all(n >= most - 1 or n == labels.count(label) for label, n in taken.items())


def test_drawing_depends_on_the_seed_alone():
    split = numbered([0, 1] * 50)
    assert ids(split.limit(10, seed=1)) == ids(split.limit(10, seed=1)) != ids(split.limit(10, seed=2))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    hold_out(split, 0.5, seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_take_by_indices_and_by_mask():
    split = numbered([0, 1, 0, 1])
    assert ids(split.take(torch.tensor([3, 0]))) == [3, 0]
    assert ids(split.take(split.labels == 1)) == [1, 3]
    assert len(split) == 4 and str(split) == "Split(4 images of 1x2x2)"
    assert split.limit(99) is split


def test_channel_statistics_by_hand_and_against_the_definition():
    images = torch.tensor([[0, 255], [255, 255]], dtype=torch.uint8).view(2, 2, 1, 1)  # channels 0: 0 255, 1: 255 255
    assert channel_statistics(images) == ((0.5, 1.0), (0.5, 1 / 255))
    images = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8)
    mean, std = channel_statistics(images)
    scaled = images.double() / 255
    torch.testing.assert_close(torch.tensor(mean).double(), scaled.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(std).double(), scaled.std((0, 2, 3), correction=0))


def test_the_splits_of_a_data_set_share_no_sample(data):
    parts = [ids(split) for split in (data.train, data.validation, data.test)]
    assert [len(part) for part in parts] == [36, 12, 12]
    assert sorted(chain(*parts)) == list(range(60))
    assert str(data) == "Data(toy: 3 classes, 36 / 12 / 12 train / validation / test images of 1x2x2)"


def test_the_seed_moves_the_validation_split_but_never_the_test_split():
    first, second = (Data.build("toy", numbered([0, 1] * 50), classes="ab", seed=seed) for seed in (0, 1))
    assert ids(first.test) == ids(second.test)
    assert ids(first.validation) != ids(second.validation)
    assert first.fingerprint != second.fingerprint


def test_statistics_are_those_of_the_training_images_and_normalise_them(data):
    assert (data.mean, data.std) == channel_statistics(data.train.images)
    images = data.normalise(data.train.images)
    assert images.dtype == torch.float32 and data.train.images.dtype == torch.uint8
    torch.testing.assert_close(images.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(images.std(correction=0), torch.tensor(1.0))
    assert data.example.shape == (2, 1, 2, 2) and torch.equal(data.example, images[:2])
    assert data.preprocessing == {"mean": list(data.mean), "std": list(data.std), "input_shape": [1, 2, 2]}


def test_restrict_renumbers_the_labels_in_the_order_given(data):
    pets = data.restrict(["fox", "cat"])
    assert pets.classes == ("fox", "cat") and (pets.mean, pets.std) == (data.mean, data.std)
    for part in ("train", "validation", "test"):
        before, after = getattr(data, part), getattr(pets, part)
        assert ids(after) == [i for i, label in zip(ids(before), before.labels, strict=True) if label != 1]
        assert after.labels.tolist() == [{2: 0, 0: 1}[i] for i in before.labels.tolist() if i != 1]
    assert data.restrict(["dog"]).train.labels.unique().tolist() == [0]


def test_class_indices_keep_the_order_and_help_with_names(data):
    assert data.class_indices(["fox", "cat"]) == [2, 0]
    with pytest.raises(TorchsliceError) as caught:
        data.class_indices(["cta"])
    assert str(caught.value) == ("unknown class of data set 'toy': 'cta'. Did you mean 'cat'? Known: cat, dog, fox.")
    with pytest.raises(TorchsliceError, match="at least one class, each once; got none"):
        data.restrict([])
    with pytest.raises(TorchsliceError, match="at least one class, each once; got cat, cat"):
        data.restrict(["cat", "cat"])


def test_limit_shrinks_the_splits_that_are_named(data):
    small = data.limit(train=6, test=3)
    assert [len(small.train), len(small.validation), len(small.test)] == [6, 12, 3]
    assert small.train.labels.bincount().tolist() == [2, 2, 2]
    with pytest.raises(TorchsliceError, match="at least 1 sample, not to 0"):
        data.limit(validation=0)


def test_values_cannot_be_changed(data):
    with pytest.raises(FrozenInstanceError):
        data.name = "other"
    with pytest.raises(FrozenInstanceError):
        data.train.labels = torch.zeros(3)


IMAGES = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES.float(), torch.zeros(3).long(), "images must be uint8 [n, channels, height, width], got torch.float32"),
        (
            IMAGES[0],
            torch.zeros(1).long(),
            "images must be uint8 [n, channels, height, width], got torch.uint8 [1, 2, 2]",
        ),
        (IMAGES, torch.zeros(3), "3 images need int64 labels [3], got torch.float32 [3]"),
        (IMAGES, torch.zeros(2).long(), "3 images need int64 labels [3], got torch.int64 [2]"),
        (IMAGES, torch.tensor([0, -1, 0]), "labels must be 0, 1, 2, ..., got -1"),
    ],
)
def test_a_split_of_the_wrong_form_is_refused(images, labels, message):
    with pytest.raises(TorchsliceError) as caught:
        Split(images, labels)
    assert message in str(caught.value)


def test_a_data_set_of_the_wrong_form_is_refused():
    with pytest.raises(TorchsliceError, match="train split: there is a label 1, but 1 classes are named"):
        Data.build("toy", numbered([0, 1] * 9), classes=["cat"])
    with pytest.raises(TorchsliceError, match="validation split: there are no images"):
        Data.build("toy", numbered([0, 1]), classes="ab")
    with pytest.raises(TorchsliceError, match="train split: there are no images"):
        Data.build("toy", numbered([]), classes="ab")
    with pytest.raises(TorchsliceError, match=r"test split: images are \[3, 2, 2\], the training images \[1, 2, 2\]"):
        Data.build("toy", numbered([0, 1] * 9), numbered([0, 1], channels=3), classes="ab")
    for share in (0.0, 1.0, -0.5):
        with pytest.raises(TorchsliceError, match="must be between 0 and 1, got"):
            Data.build("toy", numbered([0, 1] * 9), classes="ab", validation_share=share)
