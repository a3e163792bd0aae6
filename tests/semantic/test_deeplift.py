"""DeepLIFT: by hand, against captum where captum is valid, beyond it, and where the rule does not apply."""

from __future__ import annotations

import warnings

import pytest
import torch
from captum.attr import DeepLift, LayerDeepLift
from tests.core.architectures import make as make_architecture
from tests.semantic.nets import make
from tests.training.tiny import tiny_data
from torch import nn
from torch.nn import functional as F

from torchslice.core.taps import find_taps
from torchslice.errors import TorchsliceError
from torchslice.semantic import contributions
from torchslice.semantic.deeplift import Rescaling, check_balance, check_rescale, slope
from torchslice.semantic.readings import frozen, run_rescaled

QUIET = {"device": "cpu", "progress": False}


def ours(net, images, labels, baseline):
    """Contributions of every layer, {layer: [B, N, P]}."""
    found = []

    def keep(contribution):
        found.append(contribution)
        return contribution.sum(-1)

    taps = find_taps(net, images)
    with frozen(net):
        run_rescaled(net, taps, images, labels, [keep], baseline)
    return dict(zip(reversed(taps.axis), found, strict=True))  # the last layer's gradients come first


def captums(net, layer, images, labels, baseline):
    """The contributions of a module's outputs, [B, N, P]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = LayerDeepLift(net, layer).attribute(images, baseline.expand_as(images), target=labels)
    return found.detach().reshape(*found.shape[:2], -1)


def assert_equal(found, expected):
    """Compare to 1e-5 of the largest contribution of each sample; there must be something to compare."""
    scale = expected.abs().amax((1, 2), keepdim=True)
    assert (scale > 0).all()
    assert ((found - expected).abs() / scale).max() < 1e-5


def batch(shape=(1, 6, 6), classes=3):
    return torch.randn(6, *shape), torch.arange(6) % classes, torch.randn(1, *shape)


def test_the_rescale_rule_by_hand():
    """h = relu(x1 - x2, x1 + x2 - 2), y = (h1 + 2 h2, .) at x = (3, 1), baseline (0, 1): h 2, 2 against 0, 0."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
        net[0].bias.copy_(torch.tensor([0.0, -2.0]))
        net[2].weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    both = torch.tensor([[3.0, 1.0], [0.0, 1.0]], requires_grad=True)
    with Rescaling(2):
        logits = net(both)
    (multipliers,) = torch.autograd.grad(logits[0, 0], both)
    # both units move by 3 before and 2 after the function: slope 2/3; m = (1 + 2, -1 + 2) * 2/3
    torch.testing.assert_close(multipliers[0], torch.tensor([2.0, 2 / 3]))
    assert (logits[0, 0] - logits[1, 0]).item() == pytest.approx(2.0 * 3)
    (gradient,) = torch.autograd.grad(net(both)[0, 0], both)
    torch.testing.assert_close(gradient[0], torch.tensor([3.0, 1.0]))  # not the same, and gone with the mode


def test_the_slope_is_the_gradient_where_nothing_moves():
    x = torch.tensor([1.0, 2.0, 1.0])
    assert slope(x, x**2, 2 * x).tolist() == [2.0, 3.0, 2.0]
    assert slope(x * 0, x * 0, x / 0).tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(TorchsliceError, match="miss the change of a logit by nan"):
        check_balance(torch.tensor([[float("nan")]]), torch.tensor([1.0]))


def test_contributions_are_those_of_a_loop_over_the_samples():
    """score = mean of abs(sum of m * (a - a0)), multipliers as products of matrices, one sample at a time."""
    net, data = make("mlp")
    found = contributions(net, data, metric="deeplift", correct_only=False, **QUIET)["deeplift"]
    images = data.normalise(data.train.images).flatten(1)
    base = images.mean(0)
    expected, counts = {"a": torch.zeros(3, 6), "b": torch.zeros(3, 5)}, data.train.labels.bincount()
    with torch.no_grad():
        for x, label in zip(images, data.train.labels, strict=True):
            a, a0 = torch.tanh(net.a(x)), torch.tanh(net.a(base))
            z, z0 = net.b(a), net.b(a0)
            b, b0 = F.elu(z), F.elu(z0)
            at_b = net.head.weight[label]
            at_a = net.b.weight.T @ (at_b * (b - b0) / (z - z0))
            expected["a"][label] += (at_a * (a - a0)).abs() / counts[label]
            expected["b"][label] += (at_b * (b - b0)).abs() / counts[label]
    for layer, scores in expected.items():
        torch.testing.assert_close(found[layer], scores.double(), rtol=1e-4, atol=1e-6)


