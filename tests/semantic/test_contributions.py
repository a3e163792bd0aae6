"""Contributions: against per-sample loops on networks that are hard to read, and what plays no part."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace

import pytest
import torch
from tests.semantic.nets import NETS, make
from tests.training.tiny import tiny_data, tiny_net
from torch import nn
from torch.nn import functional as F

from torchslice.data import Split
from torchslice.data.splits import rank_in_class
from torchslice.errors import TorchsliceError
from torchslice.semantic import METRICS, Metric, contributions
from torchslice.semantic.sweep import mean_input

PLAIN = ["avg", "var", "ens", "taylor"]
QUIET = {"device": "cpu", "progress": False}
CLOSE = {"rtol": 1e-5, "atol": 1e-8}


def slow_scores(net, data, chosen):
    """The definitions as written, sample after sample -> {metric: {layer: [C][N]}}."""
    per_class = [[] for _ in data.classes]  # of each sample: {layer: [(s, taylor) of each neuron]}
    for index in chosen.tolist():
        logits, activations = net.literal(data.normalise(data.train.images[index : index + 1]).requires_grad_())
        label = data.train.labels[index]
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
    net, data = make(name)
    x = data.normalise(data.train.images)
    torch.testing.assert_close(net(x), net.literal(x)[0])  # the twin is one
    found = contributions(net, data, metric=PLAIN, batch_size=8, **QUIET)
    right = net(x).argmax(1) == data.train.labels
    assert torch.equal(found.samples.sort().values, right.nonzero().flatten()) and 3 < right.sum() < len(right)
    for metric, layers in slow_scores(net, data, found.samples).items():
        assert found[metric].keys() == layers.keys()
        for layer, scores in layers.items():
            torch.testing.assert_close(found[metric][layer], torch.tensor(scores).double(), rtol=1e-4, atol=1e-6)
            assert found[metric][layer].std() > 0


@pytest.mark.parametrize("name", NETS)
def test_batch_size_and_order_play_no_part(name):
    net, data = make(name)
    metrics = PLAIN if name == "vit" else [*PLAIN, "deeplift"]
    expected = contributions(net, data, metric=metrics, **QUIET)
    mixed = replace(data, train=data.train.take(torch.randperm(len(data.train))))
    for other, batch_size in ((data, 1), (mixed, 7), (mixed, 36)):
        found = contributions(net, other, metric=metrics, batch_size=batch_size, **QUIET)
        assert torch.equal(found.counts, expected.counts)
        for metric in metrics:
            for layer, scores in expected[metric].items():
                torch.testing.assert_close(found[metric][layer], scores, rtol=1e-5, atol=1e-6 * scores.max())


def test_metrics_share_one_pass_over_the_images():
    net, data = make("conv")
    seen = Counter()
    handle = net.register_forward_pre_hook(lambda module, inputs: seen.update([len(inputs[0])]))
    together = contributions(net, data, metric=[*PLAIN, "avg"], correct_only=False, batch_size=10, **QUIET)
    handle.remove()
    assert seen[5] == 6 and seen[3] == 2 and together.metrics == PLAIN  # batches of 10, 10, 10 and 6, in halves
    for metric in PLAIN:
        alone = contributions(net, data, metric=metric, correct_only=False, batch_size=10, **QUIET)
        for layer, scores in together[metric].items():
            torch.testing.assert_close(alone[metric][layer], scores, **CLOSE)


def test_the_images_are_the_first_right_ones_in_the_order_of_the_seed():
    net, data = make("conv")
    x, labels = data.normalise(data.train.images), data.train.labels
    right, drawn = net(x).argmax(1) == labels, []
    for seed in (0, 1):
        order = rank_in_class(labels, seed).argsort(stable=True)
        wanted = [i for c in range(3) for i in [i for i in order.tolist() if labels[i] == c and right[i]][:2]]
        for batch_size in (1, 4, 30):
            found = contributions(net, data, samples_per_class=2, seed=seed, batch_size=batch_size, **QUIET)
            assert sorted(found.samples.tolist()) == sorted(wanted)
        drawn.append(sorted(wanted))
        assert found.counts.tolist() == [2, 2, 2]
    assert drawn[0] != drawn[1]


def test_the_model_is_left_as_it_was():
    net, data = make("conv")
    net.train()
    net.b.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    contributions(net, data, metric=[*PLAIN, "deeplift"], **QUIET)
    with torch.no_grad():
        net.head.weight.fill_(float("nan"))
    with pytest.raises(TorchsliceError, match="NaN"):
        contributions(net, data, **QUIET)
    assert net.training and not net.b.weight.requires_grad and net.a.weight.requires_grad
    assert all(p.grad is None for p in net.parameters())
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]) or name == "head.weight"


def test_dead_and_constant_neurons_have_their_values():
    net, data = tiny_net(norm=False), tiny_data(30)
    with torch.no_grad():
        net[0].weight[1], net[0].bias[1] = 0, -1  # dead
        net[0].weight[2], net[0].bias[2] = 0, 0.7  # constant
        net[5].weight.zero_()  # the last layer is constant throughout
        net[5].bias.fill_(1 / 3)
    found = contributions(net, data, metric=[*PLAIN, "deeplift"], correct_only=False, batch_size=7, **QUIET)
    for metric in found.metrics:
        assert (found[metric]["0"][:, 1] == 0).all()
    assert (found["avg"]["0"][:, 2] - 0.7).abs().max() < 1e-6
    for metric in ("var", "deeplift"):
        assert (found[metric]["0"][:, 2] == 0).all() and (found[metric]["5"] == 0).all()
    assert (found["ens"]["5"] == 0).all() and (found["taylor"]["2"] == 0).all()
    assert "\n0            4       1 " in str(found) and "\n2            6       0 " in str(found)


def test_the_mean_input_is_that_of_all_training_images():
    data = tiny_data(30)
    torch.testing.assert_close(mean_input(data), data.normalise(data.train.images).mean(0, keepdim=True))


def test_what_is_found_prints_and_can_be_stored():
    net, data = make("reused")
    found = contributions(net, data, metric=["avg", "taylor"], samples_per_class=3, **QUIET)
    text = str(found)
    assert text.startswith("Contributions of 13 neurons to 3 classes, from 3 to 3 images per class")
    assert "silent  " in text and "inner" in text and len(text.splitlines()) == 6
    plain = found.to_plain()
    assert plain["counts"] == [3, 3, 3] and plain["classes"] == list(data.classes)
    assert torch.equal(torch.tensor(plain["scores"]["avg"]["inner"]).double(), found["avg"]["inner"].float().double())
    with pytest.raises(TorchsliceError, match="no scores of metric 'var', only of avg, taylor"):
        found["var"]


def test_only_the_training_split_is_run():
    net, data = make("mlp")
    expected = contributions(net, data, **QUIET)
    for other in ("validation", "test"):
        object.__setattr__(data, other, None)
    assert torch.equal(contributions(net, data, **QUIET)["taylor"]["a"], expected["taylor"]["a"])


def test_nothing_is_kept_per_sample():
    net, data = make("conv")
    alive = []  # bytes of all tensors there are, whenever layer b of half a batch is read

    def measured(activation):
        if activation.shape[1] == 5:
            gc.collect()
            tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
            alive.append(sum(t.numel() * t.element_size() for t in tensors))
        return activation.mean(-1)

    METRICS.register("measured")(Metric((measured,), lambda mean: mean))
    try:
        contributions(net, data, metric=["measured", "taylor"], correct_only=False, batch_size=8, **QUIET)
    finally:
        del METRICS._entries["measured"]
    assert len(alive) == 10  # four batches of 8 and one of 4
    for half in (0, 1):
        growth = alive[6 + half] - alive[2 + half]  # over two batches of equal size
        assert growth == 2 * 8 * 8  # the indices of the images, int64


class Hidden(nn.Module):
    """Activations that are NaN and do not reach the scores."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(36, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.nan_to_num(torch.relu(self.b(torch.relu(self.a(x.flatten(1)))))))


