"""Cutting by hand: rows, columns, counts, classes; and what is refused."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tests.battery.zoo import Reused
from tests.graph.nets import IMAGE, Net
from tests.nets import Tiny, lively
from torchslice.cut.extract import check_close, eval_logits, extract, held_view, masked, retention
from torchslice.errors import TorchsliceError
from torchslice.graph.find import find_neurons
from torchslice.graph.plan import cut_tensors, plan, resize, zero_out
from torchslice.graph.views import view_of
from torchslice.slices import Slice
from torchslice.training import cost

IMAGES = torch.linspace(-1, 1, 2 * 8 * 8).reshape(2, 1, 8, 8)
SLICE = Slice({"conv1": torch.arange(8) < 5, "conv2": torch.arange(6) % 2 == 0})


@pytest.fixture
def neurons():
    return find_neurons(lively(Tiny()), IMAGES, classes=["red", "green", "blue"])


def test_rows_and_columns_by_hand(neurons) -> None:
    small, model = extract(neurons, SLICE, classes=["blue", "red"]), neurons.model
    assert torch.equal(small.conv1.weight, model.conv1.weight[:5])
    assert torch.equal(small.conv2.weight, model.conv2.weight[::2, :5])
    assert torch.equal(small.norm2.running_var, model.norm2.running_var[::2])
    assert torch.equal(small.head.weight, model.head.weight[[0, 2]][:, ::2])  # in the model's order
    assert torch.equal(small.head.bias, model.head.bias[[0, 2]])


def test_retention_by_hand(neurons) -> None:
    # 5 of 8 neurons: 5 x (9 + 1 + 2); 3 of 6: 3 x (45 + 1 + 2); head: 3 x 3 + 3. MACs: 64 x 5 x 9 + 64 x 3 x 45 + 9
    kept = retention(neurons, SLICE)
    assert kept.neuron == 8 / 14
    assert kept.param == kept.built_param == pytest.approx((60 + 144 + 12) / 567)
    assert kept.mac == kept.built_mac == pytest.approx((64 * 45 + 64 * 135 + 9) / (64 * 72 + 64 * 432 + 18))
    two = retention(neurons, SLICE, classes=[0, 2])
    assert two.param == pytest.approx((60 + 144 + 8) / 567)
    assert str(kept) == (
        "slice keeps 57.1% of the neurons, 38.1% of the parameters, 35.7% of the MACs; the network built from it has "
        "38.1% of the parameters, 35.7% of the MACs"
    )


def test_a_residual_stream_keeps_the_union_and_zero_rows() -> None:
    neurons = find_neurons(Reused().eval(), IMAGE)
    masks = neurons.full().masks
    masks["stem"][6:], masks["back"][:3] = False, False
    masks["back"][9:] = False
    small = extract(neurons, Slice(masks))
    assert small.stem.out_channels == small.back.out_channels == 9  # 0..5 of the stem, 3..8 of the block
    assert not small.stem.weight[6:].any() and not small.back.weight[:3].any() and small.back.weight[3:].any()
    kept = retention(neurons, Slice(masks))
    assert kept.param < kept.built_param < 1 and kept.mac < kept.built_mac < 1


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        (["red"], r"a classifier needs at least two classes, got \['red'\]. Add a class to tell it from"),
        ([0, 0], "classes must be different"),
        ([0, 9], r"0\.\.2; got \[0, 9\]"),
        (["red", "gren"], "unknown class 'gren'. Did you mean 'green'"),
        ([], "classes must be different"),
    ],
)
def test_bad_classes(neurons, classes, text: str) -> None:
    for verb in (extract, retention):
        with pytest.raises(TorchsliceError, match=text):
            verb(neurons, SLICE, classes=classes)


def test_logits_that_do_not_come_from_a_layer_cannot_be_cut() -> None:
    neurons = find_neurons(nn.Sequential(Net(), nn.LogSoftmax(1)), IMAGE)
    assert neurons.head == ()
    assert extract(neurons, neurons.random(0.5))(IMAGE).shape == (2, 4)
    with pytest.raises(TorchsliceError, match="the logits do not come straight from a layer"):
        extract(neurons, neurons.full(), classes=[0, 1])


def test_logits_that_are_not_finite_are_not_called_equal() -> None:
    neurons = find_neurons(Net(), IMAGE)
    nn.init.constant_(neurons.model.head.bias, torch.nan)
    with pytest.raises(TorchsliceError, match="cut network differs from what it must compute by nan"):
        extract(neurons, neurons.random(0.5))


class Written(Net):
    """Its forward knows how many channels there are, though no reshape shows it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if self.a.out_channels == 12 else 2.0)


