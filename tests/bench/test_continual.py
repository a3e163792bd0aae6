"""The rivals of extend, by hand and by their properties."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.use.nets import Tiny, five_stripes, lively
from torch import nn

from torchslice.bench.continual import (
    Distilling,
    Elastic,
    NewRows,
    by_task,
    fisher_information,
    learned,
    mixed,
    redundant_layers,
    similarity_to_previous,
)
from torchslice.slices import Slice
from torchslice.use.evaluate import accuracy

DATA = five_stripes()
OLD, NEW = DATA.restrict(DATA.classes[:3]), DATA.restrict(DATA.classes[3:])
X, LABELS = DATA.normalise(NEW.train.images[:6]), NEW.train.labels[:6] + 3


def test_only_the_new_rows_compete():
    model = lively(Tiny(5))
    assert torch.equal(NewRows(3)(model, X, LABELS)[0], F.cross_entropy(model(X)[:, 3:], LABELS - 3))


def test_every_objective_says_which_answers_were_right():
    model, teacher = lively(Tiny(5)), lively(Tiny(3))
    right = model(X)[:, 3:].argmax(1) + 3 == LABELS
    for objective in (NewRows(3), Elastic(3, {}, {}, weight=1.0, learning_rate=0.1), Distilling(3, teacher, 1.0)):
        given = objective(model, X, LABELS)[1]
        assert given.dtype is torch.bool and torch.equal(given, right)


def test_elastic_pulls_known_rows_back():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5, bias=False))
    anchors = {"1.weight": model[1].weight[:3].detach() - 0.5}
    fisher = {"1.weight": torch.full((3, 64), 2.0)}
    plain = NewRows(3)(model, X, LABELS)[0]
    loss, _, parts = Elastic(3, anchors, fisher, weight=0.25, learning_rate=0.01)(model, X, LABELS)
    assert parts["pull"].item() == pytest.approx(3 * 64 * 0.5 * 0.25 / 2)  # 192 weights, strength 0.5, distance 0.5
    assert loss.item() == pytest.approx(plain.item() + parts["pull"].item())
    strong = Elastic(3, anchors, fisher, weight=1e6, learning_rate=0.01)(model, X, LABELS)[2]["pull"]
    assert strong.item() == pytest.approx(3 * 64 * 10 * 0.25 / 2)  # at most 0.1 / learning_rate


def test_distilling_keeps_the_known_scores():
    teacher = lively(Tiny(3))
    model = lively(Tiny(5))
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


def test_fisher_information_of_logistic_regression():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([0.7, 0.2, 0.1]).log())
    found = fisher_information(model, OLD, images=120)["1.bias"]
    p = torch.tensor([0.7, 0.2, 0.1])  # the expected value is p (1 - p)
    assert torch.allclose(found, p * (1 - p), atol=0.08) and model[1].weight.grad is None


def test_redundant_layers():
    full = Slice({name: torch.ones(3) > 0 for name in "abcdefg"})
    similarity = {"b": 0.995, "c": 0.2, "d": 0.991, "e": 0.999, "f": 0.5, "g": 0.1}
    part = redundant_layers(similarity, full)
    assert [name for name, mask in part.masks.items() if mask.all()] == ["b", "d", "e"]
    part = redundant_layers({**similarity, "d": 0.6, "e": 0.3}, full)  # the third that is most similar
    assert [name for name, mask in part.masks.items() if mask.any()] == ["b", "d"]


def test_similarity_to_the_layer_before():
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(4, 4)).Q
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 3))
    model[2].weight.data = 3 * turn  # a rotation changes nothing that CKA sees
    model[3] = nn.Identity()
    alike = similarity_to_previous(model, DATA.normalise(DATA.train.images))
    assert list(alike) == ["2"] and alike["2"] == pytest.approx(1, abs=1e-5)
    model[3] = nn.ReLU()
    assert similarity_to_previous(model, DATA.normalise(DATA.train.images))["2"] < 0.99


def test_mixtures_and_scores():
    task = mixed(OLD, NEW, 0.1, seed=0)
    counts = task.train.labels.bincount(minlength=5).tolist()
    assert sum(counts[:3]) == round(0.1 * len(OLD.train)) and counts[3:] == NEW.train.labels.bincount().tolist()
    assert mixed(OLD, NEW, 0.0, seed=0).validation.labels.min() == 3 and len(task.test) == len(DATA.test)
    logits = torch.tensor([[1.0, 2, 9, 9], [0, 1, 2, 9], [9, 9, 2, 1], [0, 0, 0, 1]])
    assert by_task(logits, torch.tensor([1, 0, 2, 2]), 2) == (0.5, 0.5)


def test_all_of_them_learn():
    base = lively(Tiny(3))
    before = copy.deepcopy(base.state_dict())
    running = {"epochs": 20, "learning_rate": 0.1, "batch_size": 30, "device": "cpu", "progress": False, "seed": 0}
    said: list[str] = []
    made = learned(
        *(base, OLD, NEW),
        rates=[],
        ewc_weights=[1.0],
        lwf_weights=[1.0, 1e30],  # the second diverges, and is left out
        fisher_images=9,
        similarity_images=60,
        say=said.append,
        **running,
    )
    assert any("no longer finite" in text for text in said)
    assert list(made) == ["naive", "replay 5%", "replay 10%", "replay 100%", "EWC", "LwF", "DeepArc"]
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())
    for name, model in made.items():
        assert model.head.out_features == 5
        logits = model(NEW.normalise(NEW.train.images))
        assert (
            by_task(torch.cat([logits, logits]), torch.cat([NEW.train.labels * 0, NEW.train.labels + 3]), 3)[1] > 0.55
        ), name
    untouched = [not (m.conv1.weight != base.conv1.weight).any() for m in (made["naive"], made["DeepArc"])]
    assert untouched == [False, True]  # a third of two layers is one, the second
    assert accuracy(made["replay 100%"], DATA, split="train").overall > 0.4
