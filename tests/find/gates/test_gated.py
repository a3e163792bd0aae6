"""Gates: the values by hand, masks against plain operations, hooks that come and go, and folding."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.nets import tiny_net, tiny_task
from torchslice import models
from torchslice.errors import TorchsliceError
from torchslice.find.gates import attach, objective
from torchslice.find.gates.gated import Gate
from torchslice.graph.find import find_neurons
from torchslice.inputs import call_model
from torchslice.training import Training, fit

from .nets import Named, Residual, Separable, Tokens, Twice

IMAGES = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1))
NAMED = {"pixels": IMAGES, "age": torch.arange(5.0)[:, None]}
MODELS = {
    "plain": (tiny_net, IMAGES),
    "in-place": (lambda: tiny_net(inplace=True), IMAGES),
    "no norm": (lambda: tiny_net(norm=False, inplace=True), IMAGES),
    "residual": (Residual, IMAGES),
    "reused": (Twice, IMAGES),
    "separable": (Separable, IMAGES),
    "mlp": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)), IMAGES),
    "tokens": (Tokens, TOKENS),
    "named": (Named, NAMED),
}


def scores(result):
    return result["scores"] if isinstance(result, dict) else result


def gates_on(model, inputs=IMAGES, **arguments):
    return attach(find_neurons(model, inputs, output=scores), **arguments)


def literal(gated, inputs):
    """Run a gated model with masks that are written out for each kind of layer."""
    current, handles = {}, []
    for name, gate in zip(gated.layers, gated.gates, strict=True):
        layer = gated.neurons.layers[name]

        def read(module, args, name=name, gate=gate):
            x = args[0]
            z = (
                x
                if x.dim() == 2
                else x.sum(1) / x.shape[1]
                if gate.axis == -1
                else x.flatten(2).sum(2) / x[0, 0].numel()
            )
            h = F.relu(F.linear(z, gate.squeeze.weight))
            current[name] = torch.relu(torch.tanh(F.linear(h, gate.excite.weight, gate.excite.bias)))

        def multiply(module, args, output, name=name, axis=layer.axis):
            m = current[name]
            if output.dim() == 2:
                return output * m
            return output * (m.unsqueeze(1) if axis == -1 else m[:, :, None, None])

        handles.append(gated.model.get_submodule(name).register_forward_pre_hook(read))
        places = (layer.mask_after, *layer.followers)
        handles += [gated.model.get_submodule(place).register_forward_hook(multiply) for place in places]
    result = call_model(gated.model, inputs)
    for handle in handles:
        handle.remove()
    return result


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(0)
    make, inputs = MODELS[request.param]
    gated = gates_on(make(), inputs)
    with torch.no_grad():
        for parameter in gated.parameters():  # some gates off, norms and biases that matter
            parameter.add_(0.4 * torch.randn_like(parameter))
    return gated, inputs


def test_a_gate_by_hand():
    gate = Gate(2, 1)
    with torch.no_grad():
        gate.squeeze.weight.copy_(torch.tensor([[1.0, -1.0]]))
        gate.excite.weight.fill_(0.5)
    x = torch.tensor([[[[1.0, 5.0]], [[0.0, 2.0]]], [[[0.0, 0.0]], [[4.0, 4.0]]]])  # means (3, 1) and (0, 4)
    torch.testing.assert_close(gate(x), torch.tanh(torch.tensor([[0.5 * 2 + 1], [1.0]])))


@pytest.mark.parametrize(("neurons", "hidden"), [(127, 127), (128, 64), (512, 256)])
def test_gates_have_the_size_and_start_of_the_paper(neurons, hidden):
    gate = Gate(7, neurons)
    assert gate.squeeze.weight.shape == (hidden, 7) and gate.squeeze.bias is None
    assert gate.excite.weight.shape == (neurons, hidden) and gate.excite.bias.eq(1).all()
    assert gate.excite.weight.std().item() == pytest.approx((2 / hidden) ** 0.5, rel=0.35)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_outputs_and_gradients_are_those_of_masks_written_out(case, mode):
    gated, inputs = case
    slow = copy.deepcopy(gated.train(mode == "train"))
    out, expected = scores(call_model(gated, inputs)), scores(literal(slow, inputs))
    torch.testing.assert_close(out, expected)
    weights = torch.randn(5, 3)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, parameter), (_, other) in zip(gated.named_parameters(), slow.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)
        assert parameter.grad.ne(0).any() or "gates" not in name, f"{name} gets no gradient"
    for (name, one), (_, other) in zip(gated.named_buffers(), slow.named_buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_activations_in_place_change_nothing(name):
    images, results = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)), []
    for inplace in (True, False):
        torch.manual_seed(0)
        model = models.create(name, num_classes=10, width=0.125).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.ReLU):
                module.inplace = inplace
        gated = gates_on(model, images[:2])
        gated(images).square().sum().backward()
        results.append([parameter.grad for parameter in gated.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_gate_values_are_given_and_do_something(case):
    gated, inputs = case
    out = scores(call_model(gated, inputs))
    for name in gated.layers:
        values = gated.gate_values[name]
        assert values.shape == (5, gated.neurons.layers[name].count) and values.dtype == torch.float32
        assert (values >= 0).all() and (values < 1).all()
    assert not torch.allclose(out, scores(call_model(gated.model, inputs)), atol=1e-3)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_bf16_is_close(memory):
    gated = gates_on(tiny_net(inplace=True)).to(memory_format=memory).train()
    coarse, x = copy.deepcopy(gated), IMAGES.contiguous(memory_format=memory)
    gated(x).square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        coarse(x).float().square().sum().backward()
    for (name, p), (_, q) in zip(gated.named_parameters(), coarse.named_parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 0.1 * p.grad.norm() + 1e-2, name
    assert all(v.dtype == torch.float32 for v in coarse.gate_values.values())


def test_the_default_layers():
    assert gates_on(tiny_net()).layers == ("3", "7")
    assert gates_on(Residual()).layers == ("conv1", "conv2", "short")
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(36, 7), nn.ReLU(), nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 3))
    assert gates_on(mlp).layers == ("1", "3")
    assert gates_on(tiny_net(), layers=["0"]).layers == ("0",)


def test_a_follower_is_gated_with_its_layer():
    gated, seen = gates_on(Separable()), []
    assert gated.neurons.layers["point"].followers == ("deep_norm",)
    handle = gated.model.head.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        gated.gates[0].excite.bias.fill_(-50)
        gated(IMAGES)
    handle.remove()
    assert seen[0].eq(0).all()  # also the depthwise norm's bias


def test_a_reused_layer_is_gated_once_per_run():
    gated, calls = gates_on(Twice()), []
    handle = gated.gates[0].register_forward_hook(lambda m, args, out: calls.append(out))
    gated(IMAGES)
    handle.remove()
    assert len(calls) == 2 and torch.equal(gated.gate_values["again"], torch.maximum(*calls))


def test_hooks_are_there_during_forward_only():
    model = tiny_net()
    gated, seen = gates_on(model), []

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    handle = model[-1].register_forward_hook(lambda *a: seen.append(hooks()))
    gated(IMAGES)
    handle.remove()
    assert seen == [5] and hooks() == 0  # two gates, each with a hook before and one after, and our own
    with pytest.raises(RuntimeError):
        gated(torch.zeros(1, 2, 6, 6))
    assert hooks() == 0


def test_the_same_seed_gives_the_same_gates_and_the_model_is_kept():
    model = tiny_net().train()
    one, same, other = (gates_on(net, seed=s) for net, s in ((model, 1), (tiny_net(), 1), (tiny_net(), 2)))
    assert one.model is model and one.training
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.gates[0].squeeze.weight, other.gates[0].squeeze.weight)


def test_a_copy_after_use_has_neurons_of_its_own():
    gated = gates_on(tiny_net()).eval()
    out = gated(IMAGES)
    twin = copy.deepcopy(gated)
    torch.testing.assert_close(twin(IMAGES), out)
    assert twin.neurons.model is twin.model is not gated.model
    twin.neurons.check_unchanged()
    with torch.no_grad():
        twin.model[0].weight.zero_()
    assert torch.equal(gated(IMAGES), out) and not torch.equal(twin.neurons.logits(IMAGES), gated.model(IMAGES))
    torch.save(gated.state_dict(), io.BytesIO())


def test_folding_nothing_drops_the_gates(case):
    gated, inputs = case
    gated.eval()
    before = {name: tensor.clone() for name, tensor in gated.model.state_dict().items()}
    ones = {name: torch.ones(gated.neurons.layers[name].count) for name in gated.layers}
    for folded in (gated.fold(), gated.fold(ones)):
        assert torch.equal(scores(call_model(folded, inputs)), scores(call_model(gated.model, inputs)))
        assert type(folded) is type(gated.model) and folded is not gated.model
    assert all(torch.equal(tensor, before[name]) for name, tensor in gated.model.state_dict().items())


def test_folding_constant_gates_is_the_gated_model(case):
    gated, inputs = case
    gated.eval()
    with torch.no_grad():
        for gate in gated.gates:  # values that depend on the neuron, not on the sample
            gate.excite.weight.zero_()
        out = scores(call_model(gated, inputs))
    scales = {name: values[0] for name, values in gated.gate_values.items()}
    torch.testing.assert_close(scores(call_model(gated.fold(scales), inputs)), out)
    assert not torch.allclose(scores(call_model(gated.fold(), inputs)), out, atol=1e-3)


def test_what_cannot_be_gated_or_folded_is_named():
    gated = gates_on(tiny_net())
    with pytest.raises(TorchsliceError, match="unknown gated layer '0'"):
        gated.fold({"0": torch.ones(4)})
    with pytest.raises(TorchsliceError, match=r"layer '3' has 6 neurons, its scale is \[4\]"):
        gated.fold({"3": torch.ones(4)})
    with pytest.raises(TorchsliceError, match=r"unknown layer 'conv9'.*Known: 0, 3, 7"):
        gates_on(tiny_net(), layers=["conv9"])
    with pytest.raises(TorchsliceError, match="layer '13' cannot be gated because it cannot be cut"):
        gates_on(tiny_net(), layers=["13"])
    with pytest.raises(TorchsliceError, match="no layer to gate"):
        gates_on(tiny_net(), layers=[])


def test_training_with_gates_learns_and_separates():
    task = tiny_task(48)
    gated = gates_on(tiny_net(inplace=True), task.example)
    training = Training(epochs=6, batch_size=12, device="cpu", precision="fp32", progress=False)
    rows = fit(gated, task, training, objective=objective())
    first, last = rows[0], rows[-1]
    parts = last["cross_entropy"] + 0.5 * last["cohesion"] + 1.5 * last["coupling"]
    assert last["loss"] == pytest.approx(parts) and last["loss"] < first["loss"]


def test_the_objective_takes_any_inputs_and_smooths_labels():
    gated, labels = gates_on(Named(), NAMED), torch.tensor([0, 1, 2, 0, 1])
    loss, correct, parts = objective(0, 0, label_smoothing=0.1)(gated, NAMED, labels)
    logits = scores(gated(**NAMED))
    assert torch.equal(correct, logits.argmax(1) == labels)
    assert loss.item() == parts["cross_entropy"].item()
    assert loss.item() == pytest.approx(F.cross_entropy(logits, labels, label_smoothing=0.1).item())


def test_the_objective_wants_gates_and_weights():
    with pytest.raises(TorchsliceError, match=r"got Sequential; make one with gates.attach\(neurons\)"):
        objective()(tiny_net(), IMAGES, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(TorchsliceError, match="coupling_weight must be 0 or more, got -1"):
        objective(coupling_weight=-1)
    with pytest.raises(TorchsliceError, match=r"label_smoothing must be in \[0, 1\), got 1"):
        objective(label_smoothing=1)
    assert repr(objective(0.1, 0.2)) == "objective(cohesion_weight=0.1, coupling_weight=0.2, label_smoothing=0.0)"