class Indexed(Net):
    def forward(self, x: Tensor) -> Tensor:
        if self.a.weight.shape[0] != 12:
            raise IndexError("twelve channels are needed")
        return super().forward(x)


class Asserted(Net):
    def forward(self, x: Tensor) -> Tensor:
        assert self.a.weight.shape[0] == 12
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Written, "the cut network differs from"),
        (Indexed, r"cannot run \(twelve channels are needed"),
        (Asserted, "cannot run .*forward depends on a width"),
    ],
)
def test_a_forward_that_depends_on_a_width_is_found_out(kind, text: str) -> None:
    neurons = find_neurons(kind().eval(), IMAGE)
    with pytest.raises(TorchsliceError, match=text):
        extract(neurons, neurons.random(0.5))


def test_a_model_pruned_with_pytorch() -> None:
    model = Net().eval()
    prune.l1_unstructured(model.a, "weight", 0.5)
    neurons = find_neurons(model, IMAGE)
    assert list(neurons.layers) == ["b"]
    small = extract(neurons, neurons.random(0.5))
    assert small.b.out_channels == 3 and small.a.weight_mask.sum() == model.a.weight.numel() / 2
    with torch.no_grad():
        assert torch.allclose(small(IMAGE), masked(neurons, neurons.random(0.5))(IMAGE), atol=1e-6)


def test_hooks_of_the_user_stay_where_they_are() -> None:
    model, seen = Net().eval(), []
    handles = [
        model.a.register_forward_hook(lambda *_: seen.append("after")),
        model.a.register_forward_pre_hook(lambda *_: seen.append("before")),
        model.b.register_full_backward_hook(lambda *_: seen.append("back")),
    ]
    neurons = find_neurons(model, IMAGE)
    small = extract(neurons, neurons.random(0.5))
    seen.clear()
    small(IMAGE).sum().backward()
    assert not seen and len(model.a._forward_hooks) == 1
    model(IMAGE).sum().backward()
    assert seen == ["before", "after", "back"]
    for handle in handles:
        handle.remove()
    handle = model.a.register_forward_hook(lambda module, inputs, output: output * 2)
    neurons = find_neurons(model, IMAGE)
    with pytest.raises(TorchsliceError, match="no hook on it changes them: the cut network has none"):
        extract(neurons, neurons.random(0.5))
    handle.remove()


def test_views_and_masks_and_zeroed_weights_compute_the_same(neurons) -> None:
    held, model = plan(neurons, SLICE).held, neurons.model
    assert {name: flags.tolist() for name, flags in held.items()} == {
        **{name: [False] * 5 + [True] * 3 for name in ("conv1", "norm1")},
        **{name: [False, True] * 3 for name in ("conv2", "norm2")},
    }
    expected = eval_logits(masked(neurons, SLICE), neurons)
    assert torch.equal(eval_logits(held_view(neurons, held), neurons), expected)
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        what, small = plan(neurons, SLICE), view_of(model)
        computed = torch.func.functional_call(resize(small, what), cut_tensors(model, what), (IMAGES,))
        assert torch.allclose(computed, expected, atol=1e-6)
        assert model.conv1.out_channels == 8 > small.conv1.out_channels
    zero_out(model, plan(neurons, SLICE))
    assert torch.allclose(eval_logits(model, neurons), expected, atol=1e-6)
    assert not model.conv1.weight[5:].any() and torch.equal(model.norm1.running_var[5:], torch.ones(3))