def inputs_of(net, images, labels, baseline):
    """What the inputs contribute, [B, ch, P]."""
    both = torch.cat([images, baseline]).requires_grad_()
    with Rescaling(len(both)):
        logits = net(both)
    (m,) = torch.autograd.grad(logits[torch.arange(len(images)), labels].sum(), both)
    check_balance((m * (both - baseline))[:-1], logits[torch.arange(len(images)), labels] - logits[-1, labels])
    return (m * (both - baseline))[:-1].detach().flatten(2)


FUNCTIONS = [nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Sigmoid, nn.Tanh, nn.Softplus]


@pytest.mark.parametrize("act", FUNCTIONS)
def test_captum_agrees_where_it_is_valid(act):
    """Not where a pool follows a function at once: captum 0.9.0 then loses what contributions add up to."""
    net = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), act(), nn.BatchNorm2d(4), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 5, 3, padding=1), act(), nn.AvgPool2d(3), nn.Flatten()),
        *(nn.Linear(5, 6), act(), nn.Linear(6, 3)),
    ).double().eval()  # fmt: skip
    images, labels, baseline = (t.double() if t.is_floating_point() else t for t in batch())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = DeepLift(net).attribute(images, baseline.expand_as(images), target=labels)
    assert_equal(inputs_of(net, images, labels, baseline), expected.detach().flatten(2))
    if act not in (nn.Sigmoid, nn.Softplus):  # neurons before those cannot be sliced
        found = ours(net, images, labels, baseline)
        for layer, read_after in {"0": 1, "4": 5, "8": 9}.items():
            assert_equal(found[layer], captums(net, net[read_after], images, labels, baseline))


class Unrolled(nn.Module):
    """`Reused` of nets.py as captum needs it: every activation a module of its own, nothing in place."""

    def __init__(self, net):
        super().__init__()
        self.net, self.stem, self.one, self.two = net, nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, x):
        x = self.stem(self.net.stem(x))
        for act in (self.one, self.two):
            x = F.avg_pool2d(x + self.net.back(act(self.net.inner(x))), 2)
        return self.net.head(x.mean((2, 3)))


def test_where_captum_fails_we_are_what_it_says_of_the_unrolled_network():
    net = make("reused")[0]
    twin = Unrolled(net).eval()
    images, labels, baseline = batch()
    found = ours(net, images, labels, baseline)
    with pytest.raises(RuntimeError, match="used more than once"):
        captums(net, net.stem, images, labels, baseline)
    assert_equal(found["stem"], captums(twin, twin.stem, images, labels, baseline))
    both_uses = torch.cat([captums(twin, twin.one, images, labels, baseline),
                           captums(twin, twin.two, images, labels, baseline)], 2)  # fmt: skip
    assert_equal(found["inner"], both_uses)


def test_functional_activations_are_rescaled_where_captum_takes_the_gradient():
    net = make("conv")[0]
    images, labels, baseline = batch()
    modular = nn.Sequential(
        *(net.a, net.norm, nn.ReLU(), nn.MaxPool2d(2), net.b, nn.LeakyReLU(0.2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.head),
    ).eval()
    found = ours(net, images, labels, baseline)
    assert_equal(found["a"], captums(modular, modular[2], images, labels, baseline))
    assert_equal(found["b"], captums(modular, modular[5], images, labels, baseline))
    with pytest.raises(AssertionError):
        assert_equal(found["a"], captums(net, net.norm, images, labels, baseline))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.AdaptiveMaxPool2d(4), nn.MaxPool2d(2, 1, dilation=2)])