@pytest.mark.parametrize("metric", METRICS.names())
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_an_error_even_where_the_scores_are(metric, value):
    net, data = Hidden(), make("mlp")[1]
    contributions(net, data, metric=metric, correct_only=False, **QUIET)
    with torch.no_grad():
        net.b.bias[2] = value
    with pytest.raises(TorchsliceError, match=r"NaN or infinite in layer|miss the change of a logit by"):
        contributions(net, data, metric=metric, correct_only=False, **QUIET)


class Cut(nn.Module):
    """Features that are computed without gradients."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(36, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        with torch.no_grad():
            x = torch.relu(self.a(x.flatten(1)))
        return self.head(torch.relu(self.b(x)))


def test_a_class_that_is_never_answered_rightly_goes_with_wrong_answers():
    net, data = make("conv")
    with torch.no_grad():
        net.head.bias[1] = -1e6
    right = contributions(net, data, samples_per_class=5, batch_size=4, **QUIET)
    every = contributions(net, data, samples_per_class=5, correct_only=False, **QUIET)
    b = data.train.labels == 1
    assert right.samples[b[right.samples]].sort().values.equal(every.samples[b[every.samples]].sort().values)
    assert right["taylor"]["a"][1].tolist() == pytest.approx(every["taylor"]["a"][1].tolist())
    with torch.no_grad():
        wrong = net(data.normalise(data.train.images[right.samples])).argmax(1) != data.train.labels[right.samples]
    assert wrong.equal(b[right.samples])


def test_bad_input_is_named():
    net, data = make("conv")
    few = replace(data, train=data.train.take(data.train.labels != 2))
    with pytest.raises(TorchsliceError, match=r"class 'c' of small has no training image, so"):
        contributions(net, few, correct_only=False, **QUIET)
    with pytest.raises(TorchsliceError, match="model answers with 3 classes and small has 2"):
        contributions(net, data.restrict(["a", "b"]), **QUIET)
    with pytest.raises(TorchsliceError, match=r"there is a label 3, but 3 classes are named; labels must be in 0..2"):
        replace(data, train=Split(data.train.images, data.train.labels + 1))
    with pytest.raises(TorchsliceError, match="at least one metric, samples_per_class >= 1 and batch_size >= 1"):
        contributions(net, data, metric=[], **QUIET)
    with pytest.raises(TorchsliceError, match=r"got \['taylor'\], 0 and 128"):
        contributions(net, data, samples_per_class=0, **QUIET)
    with torch.no_grad():
        net.b.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(TorchsliceError, match="computes NaN or infinite values from layer 'b' on"):
        contributions(net, data, **QUIET)
    with pytest.raises(TorchsliceError, match="layer 'a' has no gradient: the model runs it without one"):
        contributions(Cut(), data, correct_only=False, **QUIET)
    assert contributions(Cut(), data, metric="avg", correct_only=False, **QUIET)["avg"]["a"].min() >= 0
