"""Weights from elsewhere: all of them fit, or nothing is changed."""

import copy
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from torchslice.artefact import save
from torchslice.errors import TorchsliceError
from torchslice.models import create, load_weights


def make(seed: int, **arguments) -> nn.Module:
    torch.manual_seed(seed)
    return create("convnet", width=0.1, **arguments)


def equal(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


@pytest.fixture
def trained() -> nn.Module:
    model = make(1)
    model.train()(torch.randn(4, 3, 8, 8))
    return model


WRITERS = {
    "safetensors": lambda model, path: save_file(model.state_dict(), path.with_suffix(".safetensors")),
    "state_dict": lambda model, path: torch.save(model.state_dict(), path),
    "old zip": lambda model, path: torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False),
    "checkpoint": lambda model, path: torch.save({"epoch": 3, "state_dict": model.state_dict()}, path),
    "model": lambda model, path: torch.save({"optimizer": {}, "model": model.state_dict()}, path),
    "model_state_dict": lambda model, path: torch.save({"model_state_dict": model.state_dict(), "model": "x"}, path),
    "DataParallel": lambda model, path: torch.save(nn.DataParallel(model).state_dict(), path),
    "compiled": lambda model, path: torch.save(torch.compile(model, backend="eager").state_dict(), path),
    "compiled in parallel": lambda model, path: torch.save(
        {f"module._orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}, path
    ),
    "half": lambda model, path: torch.save(copy.deepcopy(model).double().state_dict(), path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_weights_are_found_however_they_were_written(tmp_path, trained, kind):
    WRITERS[kind](trained, tmp_path / "weights.pt")
    model = make(2)
    assert not equal(model, trained)
    load_weights(model, next(tmp_path.iterdir()))
    assert equal(model, trained) and model.classifier.weight.dtype == torch.float32


def test_a_network_whose_own_names_begin_like_a_wrapper(tmp_path):
    one, other = (nn.Sequential() for _ in range(2))
    for seed, model in enumerate((one, other)):
        model.add_module("module", make(seed))
    torch.save(one.state_dict(), tmp_path / "w.pt")
    load_weights(other, tmp_path / "w.pt")
    assert equal(one, other)


def test_counters_that_old_files_lack_keep_their_value(tmp_path, trained):
    state = {name: tensor for name, tensor in trained.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "w.pt")
    model = make(2)
    load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model.classifier.weight, trained.classifier.weight)


def _without(model: nn.Module) -> dict:
    return {name: tensor for name, tensor in model.state_dict().items() if name != "classifier.bias"}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            lambda: make(1, num_classes=7).state_dict(),
            r"do not fit the network: 'classifier.weight' is \[7, 13\] in the file and \[10, 13\] in the network. "
            "Give the MODEL that was trained, with its number of classes and arguments. Nothing was changed",
        ),
        (lambda: _without(make(1)), r"'classifier.bias' is absent in the file and \[10\] in the network"),
        (
            lambda: {**make(1).state_dict(), "head.weight": torch.ones(2)},
            r"'head.weight' is \[2\] in the file and absent in the network",
        ),
        (lambda: {**make(1).state_dict(), "extra": None}, "'extra' is NoneType in the file and absent in the network"),
        (lambda: {"epoch": 3, "weights": {}}, r"holds the keys \['epoch', 'weights'\] and no state_dict"),
        (lambda: [torch.ones(2)], "holds a list and no state_dict, neither itself nor under 'state_dict'"),
        (lambda: {"state_dict": {"a": 1}}, "and no state_dict"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path, state, message):
    torch.save(state(), tmp_path / "w.pt")
    model = make(2)
    before = copy.deepcopy(model)
    with pytest.raises(TorchsliceError, match=message):
        load_weights(model, tmp_path / "w.pt")
    assert equal(model, before)


def test_files_that_hold_code_or_nothing(tmp_path, trained):
    torch.save(trained, tmp_path / "whole.pt")
    with pytest.raises(TorchsliceError, match=r"whole.pt is not a file of tensors alone .*model.state_dict\(\), path"):
        load_weights(make(2), tmp_path / "whole.pt")
    with pytest.raises(TorchsliceError, match=r"there is no file .*missing.pt; give a .safetensors file"):
        load_weights(make(2), tmp_path / "missing.pt")
    (tmp_path / "w.safetensors").write_bytes(b"half")
    with pytest.raises(TorchsliceError, match="is not a whole safetensors file"):
        load_weights(make(2), tmp_path / "w.safetensors")
    save(trained, tmp_path / "a.safetensors")
    with pytest.raises(TorchsliceError, match="holds a whole network that torchslice saved; use torchslice.load"):
        load_weights(make(2), tmp_path / "a.safetensors")


def test_damaged_files_are_refused(tmp_path: Path, trained):
    torch.save(trained.state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    whole, rng = (tmp_path / "w.pt").read_bytes(), random.Random(0)
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(3):
            content[rng.randrange(2000)] = rng.randrange(256)
        (tmp_path / "w.pt").write_bytes(content)
        try:
            load_weights(make(2), tmp_path / "w.pt")
        except TorchsliceError:
            continue
