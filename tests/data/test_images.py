"""Images in memory: normalised by their own statistics, augmented pixel by pixel as a slow loop would."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from torchslice.data import Images
from torchslice.data.images import channel_statistics, crop_and_flip
from torchslice.errors import TorchsliceError

ZEROS = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)


def random_images(n: int = 12, **options) -> Images:
    return Images(torch.randint(0, 256, (n, 3, 5, 7), dtype=torch.uint8), torch.arange(n) % 3, **options)


def slow_crop_and_flip(images, top, left, flip, padding):
    """Do what `crop_and_flip` does, one image at a time, with padding, slicing and `Tensor.flip`."""
    height, width = images.shape[2:]
    cut, padded = [], F.pad(images.float(), (padding,) * 4, "reflect").byte()
    for image, y, x, mirror in zip(padded, top.tolist(), left.tolist(), flip, strict=True):
        piece = image[:, y : y + height, x : x + width]
        cut.append(piece.flip(2) if mirror else piece)
    return torch.stack(cut)


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_every_image_is_cropped_and_flipped_on_its_own(padding):
    images = random_images(16).images
    top, left = torch.randint(2 * padding + 1, (2, 16))
    flip = torch.arange(16) % 2 == 0
    got = crop_and_flip(images, top, left, flip, padding)
    assert torch.equal(got, slow_crop_and_flip(images, top, left, flip, padding))
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_a_crop_by_hand():
    image = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8)
    none = torch.tensor([0])
    assert crop_and_flip(image, none, none, torch.tensor([False]), 1).flatten().tolist() == [4, 3, 2, 1]
    assert crop_and_flip(image, none + 2, none, torch.tensor([False]), 1).flatten().tolist() == [4, 3, 2, 1]
    assert crop_and_flip(image, none + 1, none, torch.tensor([False]), 1).flatten().tolist() == [2, 1, 4, 3]
    assert crop_and_flip(image, none + 1, none + 1, torch.tensor([True]), 1).flatten().tolist() == [2, 1, 4, 3]


def test_channel_statistics_by_hand_and_against_the_definition():
    images = torch.tensor([[0, 255], [255, 255]], dtype=torch.uint8).view(2, 2, 1, 1)  # channels 0: 0 255, 1: 255 255
    assert channel_statistics(images) == ((0.5, 1.0), (0.5, 1 / 255))
    images = random_images(50).images
    mean, std = channel_statistics(images)
    scaled = images.double() / 255
    torch.testing.assert_close(torch.tensor(mean).double(), scaled.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(std).double(), scaled.std((0, 2, 3), correction=0))


def test_inputs_are_normalised_by_the_statistics_of_the_split_or_by_those_given():
    split = random_images()
    (inputs,) = split.read([torch.arange(12)])
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(3))
    given = Images(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1), torch.tensor([0, 1]), (0.5,), (0.25,))
    assert [x.flatten().tolist() for x in given.read([torch.tensor([0]), torch.tensor([1, 0])])] == [[-2], [2, -2]]
    assert given.preprocessing == {"mean": [0.5], "std": [0.25], "input_shape": [1, 1, 1]}
    assert given.measured() is given and random_images().measured().mean


def test_augmentation_follows_the_generator_and_each_process_gets_its_rows():
    split = random_images(crop_padding=2, flip=True).measured()
    rows = [torch.arange(12), torch.arange(12).flip(0)]

    def read(part=None):
        return list(split.read(rows, part=part, generator=torch.Generator().manual_seed(1)))

    whole, again = read(), read()
    assert all(map(torch.equal, whole, again)) and not torch.equal(whole[0], whole[1].flip(0))
    for number in range(2):
        mine = read(lambda r, number=number: r.tensor_split(2)[number])
        assert all(torch.equal(x.tensor_split(2)[number], y) for x, y in zip(whole, mine, strict=True))
    plain = random_images().measured()
    assert torch.equal(next(plain.read(rows, generator=torch.Generator())), next(plain.read(rows)))


def test_every_image_is_mirrored_every_other_epoch_and_half_of_them_in_the_first():
    split = random_images(200, flip=True).measured()
    (plain,) = split.read([torch.arange(200)])

    def mirrored(epoch):
        (inputs,) = split.read([torch.arange(200)], generator=torch.Generator(), epoch=epoch)
        same, other = ((inputs == given).flatten(1).all(1) for given in (plain, plain.flip(3)))
        assert (same ^ other).all()
        return other

    assert 70 < mirrored(1).sum() < 130 and torch.equal(mirrored(1), ~mirrored(2))
    assert torch.equal(mirrored(1), mirrored(3)) and torch.equal(mirrored(2), mirrored(4))


def test_splits_are_taken_joined_and_prepared_as_others():
    split = random_images()
    assert torch.equal(split.take(torch.tensor([5, 2])).images, split.images[[5, 2]])
    assert torch.equal(split.take(split.labels == 1).images, split.images[1::3]) and repr(split) == "12 images of 3x5x7"
    both = split.join(split.take(torch.arange(2)))
    assert len(both) == 14 and torch.equal(both.labels[-2:], torch.tensor([0, 1]))
    about = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0], "input_shape": [3, 5, 7]}
    assert split.like(about).preprocessing == about and split.like({}) is split
    assert split.relabelled(torch.zeros(12).long()).labels.sum() == 0
    with pytest.raises(TorchsliceError, match="the network takes images of 3x8x8, and these are 3x5x7"):
        split.like({**about, "input_shape": [3, 8, 8]})
    with pytest.raises(TorchsliceError, match="images of 1x2x2 cannot be joined with images of 3x5x7"):
        split.join(Images(ZEROS, torch.zeros(3).long()))


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (ZEROS.float(), {}, "images must be uint8 [n, channels, height, width], got torch.float32"),
        (ZEROS[0], {}, "images must be uint8 [n, channels, height, width], got torch.uint8 [1, 2, 2]"),
        (ZEROS[:, :0], {}, "got torch.uint8 [3, 0, 2, 2]"),
        (ZEROS[:2], {}, "2 samples need labels that are whole numbers [2]; got torch.int64 [3]"),
        (ZEROS, {"mean": (0.5, 0.5), "std": (1.0, 1.0)}, "images of 1 channel(s) need so many means and deviations"),
        (ZEROS, {"mean": (0.5,), "std": (0.0,)}, "deviations above 0; got [0.5] and [0.0]"),
        (ZEROS, {"mean": (0.5,)}, "got [0.5] and []"),
        (ZEROS, {"crop_padding": 2}, "crop_padding must be at least 0 and smaller than the images, 2x2; got 2"),
        (ZEROS, {"mean": (float("nan"),), "std": (1.0,)}, "got [nan] and [1.0]"),
        (ZEROS, {"mean": (0.5,), "std": (float("inf"),)}, "got [0.5] and [inf]"),
    ],
)
def test_images_of_the_wrong_form_are_refused(images, options, message):
    with pytest.raises(TorchsliceError) as caught:
        Images(images, torch.zeros(3).long(), **options)
    assert message in str(caught.value)
