"""Training only some neurons: what is frozen stays bit-identical, and what moves gets the gradients it should get."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.battery.zoo import NETWORKS, logits, prepared, unseen
from tests.maintain.tasks import quick
from tests.nets import Tiny, assert_equal, lively, state, stripes, tiny_net, tiny_task
from torchslice.cut.extract import masked
from torchslice.errors import TorchsliceError
from torchslice.graph.find import find_neurons
from torchslice.inputs import Inputs, run
from torchslice.maintain.partial import Partial, moving_rows
from torchslice.models import create
from torchslice.slices import Slice
from torchslice.training import CrossEntropy, finetune, fit

EXAMPLE = torch.randn(2, 1, 8, 8)


def train(partial: Partial, inputs: Inputs) -> None:
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
                found = run(partial, inputs).float()
            loss = F.cross_entropy(found, torch.arange(len(found)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    partial.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_only_the_named_neurons_move_and_the_others_compute_the_same_bits(name: str) -> None:
    neurons = prepared(name)
    model, inputs, before = neurons.model, unseen(neurons.example), state(neurons.model)
    slice_, batch_statistics = neurons.random(0.3, seed=1), list(NETWORKS).index(name) % 2 == 0
    partial = Partial(neurons, slice_, classes=[1, 3], batch_statistics=batch_statistics)
    whole, expected = logits(model, inputs), logits(masked(neurons, ~slice_), inputs)
    assert torch.equal(logits(partial.eval(), inputs), whole)
    train(partial, inputs)
    merged = partial.merged()
    assert [type(module) for module in merged.modules()] == [type(module) for module in model.modules()]
    assert not any(module.training for module in merged.modules())
    assert_equal(state(model), before)
    rows, after = moving_rows(neurons, slice_, [1, 3]), merged.state_dict()
    assert list(after) == list(before)
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    for key, tensor in after.items():
        where = rows.get(key.rpartition(".")[0])
        if where is None or key in frozen or tensor.dim() == 0 or ("running" in key and not batch_statistics):
            assert torch.equal(tensor, before[key]), key
        else:
            layer, _, own = key.rpartition(".")
            tensor, old = (t.movedim(neurons.flow.ports[layer].row_axis(own), 0) for t in (tensor, before[key]))
            moved = torch.zeros(len(tensor), dtype=torch.bool).index_fill_(0, where, True)
            assert torch.equal(tensor[~moved], old[~moved]), key
            assert not torch.equal(tensor[moved], old[moved]), key
    others = [c for c in range(10) if c not in (1, 3)]
    assert (logits(merged, inputs) - whole).abs().max() > 1e-3
    assert torch.equal(logits(masked(neurons.on(merged), ~slice_), inputs)[:, others], expected[:, others])


def test_rows_by_hand() -> None:
    neurons = prepared("mobilenet")
    layer = next(name for name, layer in neurons.layers.items() if layer.followers)
    follower = next(name for name, sources in neurons.followers.items() if sources == (layer,))
    masks = neurons.none().masks
    masks[layer][torch.tensor([2, 0])] = True
    rows = moving_rows(neurons, Slice(masks), classes=[4])
    own = {layer, neurons.layers[layer].mask_after, follower, *neurons.layers[layer].followers, *neurons.head}
    assert set(rows) == own
    assert all(found.tolist() == ([4] if name in neurons.head else [0, 2]) for name, found in rows.items())


def test_a_norm_moves_only_where_all_it_reads_moves() -> None:
    neurons = prepared("preactivation")
    masks = neurons.none().masks
    masks["stem"][:4] = True
    masks["conv1"][2:6] = True
    rows = moving_rows(neurons, Slice(masks))  # norm2 and norm3 read stem + conv1, norm1 the stem alone
    assert {name: where.tolist() for name, where in rows.items()} == {
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
    model = lively(Tiny()).to(dtype)
    model.drop.p = 0.0
    images, labels = torch.randn(5, 1, 8, 8, dtype=dtype), torch.tensor([0, 1, 2, 0, 1])
    masks = {"conv1": torch.arange(8) % 3 == 0, "conv2": torch.arange(6) < 4}
    neurons = find_neurons(model, images)
    partial = Partial(neurons, Slice(masks), classes=[2], batch_statistics=batch_statistics).train()
    F.cross_entropy(partial(images), labels).backward()

    x = images
    for conv, norm, mask in ((model.conv1, model.norm1, masks["conv1"]), (model.conv2, model.norm2, masks["conv2"])):
        x = reference_norm(conv(x), norm, mask & batch_statistics).relu()
    F.cross_entropy(model.head(x.mean((2, 3))), labels).backward()
    masks |= {"norm1": masks["conv1"], "norm2": masks["conv2"], "head": torch.tensor([False, False, True])}
    found = {rows.name: rows.moving.grad for rows in partial.rows if "running" not in rows.name}
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad[masks[name.split(".")[0]]], msg=name)
    with torch.no_grad():
        seen = model.conv1(images)
    merged, old = partial.merged().norm1, model.norm1
    for key, value in (("running_mean", seen.mean((0, 2, 3))), ("running_var", seen.var((0, 2, 3)))):
        moved = old.get_buffer(key).lerp(value, 0.1) if batch_statistics else old.get_buffer(key)
        torch.testing.assert_close(merged.get_buffer(key), torch.where(masks["conv1"], moved, old.get_buffer(key)))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@pytest.mark.parametrize("kind", ["1d", "3d", "linear", "sequence"])
def test_other_layers_have_the_gradients_of_autograd(kind: str) -> None:
    conv = {"1d": nn.Conv1d, "3d": nn.Conv3d}.get(kind)
    size = {"1d": (7,), "3d": (3, 4, 5), "linear": (), "sequence": (2,)}[kind]
    first = conv(2, 6, 3, stride=2, padding=1, bias=False) if conv else nn.Linear(2, 6)
    middle = conv(6, 5, 3, padding="same") if conv else nn.Linear(6, 5, bias=False)
    pool = Mean() if kind == "sequence" else nn.Flatten()
    model = nn.Sequential(first, nn.ReLU(inplace=True), middle, nn.ReLU(), pool)
    x = torch.randn(4, 2, *size, requires_grad=True)
    model.append(nn.Linear(model(x).shape[1], 3))
    slice_ = Slice({"0": torch.tensor([1, 0, 0, 1, 0, 1]) > 0, "2": torch.tensor([0, 1, 0, 1, 1]) > 0})
    partial = Partial(find_neurons(model, x.detach()), slice_).train()
    torch.testing.assert_close(partial(x), model(x))
    gradients = []
    for network in (partial, model):
        x.grad = None
        network(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    for rows in partial.rows:
        whole = model.get_parameter(rows.name).grad
        torch.testing.assert_close(rows.moving.grad, whole[slice_[rows.name.split(".")[0]]])


def test_no_gradient_is_computed_that_is_not_needed() -> None:
    model, x = create("convnet", width=0.5).train(), torch.randn(4, 3, 16, 16)
    neurons = find_neurons(model, x[:2])
    partial = Partial(neurons, neurons.random(0.25)).train()

    def flops(network: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            network(x).sum().backward()
        return counter.get_total_flops()

    # forward 1, gradients of activations 1, of weights 1/4 instead of 1
    assert flops(partial) / flops(model) == pytest.approx(2.25 / 3, abs=0.02)


def new(*, batch_statistics: bool = False, dropout: float = 0.0) -> Partial:
    neurons = find_neurons(tiny_net(dropout=dropout).eval(), tiny_task().example)
    return Partial(neurons, neurons.random(0.5, seed=3), classes=[0], batch_statistics=batch_statistics)


def test_training_with_fit_resumes_bit_equal(tmp_path: Path) -> None:
    task, training = tiny_task(), quick(epochs=3, batch_size=8, precision="bf16", label_smoothing=0.0)
    calls = iter(range(10**6))

    class Interrupted(CrossEntropy):
        def __call__(self, *arguments):
            if next(calls) == 4:  # in the second epoch
                raise KeyboardInterrupt
            return super().__call__(*arguments)

    Interrupted.__module__, Interrupted.__qualname__ = CrossEntropy.__module__, CrossEntropy.__qualname__
    interrupted, whole, resumed = (new(batch_statistics=True, dropout=0.5) for _ in range(3))
    before = state(whole)
    fit(whole, task, training)
    with pytest.raises(KeyboardInterrupt):
        fit(interrupted, task, training, objective=Interrupted(), folder=tmp_path / "run")
    fit(resumed, task, training, folder=tmp_path / "run")
    assert_equal(state(whole), state(resumed))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in state(whole).items())


def test_finetune_keeps_the_best_epoch_of_it() -> None:
    task, model = stripes(), lively(Tiny())
    neurons = find_neurons(model, task.example)
    slice_ = neurons.random(0.5)
    partial = Partial(neurons, slice_, classes=range(3), batch_statistics=True)
    tuned = finetune(partial, task, quick(epochs=6, learning_rate=0.1))
    assert tuned.best["validation_accuracy"] > tuned.log[0]["validation_accuracy"] + 0.2
    merged, example = tuned.model.merged(), task.example
    assert torch.equal(logits(merged, example), logits(tuned.model, example))
    frozen = ~slice_["conv1"]
    assert torch.equal(merged.norm1(merged.conv1(example))[:, frozen], model.norm1(model.conv1(example))[:, frozen])


def worker(rank: int, folder: str) -> None:
    """Be one of two processes, as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(two_epochs(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def two_epochs() -> dict[str, Tensor]:
    partial = new()
    fit(partial, tiny_task(25), quick(epochs=2, batch_size=8))
    return state(partial)


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert_equal(first, second)
    for name, tensor in two_epochs().items():
        torch.testing.assert_close(first[name], tensor, msg=name)


def test_a_copy_that_is_plain_and_whole() -> None:
    model = lively(Tiny())
    model.conv1.weight.requires_grad_(False)
    model.note = "kept"
    neurons = find_neurons(model, EXAMPLE)
    partial = Partial(neurons, neurons.random(0.5))
    merged = copy.deepcopy(partial).merged()
    assert merged.note == "kept" and not merged.conv1.weight.requires_grad and merged.conv2.weight.requires_grad
    assert_equal(state(merged), state(model))
    moving = 4 * 3 + 3 * (8 * 9 + 3)  # the weights of conv1 are frozen
    assert "conv1.weight" not in {rows.name for rows in partial.rows}
    assert partial.param_fraction == moving / sum(p.numel() for p in model.parameters())
    partial.train()
    assert partial.network.drop.training and not partial.network.norm1.training
    merged.conv1.weight.data.zero_()
    assert partial.network.conv1.weight.abs().sum() > 0


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_rows_are_taken_from_another_model(batch_statistics: bool) -> None:
    model, other = lively(Tiny()), lively(Tiny(), seed=1)
    neurons = find_neurons(model, EXAMPLE)
    partial = Partial(neurons, neurons.random(0.5), batch_statistics=batch_statistics)
    partial.take(other)
    norm, mask = partial.merged().norm1, neurons.random(0.5)["conv1"]
    assert torch.equal(norm.weight, torch.where(mask, other.norm1.weight, model.norm1.weight))
    running = other.norm1.running_var if batch_statistics else model.norm1.running_var
    assert torch.equal(norm.running_var, torch.where(mask, running, model.norm1.running_var))


def test_parameters_that_are_shared_stay_shared() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.hidden(self.second(self.first(x).relu())).relu())

    neurons = find_neurons(Net(), torch.randn(5, 4))
    partial = Partial(neurons, neurons.random(0.5))
    assert {rows.name for rows in partial.rows} == {"hidden.weight", "hidden.bias"}
    merged = partial.merged()
    assert merged.first.weight is merged.second.weight


def test_wrong_use() -> None:
    model = Tiny()
    neurons = find_neurons(model, EXAMPLE)
    with pytest.raises(TorchsliceError, match=r"nothing would move: no neuron of the slice has .* \(requires_grad"):
        Partial(neurons, neurons.none())
    with pytest.raises(TorchsliceError, match="nothing would move"):
        Partial(find_neurons(Tiny().requires_grad_(False), EXAMPLE), neurons.full(), classes=[0])
    with pytest.raises(TorchsliceError, match=r"indices in 0..2; got \[3\]"):
        Partial(neurons, neurons.full(), classes=[3])
    with pytest.raises(TorchsliceError, match="slices of different models: layer 'conv1' has 4 neurons in one and 8"):
        Partial(neurons, Slice({"conv1": torch.ones(4) > 0, "conv2": torch.ones(6) > 0}))
    model.conv2 = nn.Conv2d(8, 6, 3, padding=1)
    with pytest.raises(TorchsliceError, match="the model was changed after find_neurons: 'conv2'"):
        Partial(neurons, neurons.full())

    class Softened(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(1)

    neurons = find_neurons(Softened(), EXAMPLE)
    with pytest.raises(TorchsliceError, match="the logits do not come straight from a layer, so classes have no rows"):
        Partial(neurons, neurons.random(0.5), classes=[0])
