import itertools

import pytest
import torch
from tests.core.architectures import make
from tests.use.nets import Tiny, lively, stripes
from torch import nn

from torchslice.bench.rivals import BATCH, LowRank, deeparc_part, layer_similarity, unbiased_hsic
from torchslice.slices import Slice
from torchslice.use.readapt import adapt

DATA = stripes()
QUIET = {"batch_size": 30, "precision": "fp32", "device": "cpu", "progress": False}


def slow_hsic(a: torch.Tensor, b: torch.Tensor) -> float:
    """Sums over all pairs, triples and quadruples of different samples, which is what the estimator is unbiased by."""
    n = len(a)
    total = 0.0
    for i, j, k, m in itertools.permutations(range(n), 4):
        total += (a[i, j] * b[i, j] + a[i, j] * b[k, m] - 2 * a[i, j] * b[i, k]).item()
    return total / (n * (n - 1) * (n - 2) * (n - 3))


def test_hsic_is_the_mean_over_quadruples():
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    a, b = x @ x.T, y @ y.T
    assert unbiased_hsic(a, b).item() == pytest.approx(slow_hsic(a, b))
    assert unbiased_hsic(a, a).item() == pytest.approx(slow_hsic(a, a))


def test_similarity_of_the_same_is_one_and_falls_with_what_is_done_to_images():
    model = lively(Tiny())
    images = DATA.normalise(DATA.train.images)
    example = DATA.example
    same = layer_similarity((model, images), (model, images), example)
    assert list(same) == ["conv1", "conv2"] and all(value == pytest.approx(1) for value in same.values())
    noise = torch.randn(images.shape)
    little, much = (layer_similarity((model, images), (model, images + s * noise), example) for s in (0.3, 3))
    assert all(much[layer] < little[layer] < 1 for layer in same)
    other = layer_similarity((model, images), (lively(Tiny(), seed=1), images), example)
    assert all(value < 0.999 for value in other.values())
    assert len(images) < BATCH and not model.training


def test_deeparc_takes_the_layers_at_which_similarity_drops():
    similarity = {"a": 0.9, "b": 0.85, "c": 0.3, "d": 0.31, "e": 0.1}  # drops 0.1, 0.05, 0.55, -0.01, 0.21
    full = Slice({name: torch.ones(2, dtype=torch.bool) for name in similarity})
    assert [n for n, mask in deeparc_part(similarity, full).masks.items() if mask.all()] == ["c", "e"]
    wide = {f"{n}": 1 - n / 100 for n in range(20)}
    full = Slice({name: torch.ones(2, dtype=torch.bool) for name in wide})
    assert len(deeparc_part(wide, full)) == 10


@pytest.mark.parametrize("name", ["mlp", "gated", "convnet"])
def test_low_rank_adapters_start_as_the_network_and_merge_into_a_plain_one(name):
    model, example = make(name)
    adapters = LowRank(model, share=0.2)
    assert torch.equal(adapters(example), model(example))
    trained = sum(p.numel() for p in adapters.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    assert trained / whole <= 0.2 or adapters.rank == 1
    with torch.no_grad():
        for parameter in adapters.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    merged = adapters.eval().merged()
    assert torch.allclose(merged(example), adapters(example), atol=1e-6)
    assert not torch.allclose(merged(example), model(example), atol=1e-3)
    assert [type(module) for module in merged.modules()] == [type(module) for module in model.modules()]
    assert merged.state_dict().keys() == model.state_dict().keys() and all(p.requires_grad for p in merged.parameters())


def test_training_adapters_moves_nothing_else():
    model = lively(Tiny())
    adapters = LowRank(model, share=0.1)
    result = adapt(adapters, DATA.train, DATA, epochs=3, learning_rate=0.05, weight_decay=0.1, **QUIET)
    assert result.best_epoch
    before = model.state_dict()
    for name, tensor in result.model.merged().state_dict().items():
        low_rank = name in ("conv1.weight", "conv2.weight", "head.weight")
        assert torch.equal(tensor, before[name]) != low_rank, name
    change = (result.model.merged().conv2.weight - model.conv2.weight).detach().flatten(1)
    assert torch.linalg.matrix_rank(change, tol=1e-5) <= adapters.rank < 6
    assert isinstance(adapters.network, nn.Module) and not adapters.train().network.norm1.training
