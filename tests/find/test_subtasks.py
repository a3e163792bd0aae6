"""Sub-task training: what is trained is what is cut, nothing else moves, and it works end to end."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.battery.zoo import NETWORKS, make
from torchslice.cut.extract import held_view
from torchslice.data import load
from torchslice.errors import TorchsliceError
from torchslice.find.semantic import contributions
from torchslice.find.subtasks import SubTask, SubTasks, objective, rank
from torchslice.graph.find import find_neurons
from torchslice.graph.plan import plan
from torchslice.inputs import join, map_tensors, run
from torchslice.models import create
from torchslice.rankings import by_best_rank, by_score, by_turns, widths
from torchslice.training import Training, fit

CLASSES, ALL = (1, 4, 7), tuple(range(10))
RANDOM = ("efficientnet_b0", "convnext_tiny")  # they leave out whole blocks at random while training


def random_rankings(neurons):
    generator = torch.Generator().manual_seed(0)
    layers = {name: layer.count for name, layer in neurons.layers.items()}
    return {
        str(label): by_score({name: torch.rand(count, generator=generator) for name, count in layers.items()})
        for label in range(neurons.num_classes)
    }


def part_of(sub_tasks, classes, share):
    """The slice of some classes at a share of the network."""
    ranking = by_best_rank(sub_tasks.rankings[label] for label in classes)
    return sub_tasks.neurons.closed(ranking.prefix(widths(ranking.layers, share)))


@pytest.mark.parametrize(("classes", "share"), [(CLASSES, 0.3), (CLASSES, 1.0), (ALL, 0.5)])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in RANDOM])
def test_logits_and_gradients_are_those_of_the_network_held_to_the_slice(name, classes, share):
    model, example = make(name, torch.float64)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    neurons, reference = find_neurons(model, example), copy.deepcopy(model).train()
    torch.manual_seed(1)  # samples differ, or norms of a few equal values magnify rounding
    inputs = map_tensors(lambda t: t + torch.randn_like(t) if t.is_floating_point() else t, join([example] * 3))
    sub_tasks = objective(neurons, random_rankings(neurons), round_to=1)
    before = {where: buffer.clone() for where, buffer in model.train().named_buffers()}
    expected = run(held_view(neurons.on(reference), plan(neurons, part_of(sub_tasks, classes, share)).held), inputs)
    expected = expected[:, list(classes)]
    actual = sub_tasks.logits(model, inputs, classes, share)
    assert (actual - expected).abs().max() <= 1e-9 * expected.abs().max()
    for logits in (actual, expected):
        F.cross_entropy(logits, torch.arange(len(logits)) % 3).backward()
    largest = max(p.grad.abs().max() for p in reference.parameters() if p.grad is not None)
    for (where, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        mine, theirs = (torch.zeros_like(x) if x.grad is None else x.grad for x in (p, q))
        assert (mine - theirs).abs().max() <= 1e-6 * largest, where
    assert all(torch.equal(buffer, before[where]) for where, buffer in model.named_buffers())


@pytest.fixture
def small():
    model, example = make("convnet")
    neurons = find_neurons(model, example)
    sub_tasks = objective(neurons, random_rankings(neurons), round_to=1)
    return model.train(), sub_tasks, torch.cat([example] * 10), neurons


def test_a_step_scores_its_classes_alone(small):
    model, sub_tasks, images, _ = small
    loss, correct, parts = SubTask(sub_tasks, CLASSES, 0.5)(model, images, torch.tensor([7, 1, 4, 4] * 5))
    logits, own = sub_tasks.logits(model, images, CLASSES, 0.5), torch.tensor([2, 0, 1, 1] * 5)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, own, label_smoothing=0.1).item())
    assert torch.equal(correct, logits.argmax(1) == own) and parts == {}


def test_a_step_of_the_whole_is_a_standard_one_and_the_only_one_that_changes_statistics(small):
    model, sub_tasks, images, _ = small
    labels, reference = torch.arange(20) % 10, copy.deepcopy(model)
    statistics = [buffer.clone() for buffer in model.buffers()]
    SubTask(sub_tasks, (2, 5), 1.0)(model, images, 2 + 3 * (labels % 2))
    SubTask(sub_tasks, ALL, 0.5)(model, images, labels)
    assert all(a.equal(b) for a, b in zip(statistics, model.buffers(), strict=True))
    loss, _, _ = SubTask(sub_tasks, ALL)(model, images, labels)
    assert loss.equal(F.cross_entropy(reference(images), labels, label_smoothing=0.1))
    assert all(a.equal(b) for a, b in zip(reference.buffers(), model.buffers(), strict=True))


def test_what_is_drawn():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 10))
    neurons = find_neurons(model, torch.randn(2, 4))
    sub_tasks = objective(neurons, random_rankings(neurons), whole=0.25, least=0.5)
    generator = torch.Generator().manual_seed(0)
    drawn = [sub_tasks.draw(generator) for _ in range(2000)]
    whole = [step for step in drawn if step.classes == ALL and step.share == 1]
    parts = [step for step in drawn if step not in whole]
    assert 450 < len(whole) < 600
    sizes = [len(step.classes) for step in parts]
    assert {*sizes} == {*range(2, 11)} and 0.2 < sizes.count(2) / len(sizes) < 0.28  # 2 * 5.5 ** u < 3: u < 0.238
    assert {step.share for step in parts} == {level / 16 for level in range(9, 17)}
    assert all(step.classes == tuple(sorted({*step.classes})) for step in parts)
    assert {label for step in parts for label in step.classes} == {*ALL}
    again = sub_tasks.draw(torch.Generator().manual_seed(0))
    assert (again.classes, again.share) == (drawn[0].classes, drawn[0].share)


def test_widths_are_those_of_the_sub_models_that_are_cut(small):
    model, _, images, neurons = small
    sub_tasks = objective(neurons, random_rankings(neurons))
    ranking = by_best_rank(sub_tasks.rankings[label] for label in (1, 4))
    counts = widths(ranking.layers, 0.4, steps=neurons.steps(8))
    assert any(count < ranking.layers[name] for name, count in counts.items())
    held = held_view(neurons.on(copy.deepcopy(model)), plan(neurons, ranking.prefix(counts)).held)
    actual = sub_tasks.logits(model, images, (1, 4), 0.4)
    assert torch.allclose(actual, held(images)[:, [1, 4]], atol=1e-5)


def test_one_step_leaves_no_trace_in_the_next(small):
    model, sub_tasks, images, _ = small
    first = sub_tasks.logits(model, images, (1, 4), 0.5)
    sub_tasks.logits(model, images, (0, 2, 3, 5, 6, 7, 8), 0.8)
    assert sub_tasks.logits(model, images, (1, 4), 0.5).equal(first)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.classifier.weight.zero_()
    assert not sub_tasks.logits(other, images, (1, 4), 0.5).equal(first)


def test_the_output_of_the_neurons_picks_the_logits(small):
    class Scoring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small[0]

        def forward(self, images):
            return {"scores": self.net(images)}

    model, images = Scoring(), small[2]
    neurons = find_neurons(model, images[:2], output=lambda result: result["scores"])
    expected = small[1].logits(small[0], images, (1, 4), 0.5)
    assert objective(neurons, random_rankings(neurons), round_to=1).logits(model, images, (1, 4), 0.5).equal(expected)


def test_it_trains_the_whole_and_the_parts():
    task = load("digits")
    torch.manual_seed(0)
    model = create("convnet", num_classes=10, channels=1, width=0.25)
    neurons = find_neurons(model, task.example, classes=task.classes)
    sub_tasks = objective(neurons, random_rankings(neurons))
    training = Training(epochs=10, batch_size=32, device="cpu", precision="fp32", progress=False)
    rows = fit(model, task, training, objective=sub_tasks)
    assert rows[-1]["loss"] < rows[0]["loss"] / 2 and rows[-1]["validation_accuracy"] > 0.9
    images, labels = next(iter(task.batches("validation", 1000)))
    right = []
    for one, other in ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9)):
        chosen = (labels == one) | (labels == other)
        with torch.no_grad():  # batch norms use the statistics of these images
            logits = sub_tasks.logits(model.train(), images[chosen], (one, other), 0.5)
        right.append(logits.argmax(1) == (labels[chosen] == other))
    assert torch.cat(right).double().mean() > 0.9


class Interrupted(SubTasks):
    """Sub-tasks, interrupted by Ctrl-C in the second step after the first epoch."""

    def draw(self, generator):
        self.drawn = getattr(self, "drawn", 0) + 1
        if self.drawn > 7:
            raise KeyboardInterrupt
        return super().draw(generator)


def test_resuming_draws_the_same_sub_tasks(tmp_path):
    task = load("digits").limit(train=300)
    training = Training(epochs=2, batch_size=50, device="cpu", precision="fp32", progress=False)
    trained = []
    for kinds in ([objective], [Interrupted, objective]):
        for kind in kinds:
            torch.manual_seed(0)
            model = create("convnet", num_classes=10, channels=1, width=0.25)
            sub_tasks = kind(neurons := find_neurons(model, task.example), random_rankings(neurons))
            with pytest.raises(KeyboardInterrupt) if kind is Interrupted else nullcontext():
                fit(model, task, training, objective=sub_tasks, folder=tmp_path / str(len(kinds)))
        trained.append(model.state_dict())
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())
    others = dict(zip("abcdefghij", sub_tasks.rankings[::-1], strict=True))
    with pytest.raises(TorchsliceError, match=r"objective was .*rankings \w{8}, .*now .*rankings \w{8}"):
        fit(model, task, training, objective=objective(neurons, others), folder=tmp_path / "2")


def test_rankings_are_put_in_the_order_of_the_named_classes(small):
    model, example = make("convnet")
    neurons = find_neurons(model, example, classes=[f"class {label}" for label in range(10)])
    rankings = {f"class {label}": ranking for label, ranking in random_rankings(neurons).items()}
    mixed = {name: rankings[name] for name in sorted(rankings, reverse=True)}
    assert objective(neurons, mixed).rankings == tuple(rankings.values())
    with pytest.raises(TorchsliceError, match="there is no ranking for class 'class 9'"):
        objective(neurons, {**dict(list(rankings.items())[:9]), "other": rankings["class 0"]})


def test_what_does_not_fit_is_refused(small):
    _, sub_tasks, images, neurons = small
    some = dict(zip("abc", sub_tasks.rankings, strict=False))
    with pytest.raises(TorchsliceError, match="a ranking for each of the 10 classes of the model, got 3"):
        objective(neurons, some)
    wrong = random_rankings(find_neurons(make("simcnn")[0], images[:2]))
    with pytest.raises(TorchsliceError, match="slice of another model"):
        objective(neurons, wrong)
    for settings in ({"whole": 0}, {"least": 1.5}, {"label_smoothing": 1}, {"round_to": 0}):
        with pytest.raises(TorchsliceError, match=f"{next(iter(settings))} must be"):
            objective(neurons, random_rankings(neurons), **settings)


def test_ranks_are_by_turns_and_layers_with_the_same_channels_have_one_order():
    task = load("digits").limit(train=200)
    torch.manual_seed(0)
    neurons = find_neurons(create("resnet20", channels=1, width=0.5), task.example, classes=task.classes)
    scores = contributions(neurons, task, metric="avg", samples_per_class=5, progress=False)
    rankings = rank(neurons, task, scores)
    assert tuple(rankings) == task.classes and rank(neurons, task, scores) == rankings
    streams = {}
    for name, numbers in neurons.sets.items():
        streams.setdefault(tuple(numbers.tolist()), []).append(name)
    assert max(map(len, streams.values())) > 2
    tied = scores.tied(neurons)["avg"]
    expected = by_turns({names[0]: tied[names[0]] for names in streams.values()})
    for ranking, literal in zip(rankings.values(), expected, strict=True):
        for names in streams.values():
            assert all(torch.equal(ranking[name], literal[names[0]]) for name in names)
        kept = ranking.prefix(widths(ranking.layers, 0.4, powers=(1, 1)))
        assert neurons.closed(kept) == kept  # so whole channels can be cut
    assert rank(neurons, task, metric="avg", seed=1, progress=False).keys() == rankings.keys()
    with pytest.raises(TorchsliceError, match="contributions to other classes"):
        rank(neurons, task.restrict(["3", "8"]), scores)
