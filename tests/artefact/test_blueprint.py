"""A network comes back as it was, whatever was changed in it, or is refused with the place and the reason."""

import copy
import functools
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, remove_weight_norm, weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

from tests.artefact.nets import Bare, Odd, Shared
from tests.battery.slices import SLICES
from tests.battery.zoo import NETWORKS, logits, make, prepared
from tests.nets import Tiny, lively
from torchslice import models
from torchslice.artefact import load, save
from torchslice.artefact.blueprint import describe, rebuild
from torchslice.cut.extract import extract
from torchslice.errors import TorchsliceError
from torchslice.imports import import_timm, import_torchvision

IMAGES = torch.linspace(-1, 1, 2 * 8 * 8).reshape(2, 1, 8, 8)
FOREIGN = ("mlp", "unknown", "reused", "gated", "preactivation", "two inputs", "dictionary", "answering", "tokens")
FOREIGN += ("parts", "heads")


def _attention() -> nn.Module:
    vision = import_torchvision().models.vision_transformer
    return vision.VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=5)


def _normalizer_free() -> nn.Module:
    return import_timm().create_model("dm_nfnet_f0", num_classes=5).stages[0][0].act1


#: name -> how to make the network, shape of its input
FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a method as its forward": (lambda: models.create("timm:fasternet_t0"), (1, 3, 64, 64)),
    "weak references to weights": (lambda: nn.LSTM(4, 3, 2, bidirectional=True), (2, 5, 4)),
    "buffers that are not in the state_dict": (lambda: models.create("timm:levit_128s"), (1, 3, 224, 224)),
    "a dictionary of numbers": (lambda: models.create("timm:coat_lite_tiny"), (1, 3, 224, 224)),
    "a class": (lambda: models.create("torchvision:resnet18"), (1, 3, 64, 64)),
    "a functools.partial": (_attention, (1, 3, 32, 32)),
    "a function": (_normalizer_free, (2, 3)),
}


def there_and_back(model: nn.Module, path: Path, *, allow_import: bool = True) -> nn.Module:
    save(model, path)
    return load(path, allow_import=allow_import).model


def check_equal(model: nn.Module, loaded: nn.Module) -> None:
    """The same modules with the same settings, and the same tensors in the same memory layout."""
    assert str(loaded) == str(model)
    assert describe(loaded)[0] == describe(model)[0]
    assert not any(module.training for module in loaded.modules())
    assert [*loaded.state_dict()] == [*model.state_dict()]
    for table in ("named_parameters", "named_buffers"):
        theirs = dict(getattr(loaded, table)(remove_duplicate=False))
        for name, tensor in getattr(model, table)(remove_duplicate=False):
            assert torch.equal(theirs[name], tensor) and type(theirs[name]) is type(tensor), name
            assert theirs[name].requires_grad == tensor.requires_grad, name
            assert theirs[name].stride() == tensor.stride(), name


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_comes_back(tmp_path, name, cut):
    neurons = prepared(name)
    model = extract(neurons, SLICES["half"](neurons), classes=[1, 4]) if cut else neurons.model
    loaded = there_and_back(model, tmp_path / "m", allow_import=name in FOREIGN)
    check_equal(model, loaded)
    expected = logits(model, neurons.example)
    for again in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)))[: 3 if cut else 1]:
        assert torch.equal(logits(again, neurons.example), expected)


@pytest.mark.parametrize("kind", FAMILIES)
def test_other_families_come_back(tmp_path, kind):
    build, shape = FAMILIES[kind]
    model, x = build().eval(), torch.randn(shape)
    loaded = there_and_back(model, tmp_path / "m", allow_import=False)
    check_equal(model, loaded)
    for again in (loaded, copy.deepcopy(loaded)):
        with torch.no_grad():
            results = [network(x) for network in (again, model)]
        one, other = (result[0] if isinstance(result, tuple) else result for result in results)
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["gated", "mobilenet_v2", "convnet"])
def test_a_loaded_network_trains_like_the_saved_one(tmp_path, name):
    model, example = make(name)
    for parameter in [*model.parameters()][::3]:
        parameter.requires_grad_(False)
    loaded = there_and_back(model, tmp_path / "m")
    gradients = []
    for network in (model, loaded):
        torch.manual_seed(1)
        network.train()(example).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert any(gradient is None for gradient in gradients[0])
    for one, other in zip(*gradients, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), loaded.buffers(), strict=True))


