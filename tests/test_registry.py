"""Names that users type."""

import pytest

from torchslice.errors import TorchsliceError
from torchslice.registry import Registry, unknown


@pytest.fixture
def nets() -> Registry:
    registry = Registry("model")
    registry.register("resnet18")("a")
    registry.register("vgg16")("b")
    return registry


def test_entries_are_found_by_name_in_their_order(nets):
    assert nets["vgg16"] == "b" and "vgg16" in nets and "resnet" not in nets
    assert nets.names() == ["resnet18", "vgg16"]


def test_register_returns_what_it_decorates(nets):
    @nets.register("tiny")
    def tiny(): ...

    assert nets["tiny"] is tiny


def test_a_name_is_taken_once(nets):
    with pytest.raises(TorchsliceError, match="model 'vgg16' is registered already"):
        nets.register("vgg16")("c")
    assert nets["vgg16"] == "b"


def test_an_unknown_name_lists_the_known_and_the_closest(nets):
    with pytest.raises(TorchsliceError) as caught:
        nets["resnet81"]
    assert str(caught.value) == "unknown model 'resnet81'. Did you mean 'resnet18'? Known: resnet18, vgg16."
    with pytest.raises(TorchsliceError) as caught:
        nets["?"]
    assert str(caught.value) == "unknown model '?'. Known: resnet18, vgg16."


def test_a_long_list_of_names_is_cut_to_the_nearest():
    text = str(unknown("model", "net77x", [f"net{i}" for i in range(500)]))
    assert "Did you mean 'net77'?" in text and "500 names, the nearest: net77, " in text and len(text) < 200
