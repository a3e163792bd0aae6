"""Contributions: against per-sample loops on networks that are hard to read, and what plays no part."""

from __future__ import annotations

import gc
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torchslice as ts
from tests.find.semantic.nets import NETS, inputs_of, make
from tests.nets import assert_equal, state, tiny_net, tiny_task
from torchslice import TorchsliceError
from torchslice.data import Images, Stored
from torchslice.data.splits import rank_in_class
from torchslice.find.semantic import METRICS, Metric
from torchslice.find.semantic.contributions import mean_input
from torchslice.find.semantic.metrics import ensemble, min_max, variance

PLAIN = ["avg", "var", "ens", "taylor"]
CPU = torch.device("cpu")


def contributions(neurons, task, **options):
    return ts.semantic.contributions(neurons, task, progress=False, **options)


def slow_scores(net, task, chosen):
    """The definitions as written, sample after sample -> {metric: {layer: [C][N]}}."""
    per_class = [[] for _ in task.classes]  # of each sample: {layer: [(s, taylor) of each neuron]}
    for index in chosen.tolist():
        label = task.train.labels[index]
        logits, activations = net.requires_grad_().literal(inputs_of(task, torch.tensor([index])))
        loss = F.cross_entropy(logits, label[None])
        rows = {}
        for layer, uses in activations.items():
            gradients = torch.autograd.grad(loss, uses, retain_graph=True)
            rows[layer] = []
            tokens = uses[0].dim() == 3
            for n in range(uses[0].shape[-1 if tokens else 1]):
                a, g = (
                    torch.cat([(t[0, :, n] if tokens else t[0, n]).flatten() for t in tensors]).double()
                    for tensors in (uses, gradients)
                )
                rows[layer].append((a.sum().item() / len(a), abs((a * g).sum().item() / len(a))))
        per_class[label].append(rows)
    found = {metric: {} for metric in PLAIN}
    for layer in per_class[0][0]:
        for metric in PLAIN:
            found[metric][layer] = []
        for rows in per_class:
            samples = [row[layer] for row in rows]
            k, neurons = len(samples), range(len(samples[0]))
            avg = [sum(abs(sample[n][0]) for sample in samples) / k for n in neurons]
            mean = [sum(sample[n][0] for sample in samples) / k for n in neurons]
            var = [sum((sample[n][0] - mean[n]) ** 2 for sample in samples) / k for n in neurons]
            scaled = [[(v - min(values)) / (max(values) - min(values)) for v in values] for values in (avg, var)]
            found["avg"][layer].append(avg)
            found["var"][layer].append(var)
            found["ens"][layer].append([(a + v) / 2 for a, v in zip(*scaled, strict=True)])
            found["taylor"][layer].append([sum(sample[n][1] for sample in samples) / k for n in neurons])
    return found


@pytest.mark.parametrize("name", NETS)
def test_scores_are_those_of_loops_over_the_samples(name):
    net, neurons, task = make(name)
    expected = net.literal(inputs_of(task))[0]
    torch.testing.assert_close(neurons.logits(inputs_of(task)), expected)  # the twin is one
    found = contributions(neurons, task, metric=PLAIN, batch_size=8)
    correct = expected.argmax(1) == task.train.labels
    assert torch.equal(found.samples.sort().values, correct.nonzero().flatten()) and 3 < correct.sum() < len(correct)
    for metric, layers in slow_scores(net, task, found.samples).items():
        assert found[metric].keys() == layers.keys()
        for layer, scores in layers.items():
            torch.testing.assert_close(found[metric][layer], torch.tensor(scores).double(), rtol=1e-4, atol=1e-6)
            assert found[metric][layer].std() > 0


@pytest.mark.parametrize("name", NETS)
def test_batch_size_and_order_play_no_part(name):
    _, neurons, task = make(name)
    metrics = PLAIN if name in ("vit", "words") else [*PLAIN, "deeplift"]
    expected = contributions(neurons, task, metric=metrics)
    mixed = replace(task, train=task.train.take(torch.randperm(len(task.train))))
    for other, batch_size in ((task, 1), (mixed, 7), (mixed, 36)):
        found = contributions(neurons, other, metric=metrics, batch_size=batch_size)
        assert torch.equal(found.counts, expected.counts)
        for metric in metrics:
            for layer, scores in expected[metric].items():
                torch.testing.assert_close(found[metric][layer], scores, rtol=1e-5, atol=1e-6 * scores.max())