@pytest.mark.parametrize("name", ["convnet", "efficientnet_b0", "vit"])
def test_a_fresh_process_computes_the_same(tmp_path, name):
    neurons = prepared(name)
    model = extract(neurons, SLICES["half"](neurons), classes=[1, 4])
    save(model, tmp_path / "m")
    torch.save(neurons.example, tmp_path / "x")
    code = (
        "import sys, torch; torch.set_num_threads(1); from torchslice import load\n"
        "with torch.no_grad(): torch.save(load(sys.argv[1]).model(torch.load(sys.argv[2])), sys.argv[3])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "m", tmp_path / "x", tmp_path / "y"], check=True)
    assert torch.equal(torch.load(tmp_path / "y"), logits(model, neurons.example))


# -- what is kept -----------------------------------------------------------------------------------------------------
def test_every_kind_of_attribute_comes_back(tmp_path):
    model = Odd().eval()
    loaded = there_and_back(model, tmp_path / "m")
    check_equal(model, loaded)
    x = torch.randn(3, 4)
    assert torch.equal(loaded(x), model(x))
    assert list(vars(loaded)) == list(vars(model))
    assert repr(loaded.floats) == "[0.1, -0.0, inf, -inf, nan, 0.3, 3]"
    for name in ("number", "text", "nothing", "yes", "nested", "by_number", "ordered", "size", "dtype", "device"):
        assert getattr(loaded, name) == getattr(model, name)
        assert type(getattr(loaded, name)) is type(getattr(model, name))
    assert loaded.colours == model.colours and loaded.builtins == model.builtins
    assert loaded.constants[0] is loaded.constant and loaded.constants[1].requires_grad
    assert loaded.call.__self__ is loaded and loaded.layers["again"] is loaded.first


def test_what_is_shared_stays_shared(tmp_path):
    model = Shared().eval()
    loaded = there_and_back(model, tmp_path / "m")
    check_equal(model, loaded)
    assert loaded.again is loaded.block and loaded.block[1] is loaded.first
    assert loaded.block[2].weight is loaded.first.weight is loaded.block[3].weight and loaded.alias is loaded.saved
    assert loaded.absent is None and loaded.missing is None and loaded.skipped is None
    assert "unsaved" not in loaded.state_dict() and not loaded.first.bias.requires_grad
    assert torch.equal(loaded(torch.eye(4)), model(torch.eye(4)))
    assert (tmp_path / "m").stat().st_size < 10_000


def test_the_memory_layout_stays(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv3d(1, 2, 2), nn.Linear(3, 5)).eval()
    model[:2].to(memory_format=torch.channels_last)
    model[2].to(memory_format=torch.channels_last_3d)
    model[3].weight.data = torch.randn(3, 5).t()
    assert model[0].weight.stride() == (4, 1, 4, 4)  # contiguous in both formats: only the strides tell
    check_equal(model, there_and_back(model, tmp_path / "m"))
    model[3].weight.data = torch.randn(1, 3).expand(5, 3)  # not dense: its values are kept, its layout is not
    loaded = there_and_back(model, tmp_path / "m")
    assert torch.equal(loaded[3].weight, model[3].weight) and loaded[3].weight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(tmp_path, dtype):
    model = Tiny().to(dtype).train()
    loaded = there_and_back(model, tmp_path / "m")
    assert loaded.conv1.weight.dtype == dtype and not loaded.training and model.training
    assert loaded.norm1.num_batches_tracked.dtype == torch.int64


def test_views_of_one_memory_are_saved_apart(tmp_path):
    model, whole = nn.Sequential(nn.Linear(4, 2), nn.Linear(4, 2)), torch.randn(4, 4)
    model[0].weight.data, model[1].weight.data = whole[:2], whole[1:3]
    loaded = there_and_back(model, tmp_path / "m")
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(model, loaded, strict=True))


