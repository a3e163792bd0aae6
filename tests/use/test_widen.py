import pytest
import torch
from tests.core.architectures import Reused, make
from torch import Tensor, nn

from torchslice.core.find import find_neurons
from torchslice.errors import TorchsliceError
from torchslice.slices import Slice
from torchslice.use.artefacts import load, save
from torchslice.use.extract import extract
from torchslice.use.widen import widen

from .nets import Tiny, lively, tiny

IMAGES = torch.linspace(-1, 1, 2 * 8 * 8).reshape(2, 1, 8, 8)
PART = Slice({"conv1": torch.arange(8) < 5, "conv2": torch.arange(6) % 2 == 0})


def test_a_slice_is_found_again_and_computes_the_same_bits():
    model = lively(Tiny())
    wide = widen(model, IMAGES, factor=1.3)
    assert wide.fresh.layers == {"conv1": 10, "conv2": 8} and not wide.fixed
    assert wide.fresh["conv1"].tolist() == [False] * 8 + [True] * 2
    lifted = wide.lift(PART)
    assert lifted["conv2"].tolist() == [True, False, True, False, True, False, False, False]
    assert not lifted & wide.fresh and len(lifted) == len(PART)
    one, other = extract(model, PART, IMAGES), extract(wide.model, lifted, IMAGES)
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    assert torch.equal(one(IMAGES), other(IMAGES))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet", "densenet121", "reused", "vit"])
def test_slices_of_coupled_layers_are_found_again(name):
    model, example = make(name)
    part = find_neurons(model, example).random(0.5, seed=1)
    wide = widen(model, example, factor=1.1)
    one, other = extract(model, part, example), extract(wide.model, wide.lift(part), example)
    with torch.no_grad():
        assert torch.equal(one(example), other(example))


def test_named_layers_only():
    wide = widen(lively(Tiny()), IMAGES, counts={"conv2": 4})
    assert wide.fresh.layers == {"conv1": 8, "conv2": 10} and len(wide.fresh) == 4
    coupled = widen(Reused().eval(), torch.randn(2, 3, 8, 8), counts={"back": 2})  # the stem feeds the same stream
    assert coupled.fresh.layers["stem"] == 14 and coupled.fresh["stem"].sum() == 2


def test_a_wider_network_is_saved_and_loaded(tmp_path):
    model = lively(tiny())
    wide = widen(model, IMAGES, factor=2).model
    save(wide, tmp_path / "m", factory="tests.use.nets:tiny")
    assert torch.equal(load(tmp_path / "m", allow_import=True)(IMAGES), wide(IMAGES))


class Written(Tiny):
    """Its forward knows how many channels there are, though no reshape shows it."""

    def forward(self, x: Tensor) -> Tensor:
        scale = 1.0 if self.conv1.out_channels == 8 else 2.0
        return scale * super().forward(x)


def test_wrong_use():
    model = lively(Tiny())
    with pytest.raises(TorchsliceError, match="give either factor=, such as 1.25, or counts="):
        widen(model, IMAGES)
    with pytest.raises(TorchsliceError, match=r"factor must be above 1 \(and below 100\), got 1"):
        widen(model, IMAGES, factor=1)
    with pytest.raises(TorchsliceError, match="unknown layer 'conv3'. Did you mean"):
        widen(model, IMAGES, counts={"conv3": 1})
    with pytest.raises(TorchsliceError, match="layer 'conv1' must get at least 1 neuron, got 0"):
        widen(model, IMAGES, counts={"conv1": 0})
    with pytest.raises(TorchsliceError, match="the widened network differs from the model by"):
        widen(lively(Written()), IMAGES, factor=1.5)


def test_grouped_convolutions_keep_their_width():
    model, example = make("gated")
    wide = widen(model, example, factor=1.5)
    assert set(wide.fixed) == {"a", "b", "grouped"} and set(wide.fresh.layers.values()) == {12, 16, 9}
    with pytest.raises(TorchsliceError, match="layer 'a' cannot be widened: 'grouped' is a grouped convolution"):
        widen(model, example, counts={"a": 1})
    only = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(TorchsliceError, match="no layer of this network can be widened; '0': '1' is a grouped"):
        widen(only, torch.randn(2, 2, 1, 1), factor=2)