def test_overlapping_windows_each_give_their_part(pool):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), pool, nn.Flatten(), nn.LazyLinear(5), nn.GELU(), nn.Linear(5, 3))
    images, labels, baseline = batch((1, 11, 11))
    net(images)
    inputs_of(net, images, labels, baseline)  # what the inputs contribute adds up


@pytest.mark.parametrize("name", ["convnet", "simcnn", "rescnn", "mobilenet", "vgg16_bn", "resnet18", "densenet121"])
def test_contributions_add_up_on_real_networks(name):
    net, example = make_architecture(name)
    labels = torch.zeros(len(example), dtype=torch.int64)
    check_rescale(net, example)
    found = ours(net, example, labels, example.mean(0, keepdim=True) + 0.1)
    assert all(values.abs().max() > 0 for values in found.values())


class Odd(nn.Module):
    """A network with one function in the middle."""

    def __init__(self, function):
        super().__init__()
        self.function, self.conv, self.head = function, nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.function(torch.relu(self.conv(x))).mean((2, 3)))


REFUSED = {
    "mul multiplies activations with each other": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "matmul multiplies activations with each other": lambda x: x @ x.transpose(2, 3),
    "softmax is not a linear function, nor one of single": lambda x: x.softmax(1),
    "layer_norm is not": lambda x: F.layer_norm(x, x.shape[1:]),
    "group_norm is not": lambda x: F.group_norm(x, 2),
    "sort is not": lambda x: x.sort(1).values,
    "maximum is not": lambda x: torch.maximum(x, x.flip(1)),
    "detach is not": lambda x: x + x.detach(),
    "div joins activations": lambda x: x / (1 + x),
    "pow joins activations": lambda x: x**x,
    "dropout works as in training": lambda x: F.dropout(x, 0.1),
    "instance_norm works as in training": lambda x: F.instance_norm(x),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_rule_does_not_cover_is_refused(reason):
    name, _, why = reason.partition(" ")
    wanted = f"rescale rule does not apply to this model: {name} in '0' {why}.*avg, var, ens or taylor"
    with pytest.raises(TorchsliceError, match=wanted):
        check_rescale(nn.Sequential(Odd(REFUSED[reason])), batch()[0])


def test_a_transformer_is_refused():
    net, data = make("vit")
    with pytest.raises(TorchsliceError, match="layer_norm in 'vit.blocks.0.norm1' is not a linear function"):
        contributions(net, data, metric=["avg", "deeplift"], **QUIET)


ALLOWED = [
    lambda x: torch.cat([x[:, :2] * 2, -x[:, 2:]], 1).clamp(0, 1),
    lambda x: F.prelu(x - 0.1, torch.tensor([0.3])) / 2,
    lambda x: F.pad(x, (1, 1)).sqrt().square().add_(1).log(),
    lambda x: F.dropout(x, 0.5, training=False).view(len(x) * 2, 2, 6, 6).clamp(0.1, 1).view(len(x), 4, 6, 6),
    lambda x: F.interpolate(x, scale_factor=2).exp().float(),
]


@pytest.mark.parametrize("function", ALLOWED)
def test_what_the_rule_covers_adds_up(function):
    net = Odd(function)
    images, labels, baseline = batch()
    check_rescale(net, images)
    inputs_of(net, images, labels, baseline)


def test_samples_that_are_mixed_are_noticed():
    net = Odd(lambda x: torch.tanh(x - x.mean(0)) + torch.relu(x + x.flip(0)))
    with pytest.raises(TorchsliceError, match="miss the change of a logit by .* mixes samples"):
        contributions(net, tiny_data(), metric="deeplift", correct_only=False, **QUIET)
    net = Odd(lambda x: torch.tanh(x.transpose(0, 1)).transpose(0, 1))
    with pytest.raises(TorchsliceError, match=r"samples on the first axis of every activation; one is \[4, 13, 6, 6\]"):
        contributions(net, tiny_data(), metric="deeplift", correct_only=False, **QUIET)