def test_a_mask_follows_the_weights_of_the_model(neurons) -> None:
    network = masked(neurons, SLICE)
    before = eval_logits(network, neurons)
    with torch.no_grad():
        neurons.model.head.bias.add_(1)
    assert torch.allclose(eval_logits(network, neurons), before + 1)
    assert next(network.parameters()) is next(neurons.model.parameters())


def test_new_logits_are_not_looked_at(neurons) -> None:
    fewer = extract(neurons, neurons.full(), classes=[0, 1])
    check_close(neurons.model, neurons, fewer, "wider", new_logits=1)
    with pytest.raises(TorchsliceError, match="the wider network differs from what it must compute by nan"):
        check_close(neurons.model, neurons, fewer, "wider")


class Video(nn.Module):
    """A network that looks at every frame by itself, then along time; frames lie on the first axis meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.frames, self.time, self.head = nn.Conv2d(3, 16, 3), nn.Conv1d(16, 64, 3, padding=1), nn.Linear(64, 5)

    def forward(self, films: Tensor) -> Tensor:
        shots = self.frames(films.flatten(0, 1)).relu().mean((2, 3))
        return self.head(self.time(shots.view(*films.shape[:2], -1).transpose(1, 2)).relu().mean(-1))


def test_macs_count_what_lies_on_the_first_axis() -> None:
    films = torch.randn(2, 7, 3, 10, 10)
    found = find_neurons(Video().eval(), films)
    slice_ = Slice({name: torch.arange(n) % 2 == 0 for name, n in found.full().layers.items()})
    whole, small = (cost(model, films).macs for model in (found.model, extract(found, slice_)))
    assert retention(found, slice_).built_mac == small / whole


def test_logits_in_another_order_are_no_head() -> None:
    class Turned(nn.Sequential):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images)[:, [2, 0, 1]]

    found = find_neurons(Turned(Tiny()).eval(), IMAGES)
    with pytest.raises(TorchsliceError, match="do not come straight from a layer"):
        extract(found, found.full(), classes=[0, 1])


class Insisting(nn.Module):
    """A network that answers in bfloat16 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Tiny().bfloat16()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.bfloat16())


@pytest.mark.parametrize(("make", "found"), [(lambda: Tiny().bfloat16(), True), (Insisting, False)])
def test_networks_of_16_bits_are_compared_in_32_where_their_code_can(make, found: bool) -> None:
    model = make().eval()
    neurons = find_neurons(model, IMAGES.bfloat16())
    other = copy.deepcopy(model)
    with torch.no_grad():
        dict(other.named_modules())["net.head" if isinstance(model, Insisting) else "head"].bias[0] += 0.02
    check_close(model, neurons, view_of(model), "cut")
    with pytest.raises(TorchsliceError, match="differs") if found else nullcontext():  # 0.02 is rounding of 16 bits
        check_close(other, neurons, model, "cut")
    assert extract(neurons, neurons.random(0.5))(IMAGES.bfloat16()).dtype == torch.bfloat16


class Telling(nn.Module):
    """A network that notes whether products may be computed in TF32."""

    seen: ClassVar[list[bool]] = []

    def __init__(self) -> None:
        super().__init__()
        self.net = Tiny()

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(torch.backends.cudnn.allow_tf32)
        return self.net(images)


def test_networks_are_compared_in_full_precision() -> None:
    neurons = find_neurons(Telling(), IMAGES)
    assert torch.backends.cudnn.allow_tf32  # torch's default
    Telling.seen.clear()
    extract(neurons, neurons.full())
    assert Telling.seen == [False, False]  # of the model and of what was cut
    assert torch.backends.cudnn.allow_tf32