def pixels(values, labels):
    """A task of images of one pixel whose normalised value is the pixel itself."""
    split = Images(torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1), torch.tensor(labels), (0.0,), (1 / 255,))
    return ts.data.task(split, split, split, classes=["one", "two"])


def pixel_neurons():
    """Three neurons relu(x), relu(2 - x), relu(x / 2 + 1); logits (ln 2 times the first, 0)."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0], [-1.0], [0.5]]))
        net[1].bias.copy_(torch.tensor([0.0, 2.0, 1.0]))
        net[3].weight.copy_(torch.tensor([[math.log(2), 0.0, 0.0], [0.0, 0.0, 0.0]]))
        net[3].bias.zero_()
    return ts.find_neurons(net, torch.ones(2, 1, 1, 1))


def test_all_metrics_by_hand():
    """Class one: x = 1, 3, neurons (1, 1, 1.5) and (3, 0, 2.5), p(one) = 2/3 and 8/9; class two: x = 2 twice."""
    task = pixels([1, 3, 2, 2], [0, 0, 1, 1])
    found = contributions(pixel_neurons(), task, metric=METRICS.names(), correct_only=False)
    ln2 = math.log(2)
    expected = {
        "avg": [[2.0, 0.5, 2.0], [2.0, 0.0, 2.0]],
        "var": [[1.0, 0.25, 0.25], [0.0, 0.0, 0.0]],
        "ens": [[1.0, 0.0, 0.5], [0.5, 0.0, 0.5]],
        "taylor": [[ln2 / 3, 0.0, 0.0], [2 * ln2 * 4 / 5, 0.0, 0.0]],
        "deeplift": [[ln2, 0.0, 0.0], [0.0, 0.0, 0.0]],  # the mean image is 2
    }
    assert found.metrics == list(expected) and found.counts.tolist() == [2, 2]
    for metric, scores in expected.items():
        torch.testing.assert_close(found[metric]["1"], torch.tensor(scores, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_neurons_that_rounding_alone_tells_apart_are_equal():
    noisy = torch.tensor([[3.0, 3.0 + 1e-7, 3.0]], dtype=torch.float64)
    assert min_max(noisy).tolist() == [[0, 0, 0]]
    assert variance(noisy, noisy.square() * (1 + 1e-13)).tolist() == [[0, 0, 0]]
    assert ensemble(noisy, noisy, noisy.square()).tolist() == [[0, 0, 0]]
    assert variance(torch.tensor([[1e3]]), torch.tensor([[1e6 + 1.0]])).item() == 1.0  # small, but no rounding


@pytest.fixture
def register():
    """Forget metrics that a test registers."""
    before = dict(METRICS)
    yield lambda name, *metric: METRICS.register(name)(Metric(*metric))
    METRICS.clear()
    METRICS.update(before)


def peak(activation):
    return activation.amax(-1)


def test_a_metric_of_the_users_own(register):
    def weighted(activation, contribution):
        return (activation * contribution).sum(-1)

    register("peak", (peak,))
    register("gain", (weighted, peak), lambda first, second: first - second)
    task = pixels([1, 3, 2, 2], [0, 0, 1, 1])
    found = contributions(pixel_neurons(), task, metric=["peak", "gain"], correct_only=False)
    assert found["peak"]["1"][0].tolist() == pytest.approx([2.0, 0.5, 2.0])
    assert found["gain"]["1"][0].tolist() == pytest.approx([(3 - 1) * math.log(2) / 2 - 2, -0.5, -2])


def test_a_metric_that_cannot_be(register):
    def odd(loss): ...

    with pytest.raises(TorchsliceError, match=r"term 'odd' of a metric has the parameters \(loss\); they may be act"):
        Metric((odd,))
    with pytest.raises(TorchsliceError, match="not gradient and contribution at once"):
        Metric((lambda gradient, contribution: gradient,))
    register("maps", (lambda activation: activation,))
    register("mean", (peak,), lambda mean: mean.mean(1))
    task = pixels([1, 2], [0, 1])
    with pytest.raises(TorchsliceError, match=r"one value per sample and neuron, \[1, 3\]; it returned \[1, 3, 1\]"):
        contributions(pixel_neurons(), task, metric="maps", correct_only=False, batch_size=1)
    with pytest.raises(TorchsliceError, match=r"'mean' must score layer '1' in finite numbers \[2, 3\]; got \[2\]"):
        contributions(pixel_neurons(), task, metric="mean", correct_only=False)
    with pytest.raises(TorchsliceError, match=r"unknown metric 'taylr'. Did you mean 'taylor'\? Known: avg, var, ens"):
        contributions(pixel_neurons(), task, metric="taylr")


def test_metrics_share_one_pass_over_the_samples():
    net, neurons, task = make("conv")
    seen = Counter()
    handle = net.register_forward_pre_hook(lambda module, inputs: seen.update([len(inputs[0])]))
    together = contributions(neurons, task, metric=[*PLAIN, "avg"], correct_only=False, batch_size=10)
    handle.remove()
    assert seen == {10: 3, 6: 1, 2: 1} and together.metrics == PLAIN  # the example, by which activations are found
    for metric in PLAIN:
        alone = contributions(neurons, task, metric=metric, correct_only=False, batch_size=10)
        for layer, scores in together[metric].items():
            torch.testing.assert_close(alone[metric][layer], scores, rtol=1e-5, atol=1e-8)


def test_the_samples_are_the_first_correct_ones_in_the_order_of_the_seed():
    net, neurons, task = make("conv")
    labels, drawn = task.train.labels, []
    correct = net(inputs_of(task)).argmax(1) == labels
    for seed in (0, 1):
        order = rank_in_class(labels, seed).argsort(stable=True)
        wanted = [i for c in range(3) for i in [i for i in order.tolist() if labels[i] == c and correct[i]][:2]]
        for batch_size in (1, 4, 30):
            found = contributions(neurons, task, samples_per_class=2, seed=seed, batch_size=batch_size)
            assert sorted(found.samples.tolist()) == sorted(wanted)
        drawn.append(sorted(wanted))
        assert found.counts.tolist() == [2, 2, 2]
    assert drawn[0] != drawn[1]


def test_if_no_sample_of_a_class_is_correct_misclassified_ones_are_used():
    net, neurons, task = make("conv")
    with torch.no_grad():
        net.head.bias[1] = -1e6
    found = contributions(neurons, task, samples_per_class=5, batch_size=4)
    every = contributions(neurons, task, samples_per_class=5, correct_only=False)
    b = task.train.labels == 1
    assert found.samples[b[found.samples]].sort().values.equal(every.samples[b[every.samples]].sort().values)
    assert found["taylor"]["a"][1].tolist() == pytest.approx(every["taylor"]["a"][1].tolist())
    wrong = net(inputs_of(task, found.samples)).argmax(1) != task.train.labels[found.samples]
    assert wrong.equal(b[found.samples])


def test_the_model_is_left_as_it_was_and_only_the_training_split_is_read():
    net, neurons, task = make("conv")
    expected = contributions(neurons, task)
    net.train()
    net.b.weight.requires_grad_(False)
    for other in ("validation", "test"):
        object.__setattr__(task, other, None)
    before = state(net)
    found = contributions(neurons, task, metric=[*PLAIN, "deeplift"])
    assert torch.equal(found["taylor"]["a"], expected["taylor"]["a"])
    assert_equal(before, state(net))
    with torch.no_grad():
        net.head.weight.fill_(float("nan"))
    with pytest.raises(TorchsliceError, match="NaN or infinite values in its logits"):
        contributions(neurons, task)
    assert all(module.training for module in net.modules())
    assert not net.b.weight.requires_grad and net.a.weight.requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_dead_and_constant_neurons_have_their_values():
    net, task = tiny_net(norm=False), tiny_task(30)
    with torch.no_grad():
        net[0].weight[1], net[0].bias[1] = 0, -1  # dead
        net[0].weight[2], net[0].bias[2] = 0, 0.7  # constant
        net[5].weight.zero_()  # the last layer is constant throughout
        net[5].bias.fill_(1 / 3)
    neurons = ts.find_neurons(net, task.example)
    found = contributions(neurons, task, metric=[*PLAIN, "deeplift"], correct_only=False, batch_size=7)
    for metric in found.metrics:
        assert (found[metric]["0"][:, 1] == 0).all()
    assert (found["avg"]["0"][:, 2] - 0.7).abs().max() < 1e-6
    for metric in ("var", "deeplift"):
        assert (found[metric]["0"][:, 2] == 0).all() and (found[metric]["5"] == 0).all()
    assert (found["ens"]["5"] == 0).all() and (found["taylor"]["2"] == 0).all()
    text = str(found)
    assert text.startswith("Contributions to 3 classes, from 10 to 10 samples per class")
    assert "\n0            4       1 " in text and "\n2            6       0 " in text


def test_the_mean_input_is_that_of_all_training_samples():
    task = tiny_task(30)
    expected = task.train.images.double().mean(0, keepdim=True)
    assert torch.equal(mean_input(task, CPU), task.train.normalise(expected))
    torch.testing.assert_close(mean_input(task, CPU), inputs_of(task).mean(0, keepdim=True))
    tree = {"a": (torch.randn(600, 3), torch.randn(600, 2, 2, dtype=torch.float64))}
    mean = mean_input(replace(task, train=Stored(tree, torch.arange(600) % 3)), CPU)
    for found, tensor in zip(mean["a"], tree["a"], strict=True):
        torch.testing.assert_close(found, tensor.mean(0, keepdim=True))


def test_scores_can_be_stored_and_are_asked_for_by_metric():
    found = contributions(*make("reused")[1:], metric=["avg", "taylor"], samples_per_class=3)
    plain = found.to_plain()
    assert plain["counts"] == [3, 3, 3] and plain["classes"] == ["a", "b", "c"]
    assert plain["scores"]["avg"]["inner"] == found["avg"]["inner"].tolist()
    with pytest.raises(TorchsliceError, match="contributions are by avg, taylor and there is no 'var': name one"):
        found["var"]
    with pytest.raises(TorchsliceError, match="by avg, taylor and none is named"):
        found.the_metric(None)


def test_nothing_is_kept_per_sample(register):
    _, neurons, task = make("conv")
    alive = []  # bytes of all tensors there are, whenever layer b of a batch is read

    def measured(activation):
        if activation.shape[1] == 5:
            gc.collect()
            tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
            alive.append(sum(t.numel() * t.element_size() for t in tensors))
        return activation.mean(-1)

    register("measured", (measured,))
    contributions(neurons, task, metric=["measured", "taylor"], correct_only=False, batch_size=8)
    assert len(alive) == 5  # four batches of 8 and one of 4
    assert alive[3] - alive[1] == 2 * 8  # whether the samples of two batches count, uint8


class Hidden(nn.Module):
    """Activations that are NaN and do not reach the logits."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(36, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.nan_to_num(torch.relu(self.b(torch.relu(self.a(x.flatten(1)))))))


