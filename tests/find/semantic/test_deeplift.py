"""DeepLIFT: by hand, against captum where captum is valid, beyond it, and where the rule does not apply."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from captum.attr import DeepLift, LayerDeepLift
from torch import nn
from torch.nn import functional as F

import torchslice as ts
from tests.battery.zoo import prepared
from tests.find.semantic.nets import inputs_of, make
from tests.nets import tiny_task
from torchslice import TorchsliceError
from torchslice.data import Stored
from torchslice.find.semantic.contributions import detached, observe
from torchslice.find.semantic.deeplift import Rescaling, check_balance, check_rescale, slope
from torchslice.graph.activations import find_activations


def ours(net, images, labels, baseline):
    """Contributions of every layer, {layer: [B, N, P]}."""
    found = []

    def keep(contribution):
        found.append(contribution)
        return contribution.sum(-1)

    neurons = ts.find_neurons(net, images)
    where = find_activations(neurons)
    observe(neurons.on(detached(net)), where, images, labels, [keep], baseline)
    return dict(zip(where.chains, found, strict=True))


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
    net, neurons, task = make("mlp")
    found = ts.semantic.contributions(neurons, task, metric="deeplift", correct_only=False, progress=False)["deeplift"]
    images = inputs_of(task).flatten(1)
    base = images.mean(0)
    expected, counts = {"a": torch.zeros(3, 6), "b": torch.zeros(3, 5)}, task.train.labels.bincount()
    with torch.no_grad():
        for x, label in zip(images, task.train.labels, strict=True):
            a, a0 = torch.tanh(net.a(x)), torch.tanh(net.a(base))
            z, z0 = net.b(a), net.b(a0)
            b, b0 = F.elu(z), F.elu(z0)
            at_b = net.head.weight[label]
            at_a = net.b.weight.T @ (at_b * (b - b0) / (z - z0))
            expected["a"][label] += (at_a * (a - a0)).abs() / counts[label]
            expected["b"][label] += (at_b * (b - b0)).abs() / counts[label]
    for layer, scores in expected.items():
        torch.testing.assert_close(found[layer], scores.double(), rtol=1e-4, atol=1e-6)


def contributions_of_inputs(net, images, labels, baseline):
    """What the inputs contribute, [B, ch, P]; it adds up."""
    both = torch.cat([images, baseline]).requires_grad_()
    with Rescaling(len(both)):
        logits = net(both)
    (m,) = torch.autograd.grad(logits[torch.arange(len(images)), labels].sum(), both)
    check_balance((m * (both - baseline))[:-1], logits[torch.arange(len(images)), labels] - logits[-1, labels])
    return (m * (both - baseline))[:-1].detach().flatten(2)


@pytest.mark.parametrize("act", [nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Sigmoid, nn.Tanh, nn.Softplus])
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
    assert_equal(contributions_of_inputs(net, images, labels, baseline), expected.detach().flatten(2))
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
    both_uses = [captums(twin, act, images, labels, baseline) for act in (twin.one, twin.two)]
    assert_equal(found["inner"], torch.cat(both_uses, 2))


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
    contributions_of_inputs(net, images, labels, baseline)


@pytest.mark.parametrize("name", ["convnet", "simcnn", "rescnn", "mobilenet", "vgg16", "resnet18", "densenet121"])
def test_contributions_add_up_on_real_networks(name):
    neurons = prepared(name)
    labels = torch.zeros(len(neurons.example), dtype=torch.int64)
    check_rescale(neurons)
    found = ours(neurons.model, neurons.example, labels, neurons.example.mean(0, keepdim=True) + 0.1)
    assert all(values.abs().max() > 0 for values in found.values())


class Odd(nn.Module):
    """A network with one function in the middle."""

    def __init__(self, function):
        super().__init__()
        self.function, self.conv, self.head = function, nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)
        self.free = nn.Linear(3, 3)

    def forward(self, x):
        return self.free(torch.relu(self.head(self.function(torch.relu(self.conv(x))).mean((2, 3)))))


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
        check_rescale(ts.find_neurons(nn.Sequential(Odd(REFUSED[reason])), batch()[0]))


def test_transformers_and_integers_are_refused():
    _, neurons, task = make("vit")
    with pytest.raises(TorchsliceError, match="layer_norm in 'vit.blocks.0.norm1' is not a linear function"):
        ts.semantic.contributions(neurons, task, metric=["avg", "deeplift"], progress=False)
    with pytest.raises(TorchsliceError, match=r"inputs\['words'\] is a tensor int64 \[2, 4\], not of floating point"):
        check_rescale(make("words")[1])


ALLOWED = [
    lambda x: torch.cat([x[:, :2] * 2, -x[:, 2:]], 1).clamp(0, 1),
    lambda x: F.prelu(x - 0.1, torch.tensor([0.3])) / 2,
    lambda x: F.pad(x, (1, 1)).sqrt().square().add_(1).log(),
    lambda x: F.dropout(x, 0.5, training=False).view(len(x) * 2, 2, 6, 6).clamp(0.1, 1).view(len(x), 4, 6, 6),
    lambda x: F.interpolate(x, scale_factor=2).exp().float(),
]


@pytest.mark.parametrize("function", ALLOWED)
def test_what_the_rule_covers_adds_up(function):
    net, (images, labels, baseline) = Odd(function), batch()
    check_rescale(ts.find_neurons(net, images))
    contributions_of_inputs(net, images, labels, baseline)


class Joint(nn.Module):
    """Two inputs, of which each has a layer of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(3, 5), nn.Linear(11, 3)

    def forward(self, x, y):
        return self.head(torch.relu(torch.cat([self.a(x), self.b(y)], 1)))


def test_inputs_in_several_tensors_contribute_together():
    net = Joint()
    given, labels = (torch.randn(30, 4), torch.randn(30, 3)), torch.arange(30) % 3
    task = ts.data.task([(given, labels)], classes=["a", "b", "c"])
    neurons = ts.find_neurons(net, task.example)
    found = ts.semantic.contributions(neurons, task, metric="deeplift", correct_only=False, progress=False)
    twin = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), net.head)
    with torch.no_grad():
        twin[0].weight.copy_(torch.block_diag(net.a.weight, net.b.weight))
        twin[0].bias.copy_(torch.cat([net.a.bias, net.b.bias]))
    x, y = inputs_of(task)
    joined = replace(task, train=Stored(torch.cat([x, y], 1), task.train.labels))
    alone = ts.find_neurons(twin, torch.cat([x, y], 1))
    expected = ts.semantic.contributions(alone, joined, metric="deeplift", correct_only=False, progress=False)
    torch.testing.assert_close(torch.cat([*found["deeplift"].values()], 1), expected["deeplift"]["0"])


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x: torch.tanh(x - x.mean(0)) + torch.relu(x + x.flip(0)), "miss the change of a logit by .* mixes sam"),
        (
            lambda x: torch.tanh(x.transpose(0, 1)).transpose(0, 1),
            r"samples on the first axis .*; one is \[4, 25, 6, 6\]",
        ),
    ],
)
def test_samples_that_are_mixed_are_noticed(function, text):
    task = tiny_task()
    neurons = ts.find_neurons(Odd(function), task.example)
    with pytest.raises(TorchsliceError, match=text):
        ts.semantic.contributions(neurons, task, metric="deeplift", correct_only=False, progress=False)
