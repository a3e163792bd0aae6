"""Gates: the values by hand, gradients against plain autograd, hooks that come and go, and folding."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from tests.training.tiny import assert_equal, state, tiny_data, tiny_net
from torch import nn

from torchslice.errors import TorchsliceError
from torchslice.modular import Gate, attach_gates, objective
from torchslice.modular.scale import position_mean, scale
from torchslice.training import fit


class Residual(nn.Module):
    """A block with a shortcut convolution, and the sum written in place over the norm's output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.conv1, self.norm1 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.short, self.short_norm = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        out = F.relu_(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.short_norm(self.short(x))
        return self.head(F.relu_(out).mean((2, 3)))


class Twice(nn.Module):
    """One convolution that runs two times, each time on what it made before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.again(x))
        x = F.relu(self.again(x))
        return self.head(x.mean((2, 3)))


class Tokens(nn.Module):
    """Linear layers over tokens, as in a transformer's MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):  # [B, T, 6]
        return self.head((x + self.down(F.relu(self.up(x)))).mean(1))


class Separable(nn.Module):
    """A depthwise convolution lives on the neurons of the convolution before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.point = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 1)
        self.norm, self.deep, self.deep_norm = (
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 6, 3, padding=1, groups=6),
            nn.BatchNorm2d(6),
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu6(self.norm(self.point(F.relu(self.stem(x)))), inplace=True)
        return self.head(F.relu6(self.deep_norm(self.deep(x)), inplace=True).mean((2, 3)))


IMAGES = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(1))
MODELS = {
    "plain": lambda: (tiny_net(), IMAGES),
    "in-place": lambda: (tiny_net(inplace=True), IMAGES),
    "no norm": lambda: (tiny_net(norm=False, inplace=True), IMAGES),
    "residual": lambda: (Residual(), IMAGES),
    "reused": lambda: (Twice(), IMAGES),
    "separable": lambda: (Separable(), IMAGES),
    "mlp": lambda: (nn.Sequential(nn.Flatten(), nn.Linear(36, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)), IMAGES),
    "tokens": lambda: (Tokens(), torch.randn(5, 4, 6)),
}


def literal(gated, x):
    """Run a gated model with plain, out-of-place autograd operations in place of the fast ones."""

    def values(gate, x):
        dims = [d for d in range(1, x.dim()) if d != gate.axis % x.dim()]
        z = x.mean(dims) if dims else x
        return torch.relu(
            torch.tanh(F.linear(F.relu(F.linear(z, gate.squeeze.weight)), gate.excite.weight, gate.excite.bias))
        )

    current, handles = {}, []
    for name, gate in zip(gated.layers, gated.gates, strict=True):
        layer = gated.neurons.layers[name]

        def read(module, inputs, name=name, gate=gate):
            current[name] = values(gate, inputs[0])

        def multiply(module, inputs, output, name=name, axis=layer.axis):
            m = current[name]
            return output * (
                m.view(*m.shape, *[1] * (output.dim() - 2)) if axis == 1 else m.unsqueeze(1) if output.dim() == 3 else m
            )

        handles.append(gated.model.get_submodule(name).register_forward_pre_hook(read))
        handles += [
            gated.model.get_submodule(n).register_forward_hook(multiply) for n in (layer.hold, *layer.followers)
        ]
    try:
        return gated.model(x)
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(0)
    model, x = MODELS[request.param]()
    gated = attach_gates(model, x)
    with torch.no_grad():
        for parameter in gated.parameters():  # some gates off, norms and biases that matter
            parameter.add_(0.4 * torch.randn_like(parameter))
    return gated, x


def test_a_gate_by_hand():
    gate = Gate(2, 1)
    with torch.no_grad():
        gate.squeeze.weight.copy_(torch.tensor([[1.0, -1.0]]))
        gate.excite.weight.fill_(0.5)
    x = torch.tensor([[[[1.0, 5.0]], [[0.0, 2.0]]], [[[0.0, 0.0]], [[4.0, 4.0]]]])  # means (3, 1) and (0, 4)
    expected = torch.tanh(torch.tensor([[0.5 * 2 + 1], [1.0]]))
    torch.testing.assert_close(gate(x), expected)
    with torch.no_grad():
        gate.excite.bias.fill_(-3)
    assert gate(x).eq(0).all()


@pytest.mark.parametrize(("neurons", "hidden"), [(5, 5), (127, 127), (128, 64), (256, 128)])
def test_a_gates_shape_and_start(neurons, hidden):
    gate = Gate(7, neurons)
    assert gate.squeeze.weight.shape == (hidden, 7) and gate.squeeze.bias is None
    assert gate.excite.weight.shape == (neurons, hidden) and gate.excite.bias.eq(1).all()
    assert gate.excite.weight.std().item() == pytest.approx((2 / hidden) ** 0.5, rel=0.35)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_outputs_and_gradients_are_those_of_plain_autograd(case, mode):
    gated, x = case
    slow, slow_x = copy.deepcopy(gated), x.clone().requires_grad_()
    x = x.clone().requires_grad_()
    for model in (gated, slow):
        model.train(mode == "train")
    weights = torch.randn(len(x), 3)
    out, expected = gated(x), literal(slow, slow_x)
    torch.testing.assert_close(out, expected)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, slow_x.grad)
    for (name, parameter), (_, other) in zip(gated.named_parameters(), slow.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)
        assert parameter.grad.ne(0).any() or "gates" not in name, f"{name} gets no gradient"
    assert_equal({n: b for n, b in gated.named_buffers()}, {n: b for n, b in slow.named_buffers()})


def test_gate_values_are_given_and_do_something(case):
    gated, x = case
    out = gated(x)
    for name in gated.layers:
        values = gated.gate_values[name]
        assert values.shape == (len(x), gated.neurons.layers[name].count)
        assert values.dtype == torch.float32 and (values >= 0).all() and (values < 1).all()
    assert not torch.allclose(out, gated.model(x), atol=1e-3)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_bf16_is_close(memory):
    gated = attach_gates(tiny_net(inplace=True), IMAGES).to(memory_format=memory).train()
    coarse = copy.deepcopy(gated)
    x = IMAGES.contiguous(memory_format=memory)
    gated(x).square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        coarse(x).float().square().sum().backward()
    for (name, p), (_, q) in zip(gated.named_parameters(), coarse.named_parameters(), strict=True):
        assert q.grad.isfinite().all()
        assert (p.grad - q.grad).norm() <= 0.1 * p.grad.norm() + 1e-2, name
    assert all(v.dtype == torch.float32 for v in coarse.gate_values.values())


def test_the_default_layers():
    assert attach_gates(tiny_net(), IMAGES).layers == ("3", "7")
    assert attach_gates(Residual(), IMAGES).layers == ("conv1", "conv2", "short")
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(36, 7), nn.ReLU(), nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 3))
    assert attach_gates(mlp, IMAGES).layers == ("1", "3")
    assert attach_gates(tiny_net(), IMAGES, layers=["0"]).layers == ("0",)


def test_a_follower_is_gated_with_its_layer():
    gated = attach_gates(Separable(), IMAGES)
    assert gated.neurons.layers["point"].followers == ("deep_norm",)
    with torch.no_grad():
        gated.gates[0].excite.bias.fill_(-50)
    seen = []
    with torch.no_grad():
        handle = gated.model.head.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
        gated(IMAGES)
        handle.remove()
    assert seen[0].eq(0).all()  # also the depthwise norm's bias


def test_a_reused_layer_is_gated_once_per_run():
    gated = attach_gates(Twice(), IMAGES)
    calls = []
    handle = gated.gates[0].register_forward_hook(lambda m, i, o: calls.append(o))
    gated(IMAGES)
    handle.remove()
    assert len(calls) == 2
    assert torch.equal(gated.gate_values["again"], torch.maximum(*calls))


def test_hooks_are_there_during_forward_only():
    model = tiny_net()
    gated = attach_gates(model, IMAGES)

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    seen = []
    handle = model[-1].register_forward_hook(lambda *a: seen.append(hooks()))
    gated(IMAGES)
    handle.remove()
    assert seen == [5] and hooks() == 0  # two gates, each with a hook before and one after, and our own
    with pytest.raises(RuntimeError):
        gated(torch.zeros(1, 2, 6, 6))
    assert hooks() == 0


def test_the_model_is_left_as_it_was():
    model = tiny_net().train()
    before = state(model)
    gated = attach_gates(model, IMAGES)
    assert gated.model is model and model.training
    assert_equal(before, state(model))
    assert all(p.grad is None for p in model.parameters())


def test_the_same_seed_gives_the_same_gates():
    one, same, other = (attach_gates(tiny_net(), IMAGES, seed=s) for s in (1, 1, 2))
    assert_equal(state(one), state(same))
    assert not torch.equal(one.gates[0].squeeze.weight, other.gates[0].squeeze.weight)


def test_it_can_be_copied_and_saved_after_use():
    gated = attach_gates(tiny_net(), IMAGES)
    out = gated(IMAGES)
    twin = copy.deepcopy(gated)
    torch.testing.assert_close(twin(IMAGES), out)
    torch.save(gated.state_dict(), io.BytesIO())


def test_a_second_backward_is_refused_not_wrong():
    loss = attach_gates(tiny_net(), IMAGES)(IMAGES).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run backward once per forward"):
        loss.backward()


def test_an_activation_rewritten_in_training_only_is_refused_not_wrong():
    model = tiny_net(inplace=True)
    model[5] = nn.Dropout(0.5, inplace=True)
    gated = attach_gates(model, IMAGES).train()
    with pytest.raises(RuntimeError, match="attach the gates to the model as it is trained"):
        gated(IMAGES).sum().backward()


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 5, 2), (3, 4, 5, 2, 2)])
def test_position_means_of_any_shape(shape):
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(position_mean(x, 1), x.flatten(2).mean(2).float() if x.dim() > 2 else x.float())
    back = x.movedim(1, -1)
    torch.testing.assert_close(position_mean(back, -1), position_mean(x, 1))


def test_scaling_without_a_gradient_for_the_activation():
    y, m = torch.randn(2, 3, 4), torch.rand(2, 3, requires_grad=True)
    weights = torch.randn(2, 3, 4)
    (scale(y.clone(), m, 1) * weights).sum().backward()
    torch.testing.assert_close(m.grad, (y * weights).sum(2))


def test_folding_nothing_drops_the_gates(case):
    gated, x = case
    gated.eval()
    before = state(gated.model)
    ones = {name: torch.ones(gated.neurons.layers[name].count) for name in gated.layers}
    assert torch.equal(gated.fold()(x), gated.model(x))
    folded = gated.fold(ones)
    assert torch.equal(folded(x), gated.model(x))
    assert_equal(before, state(gated.model))
    assert type(folded) is type(gated.model) and folded is not gated.model


def test_folding_constant_gates_is_the_gated_model(case):
    gated, x = case
    gated.eval()
    with torch.no_grad():
        for gate in gated.gates:  # values that depend on the neuron, not on the sample
            gate.excite.weight.zero_()
        out = gated(x)
    scales = {name: values[0] for name, values in gated.gate_values.items()}
    assert all((values == values[0]).all() for values in gated.gate_values.values())
    torch.testing.assert_close(gated.fold(scales)(x), out)
    assert not torch.allclose(gated.fold()(x), out, atol=1e-3)


def test_folding_what_does_not_fit_is_named():
    gated = attach_gates(tiny_net(), IMAGES)
    with pytest.raises(TorchsliceError, match="unknown gated layer '0'"):
        gated.fold({"0": torch.ones(4)})
    with pytest.raises(TorchsliceError, match=r"layer '3' has 6 neurons, its scale is \[4\]"):
        gated.fold({"3": torch.ones(4)})


def test_layers_that_cannot_be_gated_are_named():
    with pytest.raises(TorchsliceError, match=r"unknown layer 'conv9'.*Known: 0, 3, 7"):
        attach_gates(tiny_net(), IMAGES, layers=["conv9"])
    with pytest.raises(TorchsliceError, match=r"layer '13' cannot be gated because it cannot be cut: class scores"):
        attach_gates(tiny_net(), IMAGES, layers=["13"])
    with pytest.raises(TorchsliceError, match="no layer to gate"):
        attach_gates(tiny_net(), IMAGES, layers=[])


def test_modular_training_learns_and_separates():
    data = tiny_data(48)
    gated = attach_gates(tiny_net(inplace=True), data.example)
    rows = fit(gated, data, objective=objective(), epochs=6, batch_size=12, device="cpu", progress=False)
    first, last = rows[0], rows[-1]
    assert {"loss", "cross_entropy", "cohesion", "coupling"} < last.keys()
    parts = last["cross_entropy"] + 0.5 * last["cohesion"] + 1.5 * last["coupling"]
    assert last["loss"] == pytest.approx(parts) and last["loss"] < first["loss"]


def test_the_objective_wants_gates_and_weights():
    with pytest.raises(TorchsliceError, match="got Sequential; make one with attach_gates"):
        objective()(tiny_net(), IMAGES, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(TorchsliceError, match="coupling_weight must be 0 or more, got -1"):
        objective(coupling_weight=-1)
    assert repr(objective(0.1, 0.2)) == "objective(cohesion_weight=0.1, coupling_weight=0.2)"