@pytest.mark.parametrize("metric", METRICS.names())
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_an_error_even_where_the_logits_are(metric, value):
    task = make("mlp")[2]
    neurons = ts.find_neurons(Hidden(), task.example)
    contributions(neurons, task, metric=metric, correct_only=False)
    with torch.no_grad():
        neurons.model.b.bias[2] = value
    with pytest.raises(TorchsliceError, match=r"of them NaN or infinite|miss the change of a logit by|NaN or inf"):
        contributions(neurons, task, metric=metric, correct_only=False)


class Cut(nn.Module):
    """Features that are computed without gradients."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(36, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        with torch.no_grad():
            x = torch.relu(self.a(x.flatten(1)))
        return self.head(torch.relu(self.b(x)))


def test_bad_input_is_named():
    net, neurons, task = make("conv")
    few = replace(task, train=task.train.take(task.train.labels != 2))
    with pytest.raises(TorchsliceError, match=r"class 'c' of small has no training sample, so"):
        contributions(neurons, few, correct_only=False)
    with pytest.raises(TorchsliceError, match="model answers with 3 classes and small has 2"):
        contributions(neurons, task.restrict(["a", "b"]))
    with pytest.raises(TorchsliceError, match="logit 0 of the network is 'c', and class 0 of small is 'a'"):
        contributions(ts.find_neurons(net, task.example, classes=["c", "b", "a"]), task)
    with pytest.raises(TorchsliceError, match="at least one metric, samples_per_class >= 1 and batch_size >= 1"):
        contributions(neurons, task, metric=[])
    with pytest.raises(TorchsliceError, match=r"got \['taylor'\], 0 and 64"):
        contributions(neurons, task, samples_per_class=0)
    with torch.no_grad():
        net.b.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(TorchsliceError, match="computes NaN or infinite values from layer 'b' on"):
        contributions(neurons, task)
    without = ts.find_neurons(Cut(), task.example)
    with pytest.raises(TorchsliceError, match="layer 'a' has no gradient: the model runs it without one"):
        contributions(without, task, correct_only=False)
    assert contributions(without, task, metric="avg", correct_only=False)["avg"]["a"].min() >= 0
