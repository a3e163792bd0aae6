"""Training only some neurons: what is frozen stays bit-identical, and what moves gets the gradients it should get."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tests.core.architectures import ARCHITECTURES, PreActivation, make
from tests.training.tiny import assert_equal, state, tiny_data, tiny_net
from tests.use.nets import Tied, Tiny, lively, stripes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from torchslice.core.find import find_neurons
from torchslice.core.hold import holding, masked
from torchslice.core.surgery import plan
from torchslice.errors import TorchsliceError
from torchslice.models import create
from torchslice.slices import Slice
from torchslice.training import cross_entropy, fit
from torchslice.use.finetune import finetune
from torchslice.use.partial import Partial, moving_rows

QUIET = {"batch_size": 8, "device": "cpu", "progress": False}


def train(partial: Partial, x: Tensor) -> None:
    """Take two steps with each optimizer under a schedule, one of them in bfloat16."""
    partial.train()
    parameters = list(partial.parameters())
    for optimizer in (
        torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=0.1, nesterov=True),
        torch.optim.AdamW(parameters, 0.01, weight_decay=0.1),
    ):
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.002, total_steps=3)
        for low in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = F.cross_entropy(partial(x).float(), torch.arange(len(x)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    partial.eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_the_named_neurons_move_and_the_others_compute_the_same_bits(name: str) -> None:
    model, example = make(name)
    example = example if name == "vit" or example.dim() < 4 else example[..., :32, :32]
    neurons = find_neurons(model, example)
    before = copy.deepcopy(model.state_dict())
    part, batch_statistics = neurons.random(0.3, seed=1), list(ARCHITECTURES).index(name) % 2 == 0
    partial = Partial(model, part, example, classes=[1, 3], batch_statistics=batch_statistics, neurons=neurons)
    inputs = torch.randn_like(example)
    with torch.no_grad():
        assert torch.equal(partial.eval()(inputs), model(inputs))
        with holding(model, plan(neurons, ~part).held):
            expected = model(inputs)
    train(partial, example)
    merged = partial.merged()
    rows = moving_rows(neurons, part, [1, 3])
    assert [type(module) for module in merged.modules()] == [type(module) for module in model.modules()]
    assert not any(module.training for module in merged.modules())
    assert_equal(dict(model.state_dict()), before)
    after = merged.state_dict()
    assert list(after) == list(before)
    for key, tensor in after.items():
        where = rows.get(key.rpartition(".")[0])
        if where is None or tensor.dim() == 0 or ("running" in key and not batch_statistics):
            assert torch.equal(tensor, before[key]), key
        else:
            moved = torch.zeros(len(tensor), dtype=torch.bool).index_fill_(0, where, True)
            assert torch.equal(tensor[~moved], before[key][~moved]), key
            assert not torch.equal(tensor[moved], before[key][moved]), key
    others = [c for c in range(10) if c not in (1, 3)]
    with torch.no_grad():
        assert (merged(inputs) - model(inputs)).abs().max() > 1e-3
        with holding(merged, plan(neurons, ~part).held):
            assert torch.equal(merged(inputs)[:, others], expected[:, others])


def test_rows_by_hand() -> None:
    model = create("mobilenet", width=0.125)
    neurons = find_neurons(model, torch.randn(2, 3, 16, 16))
    layer = next(name for name, layer in neurons.layers.items() if layer.followers)
    follower = next(name for name, sources in neurons.followers.items() if sources == (layer,))
    part = neurons.none().masks
    part[layer][torch.tensor([2, 0])] = True
    rows = moving_rows(neurons, Slice(part), classes=[4])
    own = {layer, neurons.layers[layer].hold, follower, *neurons.layers[layer].followers, *neurons.head}
    assert set(rows) == own
    assert all(found.tolist() == ([4] if name in neurons.head else [0, 2]) for name, found in rows.items())


def test_a_norm_moves_only_where_all_it_reads_moves() -> None:
    model, example = PreActivation().eval(), torch.randn(2, 3, 8, 8)
    neurons = find_neurons(model, example)
    part = neurons.none().masks
    part["stem"][:4] = True
    part["conv1"][2:6] = True
    rows = moving_rows(neurons, Slice(part))  # norm2 and norm3 read stem + conv1, norm1 the stem alone
    found = {name: where.tolist() for name, where in rows.items()}
    assert found == {
        "stem": [0, 1, 2, 3],
        "norm1": [0, 1, 2, 3],
        "conv1": [2, 3, 4, 5],
        "norm2": [2, 3],
        "norm3": [2, 3],
    }


def reference_norm(x: Tensor, norm: nn.BatchNorm2d, moving: Tensor) -> Tensor:
    """Normalise channel by channel, those that move with the statistics of the batch."""
    channels = []
    for c in range(x.shape[1]):
        values, mean, var = x[:, c], norm.running_mean[c], norm.running_var[c]
        if moving[c]:
            mean, var = values.mean(), values.var(correction=0)
        channels.append((values - mean) / (var + norm.eps).sqrt() * norm.weight[c] + norm.bias[c])
    return torch.stack(channels, dim=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch_statistics", [False, True])
def test_gradients_and_statistics_are_those_of_a_literal_reference(batch_statistics: bool, dtype: torch.dtype) -> None:
    model = lively(Tiny(channels=2)).to(dtype)
    model.drop.p = 0.0
    images, labels = torch.randn(5, 2, 8, 8, dtype=dtype), torch.tensor([0, 1, 2, 0, 1])
    masks = {"conv1": torch.arange(8) % 3 == 0, "conv2": torch.arange(6) < 4}
    partial = Partial(model, Slice(masks), images, classes=[2], batch_statistics=batch_statistics).train()
    F.cross_entropy(partial(images), labels).backward()

    x = images
    for conv, norm, mask in ((model.conv1, model.norm1, masks["conv1"]), (model.conv2, model.norm2, masks["conv2"])):
        x = reference_norm(conv(x), norm, mask & batch_statistics).relu()
        before, read = norm.running_mean.clone(), conv
    F.cross_entropy(model.head(x.mean((2, 3))), labels).backward()
    found = {
        name.replace("network.", "").replace("moving_rows_of_", ""): p.grad for name, p in partial.named_parameters()
    }
    masks |= {"norm1": masks["conv1"], "norm2": masks["conv2"], "head": torch.tensor([False, False, True])}
    expected = {name: p.grad[masks[name.split(".")[0]]] for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    assert torch.equal(norm.running_mean, before) and read is model.conv2
    with torch.no_grad():
        statistics = model.conv1(images).mean((0, 2, 3)), model.conv1(images).var((0, 2, 3))
    merged = partial.merged().norm1
    for new, old, seen in zip(
        (merged.running_mean, merged.running_var),
        (model.norm1.running_mean, model.norm1.running_var),
        statistics,
        strict=True,
    ):
        moved = old.lerp(seen, 0.1) if batch_statistics else old
        torch.testing.assert_close(new, torch.where(masks["conv1"], moved, old))


@pytest.mark.parametrize("inputs", ["1d", "3d", "linear"])
def test_other_layers_have_the_gradients_of_autograd(inputs: str) -> None:
    conv = {"1d": nn.Conv1d, "3d": nn.Conv3d}.get(inputs)
    size = {"1d": (7,), "3d": (3, 4, 5), "linear": ()}[inputs]
    first = conv(2, 6, 3, stride=2, padding=1, dilation=1, bias=False) if conv else nn.Linear(2, 6)
    middle = conv(6, 5, 3, padding="same") if conv else nn.Linear(6, 5, bias=False)
    model = nn.Sequential(first, nn.ReLU(inplace=True), middle, nn.ReLU(), nn.Flatten())
    x = torch.randn(4, 2, *size, requires_grad=True)
    model.append(nn.Linear(model(x).shape[1], 3))
    part = Slice({"0": torch.tensor([1, 0, 0, 1, 0, 1]) > 0, "2": torch.tensor([0, 1, 0, 1, 1]) > 0})
    partial = Partial(model, part, x).train()
    torch.testing.assert_close(partial(x), model(x))
    (ours,) = torch.autograd.grad(partial(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(ours, theirs)
    partial(x).square().sum().backward()
    model(x).square().sum().backward()
    for layer, mask in part.masks.items():
        for key, parameter in partial.network.get_submodule(layer).named_parameters():
            whole = model.get_submodule(layer).get_parameter(key.removeprefix("moving_rows_of_")).grad
            torch.testing.assert_close(parameter.grad, whole[mask])


def test_no_gradient_is_computed_that_is_not_needed() -> None:
    model, x = create("convnet", width=0.5).train(), torch.randn(4, 3, 16, 16)
    partial = Partial(model, find_neurons(model, x[:2]).random(0.25), x[:2]).train()

    def flops(network: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            network(x).sum().backward()
        return counter.get_total_flops()

    # forward 1, gradients of activations 1, of weights 1/4 instead of 1
    assert flops(partial) / flops(model) == pytest.approx(2.25 / 3, abs=0.02)


def test_training_with_fit_resumes_bit_equal(tmp_path) -> None:
    data, model = tiny_data(), tiny_net(dropout=0.5).eval()
    part = find_neurons(model, data.example).random(0.5, seed=3)
    arguments = {**QUIET, "epochs": 3, "weight_decay": 0.01, "precision": "bf16"}

    def new() -> Partial:
        return Partial(model, part, data.example, classes=[0], batch_statistics=True)

    calls = iter(range(10**6))

    def interrupted(network, images, labels):
        if next(calls) == 4:  # in the second epoch
            raise KeyboardInterrupt
        return cross_entropy(network, images, labels)

    interrupted.__module__, interrupted.__qualname__ = cross_entropy.__module__, cross_entropy.__qualname__
    whole, resumed = new(), new()
    fit(whole, data, **arguments)
    with pytest.raises(KeyboardInterrupt):
        fit(new(), data, objective=interrupted, folder=tmp_path / "run", **arguments)
    fit(resumed, data, folder=tmp_path / "run", **arguments)
    assert_equal(state(whole), state(resumed))
    example = data.example
    with torch.no_grad(), masked(model, ~part, example):
        expected = model(example)[:, 1:]
    merged = resumed.merged()
    with torch.no_grad(), masked(merged, ~part, example):
        assert torch.equal(merged(example)[:, 1:], expected)
    assert not torch.equal(merged[0].weight, model[0].weight)


def test_finetune_keeps_the_best_epoch_of_it() -> None:
    data, model = stripes(), lively(Tiny())
    part = find_neurons(model, data.example).random(0.5)
    partial = Partial(model, part, data.example, classes=range(3), batch_statistics=True)
    tuned = finetune(partial, data, epochs=6, learning_rate=0.1, batch_size=30, device="cpu", progress=False)
    assert max(tuned.validation_accuracy) > tuned.validation_accuracy[0] + 0.2
    merged = tuned.model.merged()
    with torch.no_grad():
        assert torch.equal(merged(data.example), tuned.model(data.example))
        with masked(model, ~part, data.example):
            hidden = model.norm1(model.conv1(data.example))
        with masked(merged, ~part, data.example):
            assert torch.equal(merged.norm1(merged.conv1(data.example)), hidden)


def worker(rank: int, folder: str) -> None:
    """Be one of two processes, as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(state(two_epochs()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def two_epochs() -> Partial:
    data, model = tiny_data(25), tiny_net()
    partial = Partial(model, find_neurons(model, data.example).random(0.5), data.example, classes=[0])
    fit(partial, data, epochs=2, precision="fp32", **QUIET)
    return partial


def test_two_processes_train_what_one_does(tmp_path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert_equal(first, second)
    for name, tensor in state(two_epochs()).items():
        torch.testing.assert_close(first[name], tensor, msg=name)


def test_a_copy_that_is_plain_and_whole() -> None:
    model = lively(Tiny())
    model.conv1.weight.requires_grad_(False)
    model.note = "kept"
    partial = Partial(model, find_neurons(model, torch.randn(2, 1, 8, 8)).random(0.5), torch.randn(2, 1, 8, 8))
    merged = copy.deepcopy(partial).merged()
    assert merged.note == "kept" and not merged.conv1.weight.requires_grad and merged.conv2.weight.requires_grad
    assert_equal(state(merged), state(model))
    moving = sum(p.numel() for p in partial.parameters())
    assert moving == 4 * (9 + 3) + 3 * (8 * 9 + 3)
    assert partial.param_share == moving / sum(p.numel() for p in model.parameters())
    partial.train()
    assert partial.network.drop.training and not partial.network.norm1.training
    merged.conv1.weight.data.zero_()
    assert partial.network.conv1.weight.abs().sum() > 0


def test_rows_are_taken_from_another_model() -> None:
    model, other, example = lively(Tiny()), lively(Tiny(), seed=1), torch.randn(2, 1, 8, 8)
    part = find_neurons(model, example).random(0.5)
    for batch_statistics in (False, True):
        partial = Partial(model, part, example, batch_statistics=batch_statistics)
        partial.take(other)
        norm, mask = partial.merged().norm1, part["conv1"]
        assert torch.equal(norm.weight, torch.where(mask, other.norm1.weight, model.norm1.weight))
        running = other.norm1.running_var if batch_statistics else model.norm1.running_var
        assert torch.equal(norm.running_var, torch.where(mask, running, model.norm1.running_var))


def test_parameters_that_are_shared_stay_shared() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tied, self.hidden, self.head = Tied(), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.hidden(self.tied(x)).relu())

    model, x = Net(), torch.randn(5, 4)
    partial = Partial(model, find_neurons(model, x).random(0.5), x)
    assert {name.split(".")[1] for name, _ in partial.named_parameters()} == {"hidden"}
    merged = partial.merged()
    assert merged.tied.first.weight is merged.tied.second.weight


def test_wrong_use() -> None:
    model, example = Tiny(), torch.randn(2, 1, 8, 8)
    neurons = find_neurons(model, example)
    with pytest.raises(TorchsliceError, match="nothing would move: the slice has no neuron with parameters of its own"):
        Partial(model, neurons.none(), example)
    with pytest.raises(TorchsliceError, match=r"classes must be indices in 0..2, got \[3\]"):
        Partial(model, neurons.full(), example, classes=[3])
    with pytest.raises(TorchsliceError, match="slices of different models: layer 'conv1' has 4 neurons in one and 8"):
        Partial(model, Slice({"conv1": torch.ones(4) > 0, "conv2": torch.ones(6) > 0}), example)
    with pytest.raises(TorchsliceError, match=r"the model is wrapped \(DataParallel\)"):
        Partial(nn.DataParallel(model), neurons.full(), example)

    class Softened(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(1)

    soft = Softened()
    with pytest.raises(
        TorchsliceError, match="the class scores do not come straight from a layer, so they have no rows"
    ):
        Partial(soft, find_neurons(soft, example).random(0.5), example, classes=[0])
