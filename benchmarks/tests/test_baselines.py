"""Baselines, by hand and by their properties."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.baselines import (
    BATCH,
    Distilling,
    Elastic,
    LowRank,
    NewRows,
    best_fit,
    by_task,
    deeparc_slice,
    fisher_information,
    layer_similarity,
    learned,
    mixed,
    redundant_layers,
    similarity_to_previous,
    unbiased_hsic,
    with_bias,
)
from benchmarks.experiment import inputs_of, neurons_of
from torchslice import Slice, Training, accuracy
from torchslice.maintain import adapt

from .nets import Tiny, five_stripes, lively, stripes

CPU = torch.device("cpu")
TASK = five_stripes()
OLD, NEW = TASK.restrict(TASK.classes[:3]), TASK.restrict(TASK.classes[3:])
X, LABELS = inputs_of(NEW.train, CPU)[:6], NEW.train.labels[:6] + 3
QUIET = Training(batch_size=30, precision="fp32", device="cpu", progress=False)


# -- low-rank adapters --------------------------------------------------------------------------------------------
def test_low_rank_adapters_start_as_the_network_and_merge_into_a_plain_one() -> None:
    model, x = lively(Tiny()), torch.randn(4, 1, 8, 8)
    adapters = LowRank(model, param_fraction=0.4)
    assert torch.equal(adapters.eval()(x), model(x)) and isinstance(adapters.network, nn.Module)
    trained = sum(p.numel() for p in adapters.parameters() if p.requires_grad)
    assert trained / sum(p.numel() for p in model.parameters()) <= 0.4 and adapters.rank > 1
    with torch.no_grad():
        for parameter in adapters.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    merged = adapters.eval().merged()
    assert torch.allclose(merged(x), adapters(x), atol=1e-5) and not torch.allclose(merged(x), model(x), atol=1e-3)
    assert merged.state_dict().keys() == model.state_dict().keys() and all(p.requires_grad for p in merged.parameters())


def test_training_adapters_moves_nothing_else() -> None:
    task, model = stripes(), lively(Tiny())
    adapters = LowRank(model, param_fraction=0.1)
    training = replace(QUIET, epochs=3, learning_rate=0.05, weight_decay=0.1, optimizer="adamw")
    result = adapt(adapters, task, task.train, training=training)
    assert result.kept and not adapters.train().network.norm1.training
    before, merged = model.state_dict(), result.model.merged()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in ("conv1.weight", "conv2.weight", "head.weight")), name
    change = (merged.conv2.weight - model.conv2.weight).detach().flatten(1)
    assert torch.linalg.matrix_rank(change, tol=1e-5) <= adapters.rank < 6


# -- DeepArc's layers ---------------------------------------------------------------------------------------------
def slow_hsic(a: torch.Tensor, b: torch.Tensor) -> float:
    """Sums over all pairs, triples and quadruples of different samples, which is what the estimator is unbiased by."""
    n = len(a)
    total = 0.0
    for i, j, k, m in itertools.permutations(range(n), 4):
        total += (a[i, j] * b[i, j] + a[i, j] * b[k, m] - 2 * a[i, j] * b[i, k]).item()
    return total / (n * (n - 1) * (n - 2) * (n - 3))


def test_hsic_is_the_mean_over_quadruples() -> None:
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    a, b = x @ x.T, y @ y.T
    assert unbiased_hsic(a, b).item() == pytest.approx(slow_hsic(a, b))
    assert unbiased_hsic(a, a).item() == pytest.approx(slow_hsic(a, a))


def test_similarity_of_the_same_is_one_and_falls_with_what_is_done_to_images() -> None:
    task = stripes()
    neurons, x = neurons_of(lively(Tiny()), task), inputs_of(task.train, CPU)
    same = layer_similarity(neurons, x, neurons.model, x)
    assert list(same) == ["conv1", "conv2"] and all(value == pytest.approx(1) for value in same.values())
    noise = torch.randn(x.shape)
    little, much = (layer_similarity(neurons, x, neurons.model, x + s * noise) for s in (0.3, 3))
    assert all(much[layer] < little[layer] < 1 for layer in same)
    other = layer_similarity(neurons, x, lively(Tiny(), seed=1), x)
    assert all(value < 0.999 for value in other.values())
    assert len(x) < BATCH and not neurons.model.training


def test_similarity_to_the_layer_before() -> None:
    turn = torch.linalg.qr(torch.randn(4, 4)).Q
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 4, bias=False), nn.Identity(), nn.Linear(4, 5))
    model[2].weight.data = 3 * turn  # a rotation changes nothing that CKA sees
    x = inputs_of(TASK.train, CPU)
    alike = similarity_to_previous(neurons_of(model, TASK), x)
    assert list(alike) == ["2"] and alike["2"] == pytest.approx(1, abs=1e-5)
    model[3] = nn.ReLU()
    assert similarity_to_previous(neurons_of(model, TASK), x)["2"] < 0.99


def kept(slice_: Slice) -> list[str]:
    """Layers that are kept whole."""
    return [name for name, mask in slice_.masks.items() if mask.all()]


def test_deeparc_takes_the_layers_at_which_similarity_drops() -> None:
    similarity = {"a": 0.9, "b": 0.85, "c": 0.3, "d": 0.31, "e": 0.1}  # drops 0.1, 0.05, 0.55, -0.01, 0.21
    full = Slice({name: torch.ones(2, dtype=torch.bool) for name in similarity})
    assert kept(deeparc_slice(similarity, full)) == ["c", "e"]
    wide = {f"{n}": 1 - n / 100 for n in range(20)}
    assert len(deeparc_slice(wide, Slice({name: torch.ones(2, dtype=torch.bool) for name in wide}))) == 10


def test_redundant_layers() -> None:
    full = Slice({name: torch.ones(3) > 0 for name in "abcdefg"})
    similarity = {"b": 0.995, "c": 0.2, "d": 0.991, "e": 0.999, "f": 0.5, "g": 0.1}
    assert kept(redundant_layers(similarity, full)) == ["b", "d", "e"]
    assert kept(redundant_layers({**similarity, "d": 0.6, "e": 0.3}, full)) == ["b", "d"]  # the most similar third


# -- new classes --------------------------------------------------------------------------------------------------
def test_every_objective_compares_the_new_rows_only_and_says_which_answers_were_correct() -> None:
    model, teacher = lively(Tiny(5)), lively(Tiny(3))
    assert torch.equal(NewRows(3)(model, X, LABELS)[0], F.cross_entropy(model(X)[:, 3:], LABELS - 3))
    correct = model(X)[:, 3:].argmax(1) + 3 == LABELS
    for objective in (NewRows(3), Elastic(3, {}, {}, weight=1.0, learning_rate=0.1), Distilling(3, teacher, 1.0)):
        assert torch.equal(objective(model, X, LABELS)[1], correct)


def test_elastic_pulls_known_rows_back() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5, bias=False))
    anchors = {"1.weight": model[1].weight[:3].detach() - 0.5}
    fisher = {"1.weight": torch.full((3, 64), 2.0)}
    plain = NewRows(3)(model, X, LABELS)[0]
    loss, _, parts = Elastic(3, anchors, fisher, weight=0.25, learning_rate=0.01)(model, X, LABELS)
    assert parts["pull"].item() == pytest.approx(3 * 64 * 0.5 * 0.25 / 2)  # 192 weights, strength 0.5, distance 0.5
    assert loss.item() == pytest.approx(plain.item() + parts["pull"].item())
    strong = Elastic(3, anchors, fisher, weight=1e6, learning_rate=0.01)(model, X, LABELS)[2]["pull"]
    assert strong.item() == pytest.approx(3 * 64 * 10 * 0.25 / 2)  # at most 0.1 / learning_rate


def test_distilling_keeps_the_known_logits() -> None:
    teacher, model = lively(Tiny(3)), lively(Tiny(5))
    model.load_state_dict({**model.state_dict(), **{k: v for k, v in teacher.state_dict().items() if "head" not in k}})
    with torch.no_grad():
        model.head.weight[:3], model.head.bias[:3] = teacher.head.weight, teacher.head.bias
    assert Distilling(3, teacher, 2.0)(model, X, LABELS)[2]["change"].item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        model.head.bias[0] += 1
    loss, _, parts = Distilling(3, teacher, 2.0)(model, X, LABELS)
    p, q = ((m(X)[:, :3] / 2).softmax(1) for m in (teacher, model))
    assert parts["change"].item() == pytest.approx(4 * (p * (p / q).log()).sum(1).mean().item(), rel=1e-4)
    assert loss.item() == pytest.approx(NewRows(3)(model, X, LABELS)[0].item() + 2 * parts["change"].item())


def test_fisher_information_of_logistic_regression() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    p = torch.tensor([0.7, 0.2, 0.1])  # the expected value is p (1 - p)
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(p.log())
    found = fisher_information(model, OLD, samples=120)["1.bias"]
    assert torch.allclose(found, p * (1 - p), atol=0.08) and model[1].weight.grad is None


def test_mixtures_and_scores() -> None:
    task = mixed(OLD, NEW, 0.1, seed=0)
    counts = task.train.labels.bincount(minlength=5).tolist()
    assert sum(counts[:3]) == round(0.1 * len(OLD.train)) and counts[3:] == NEW.train.labels.bincount().tolist()
    assert mixed(OLD, NEW, 0.0, seed=0).validation.labels.min() == 3 and len(task.test) == len(TASK.test)
    logits = torch.tensor([[1.0, 2, 9, 9], [0, 1, 2, 9], [9, 9, 2, 1], [0, 0, 0, 1]])
    assert by_task(logits, torch.tensor([1, 0, 2, 2]), 2) == (0.5, 0.5)


def test_the_best_epoch_is_kept() -> None:
    seen: list[torch.Tensor] = []

    def score(model: nn.Module) -> float:
        seen.append(next(model.parameters()).detach().clone())
        return [0.1, 0.3, 0.2, 0.0, 0.3][len(seen) - 1]  # epochs 0 to 3, then the one that was kept

    training = replace(QUIET, epochs=3, learning_rate=0.1)
    kept = best_fit("new", lambda: lively(Tiny(5)), TASK, [0.1], training=training, score=score, say=print)
    assert torch.equal(next(kept.parameters()), seen[1]) and not torch.equal(seen[1], seen[3]) and len(seen) == 5


def test_a_bias_in_the_network_does_not_matter_once_it_is_chosen() -> None:
    model = lively(Tiny(5))
    before, reached = with_bias(model, TASK, 3)
    with torch.no_grad():
        model.head.bias[3:] += 7
    after, again = with_bias(model, TASK, 3)
    assert torch.allclose(after, before, atol=1e-4) and again == pytest.approx(reached)


def test_all_of_them_learn() -> None:
    base = lively(Tiny(3))
    before = copy.deepcopy(base.state_dict())
    settings = SimpleNamespace(learning_rates=[], ewc_weights=[1.0], fisher_samples=9, similarity_samples=60)
    settings.lwf_weights = [1.0, 1e30]  # the second diverges, and is left out
    training, said = replace(QUIET, epochs=20, learning_rate=0.1), list[str]()
    made = learned(base, OLD, NEW, settings=settings, training=training, say=said.append)
    assert any("no longer finite" in text for text in said)
    assert list(made) == ["naive", "replay 10%", "replay 100%", "EWC", "LwF", "DeepArc"]
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())
    x, labels = inputs_of(NEW.train, CPU), NEW.train.labels
    for name, model in made.items():
        logits = model(x)
        assert logits.shape[1] == 5
        assert (logits[:, 3:].argmax(1) == labels).float().mean() > 0.55, name
    untouched = [torch.equal(made[name].conv1.weight, base.conv1.weight) for name in ("naive", "DeepArc")]
    assert untouched == [False, True]  # a third of two layers is one, the second
    assert accuracy(made["replay 100%"], TASK, "train").overall > 0.4