class Upside(nn.ReLU):
    """Another function in a class of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def _change_norm(model: Tiny) -> None:
    model.norm1.eps = 0.5


def _change_dilation(model: Tiny) -> None:
    model.conv1.dilation, model.conv1.padding = (2, 2), (2, 2)


def _change_padding_mode(model: Tiny) -> None:
    model.conv2 = nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular")


def _change_activation(model: Tiny) -> None:
    model.norm2 = nn.Sequential(model.norm2, nn.Hardswish())


def _change_pool(model: Tiny) -> None:
    model.norm1 = nn.Sequential(model.norm1, nn.MaxPool2d(2), nn.AvgPool2d(2))


def _change_class(model: Tiny) -> None:
    model.norm1 = nn.Sequential(model.norm1, Upside())


CHANGES = [_change_norm, _change_dilation, _change_padding_mode, _change_activation, _change_pool, _change_class]


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_after_the_constructor_is_kept(tmp_path, change):
    model = lively(Tiny())
    before = model(IMAGES)
    change(model)
    expected = model.eval()(IMAGES)
    assert not torch.allclose(expected, before, atol=1e-4), "the change shows nothing"
    loaded = there_and_back(model, tmp_path / "m")
    assert torch.equal(loaded(IMAGES), expected)
    check_equal(model, loaded)


# -- what is refused --------------------------------------------------------------------------------------------------
def _local_class() -> nn.Module:
    class Local(nn.Module):
        pass

    return nn.Sequential(Local())


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0]._forward_hooks[0] = print  # no handle, which the fixtures would follow
    return model


def _other_forward() -> nn.Module:
    model = Bare()
    model.forward = lambda x: x  # type: ignore[method-assign]
    return model


REFUSED = {
    "hook": (_hooked, r"module '0' \(Linear\): it has a hook in _forward_hooks, .* Remove it first: handle.remove\(\)"),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
        "it is parametrized.*remove_parametrizations",
    ),
    "pruned": (lambda: prune.random_unstructured(nn.Linear(2, 2), "weight", 0.5), "it has a hook.*prune.remove"),
    "forward": (_other_forward, "attribute 'forward' of the Bare: it replaces the method of the class"),
    "borrowed": (lambda: Bare(forward=nn.ReLU().forward), "attribute 'forward' of the Bare: it replaces the method"),
    "lambda": (lambda: Bare(fn=lambda x: x), "attribute 'fn' of the Bare is '<lambda>.*top of a module"),
    "nested": (lambda: Bare(a=[{"b": (object(),)}]), "attribute 'a' of the Bare: it holds a builtins.object"),
    "object": (
        lambda: Bare(config=Path()),
        r"attribute 'config' of the Bare: it holds a pathlib.*Replace it by such data",
    ),
    "partial": (lambda: Bare(a=functools.partial(lambda: 1)), "attribute 'a' of the Bare is '.*<lambda>'"),
    "method": (lambda: Bare(a=nn.ReLU().forward), "attribute 'a' of the Bare: it holds a builtins.method"),
    "hidden module": (lambda: Bare(a=[nn.Linear(2, 2)]), "attribute 'a' of the Bare: it holds a torch.nn.*Linear"),
    "local": (_local_class, r"class of module '0' \(Local\) is '_local_class.<locals>.Local'.*at the top of a module"),
    "sparse": (
        lambda: Bare(a=torch.eye(2).to_sparse()),
        "attribute 'a' of the Bare: it is a Tensor of torch.sparse_coo",
    ),
    "dunder": (lambda: Bare(**{"__class__": 2}), "'__class__' cannot be the name of an attribute"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), "'weight' is on the meta device"),
    "lazy": (lambda: nn.LazyLinear(2), "'weight' has no shape yet"),
    "wrapped": (lambda: nn.DataParallel(nn.Linear(2, 2)), r"wrapped \(DataParallel\); pass model.module"),
    "no module": (lambda: F.relu, "expected an nn.Module, got function"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_no_file_can_keep_is_named(tmp_path, case):
    build, message = REFUSED[case]
    with pytest.raises(TorchsliceError, match=message):
        save(build(), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_list_that_holds_itself_is_refused(tmp_path):
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(TorchsliceError, match="attribute 'a' of the Bare: .*nested too deep"):
        save(Bare(a=endless), tmp_path / "m")


def test_norms_of_weights_can_be_saved_once_they_are_removed(tmp_path):
    model = parametrizations.weight_norm(nn.Linear(2, 2))
    remove_parametrizations(model, "weight")
    check_equal(model.eval(), there_and_back(model, tmp_path / "m"))
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = weight_norm(nn.Linear(2, 2))
    with pytest.raises(TorchsliceError, match="remove_weight_norm"):
        save(model, tmp_path / "n")
    check_equal(remove_weight_norm(model).eval(), there_and_back(model, tmp_path / "m"))


def test_a_compiled_network_is_saved_without_its_compiled_code(tmp_path):
    model = lively(Tiny())
    expected = model(IMAGES)
    model.compile(backend="eager")
    assert torch.equal(there_and_back(model, tmp_path / "m")(IMAGES), expected)
    with pytest.raises(TorchsliceError, match=r"wrapped \(OptimizedModule\); pass model._orig_mod"):
        save(torch.compile(Tiny(), backend="eager"), tmp_path / "n")


def test_no_constructor_runs(monkeypatch):
    model = Tiny()
    blueprint, tensors = describe(model)
    for cls in (Tiny, nn.Conv2d, nn.Linear):
        monkeypatch.setattr(cls, "__init__", lambda self: pytest.fail("a constructor ran"))
    state = torch.random.get_rng_state()
    again = rebuild(blueprint, tensors, allow_import=True)
    assert again.conv1.weight.data_ptr() == model.conv1.weight.data_ptr()
    assert torch.equal(torch.random.get_rng_state(), state)
