"""Networks by name: shapes, parameter counts and what happens with bad names."""

import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from torchslice import models
from torchslice.errors import TorchsliceError

BUILT_IN = ("convnet", "fast", "lenet", "simcnn", "rescnn", "vgg16", "resnet18", "resnet20", "mobilenet")


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def convolutions(*channels: int, kernel: int = 3) -> int:
    """Parameters of a chain of convolutions with bias."""
    return sum(a * b * kernel**2 + b for a, b in pairwise(channels))


def test_names_lists_every_network():
    assert models.names() == list(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28), (1, 8)])
def test_logits_have_one_column_per_class(name, channels, size):
    model = models.create(name, num_classes=7, channels=channels, width=0.125).eval()
    assert model(torch.randn(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_new_network_passes_signal_and_gradient_to_its_first_layer(name):
    model = models.create(name, width=0.25).train()
    logits = model(torch.randn(8, 3, 32, 32))
    assert logits.std() > 1e-3 and logits.isfinite().all()
    logits.logsumexp(1).sum().backward()
    assert next(p for p in model.parameters() if p.requires_grad).grad.abs().max() > 0


VGG_CHANNELS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
RESCNN_CHANNELS = (3, 64, 128, 128, 128, 256, 512, 512, 512, 512, 512, 512, 512)
HIDDEN = 2 * (512 * 512 + 512)
HEAD = 512 * 10 + 10


@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [
        ("resnet18", {}, 11_173_962),
        ("resnet20", {}, 272_474),
        ("mobilenet", {}, 3_217_226),
        ("vgg16", {}, 15_253_578),
        ("vgg16", {}, convolutions(*VGG_CHANNELS) + 2 * sum(VGG_CHANNELS[1:]) + HIDDEN + HEAD),
        ("lenet", {"channels": 1}, 61_706),
        ("simcnn", {}, 15_253_578),
        ("simcnn", {"batch_norm": False}, convolutions(*VGG_CHANNELS) + HIDDEN + HEAD),
        ("rescnn", {"batch_norm": False}, convolutions(*RESCNN_CHANNELS) + HEAD),
        ("rescnn", {}, convolutions(*RESCNN_CHANNELS) + 2 * sum(RESCNN_CHANNELS[1:]) + HEAD),
        ("fast", {}, 24 * 13 + 9 * (24 * 64 + 64**2 + 64 * 128 + 3 * 128**2) + 4 * (64 + 2 * 128) + 128 * 10 + 10),
        ("convnet", {}, convolutions(3, 32, 32, 64, 64, 128, 128) + 2 * 448 + 128 * 10 + 10),
    ],
)
def test_parameters_are_those_of_the_published_networks(name, arguments, parameters):
    with torch.device("meta"):
        assert count(models.create(name, **arguments)) == parameters


def test_rescnn_adds_the_input_of_a_pair_after_its_last_relu():
    model = models.create("rescnn", width=0.1, batch_norm=False).eval()
    pair = model.features[3]
    x = torch.randn(1, 13, 4, 4)
    assert torch.equal(pair(x), x + pair.body(x)) and pair.body(x).min() == 0


def test_batch_norm_is_in_both_or_in_neither():
    for name in ("simcnn", "rescnn"):
        for wanted in (True, False):
            model = models.create(name, width=0.05, batch_norm=wanted)
            norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
            assert norms == (sum(isinstance(module, nn.Conv2d) for module in model.modules()) if wanted else 0)


def test_shortcuts_are_convolutions_with_norm_only_where_the_shape_changes():
    model = models.create("resnet20", width=0.25)
    shortcuts = [block.shortcut for stage in model.stages for block in stage]
    assert [isinstance(shortcut, nn.Identity) for shortcut in shortcuts] == [True] * 3 + [False, True, True] * 2
    assert shortcuts[3][0].kernel_size == (1, 1) and isinstance(shortcuts[3][1], nn.BatchNorm2d)


def test_the_seed_decides_the_weights():
    def weights() -> torch.Tensor:
        torch.manual_seed(3)
        return nn.utils.parameters_to_vector(models.create("convnet").parameters())

    assert torch.equal(weights(), weights())


@pytest.mark.parametrize(
    ("spec", "arguments"),
    [
        ("resnet20", {"num_classes": 4, "width": 0.5, "channels": 1}),
        ("torchvision:mobilenet_v2", {"num_classes": 4, "width_mult": 0.25}),
        ("timm:resnet10t", {"num_classes": 4, "in_chans": 1}),
    ],
)
def test_networks_of_other_libraries_take_their_own_arguments(spec, arguments):
    model = models.create(spec, **arguments)
    images = torch.randn(2, arguments.get("channels", arguments.get("in_chans", 3)), 32, 32)
    assert model.eval()(images).shape == (2, 4)
    assert not hasattr(model, "origin"), "nothing is put on a network"


def test_a_function_of_the_user_makes_the_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "own_models.py").write_text(
        "from torch import nn\n"
        "def tiny(num_classes, hidden=4): return nn.Sequential(nn.Linear(2, hidden), nn.Linear(hidden, num_classes))\n"
        "def wrong(num_classes): return num_classes\n"
    )
    try:
        model = models.create("own_models:tiny", num_classes=3, hidden=5)
        assert model(torch.randn(1, 2)).shape == (1, 3)
        assert model[0].out_features == 5
        with pytest.raises(
            TorchsliceError, match="'own_models:wrong' returned a int; it must return a torch.nn.Module"
        ):
            models.create("own_models:wrong")
    finally:
        sys.modules.pop("own_models", None)


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        ("resnet19", {}, "unknown model 'resnet19'. Did you mean 'resnet18'? Known: convnet, fast, lenet, "),
        ("torchvision:resnet19", {}, "unknown torchvision model 'resnet19'. Did you mean 'resnet18'?"),
        ("timm:resnet18x", {}, "unknown timm model 'resnet18x'. Did you mean 'resnet18'?"),
        (
            "vgg16",
            {"widht": 2},
            "model 'vgg16': got an unexpected keyword argument 'widht'. It takes: num_classes=10, ",
        ),
        ("torchvision:resnet18", {"widht": 2}, "model 'torchvision:resnet18': "),
        ("timm:resnet18", {"pretrained": True}, "model 'timm:resnet18': "),
        ("json:dumbs", {}, "unknown name in module json: 'dumbs'. Did you mean 'dumps'?"),
        ("resnet18", {"num_classes": 0}, "at least 1 class, got num_classes=0"),
        *((name, {"channels": 0}, "images have at least 1 channel, got channels=0") for name in ("lenet", "mobilenet")),
    ],
)
def test_bad_names_and_arguments_are_explained(spec, arguments, message):
    with pytest.raises(TorchsliceError) as caught:
        models.create(spec, **arguments)
    assert message in str(caught.value) and len(str(caught.value)) < 2000
