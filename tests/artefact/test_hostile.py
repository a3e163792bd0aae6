"""Files by somebody who knows the hash load as what they say, or are refused; they run and allocate nothing."""

import copy
import json
import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as to_bytes
from torch import nn

from benchmarks.fuzz import meaning, mutated
from tests.artefact.nets import Odd, Shared
from torchslice import models
from torchslice.artefact import load, read_record, save
from torchslice.artefact.blueprint import describe
from torchslice.artefact.file import _digest
from torchslice.artefact.names import name_of, resolve
from torchslice.errors import TorchsliceError
from torchslice.imports import import_timm
from torchslice.slices import Slice

SLICE = Slice({"a": torch.arange(8) < 5})


class Forger:
    """Writes files with any record and a hash that fits."""

    def __init__(self, path: Path, model: nn.Module) -> None:
        self.path = path
        save(model, path, classes=["a", "b"], slice=SLICE, metrics={"x": 1.5}, preprocessing={"mean": [0.5]})
        self.record = read_record(path)
        self.tensors = {name: t.detach().contiguous() for name, t in describe(model)[1].items()}
        self.tensors = {name: tensor.clone() for name, tensor in self.tensors.items()} | {".slice.a": SLICE["a"]}

    def write(self, record: dict[str, Any]) -> Path:
        record["sha256"] = _digest(record, self.tensors)
        self.path.write_bytes(to_bytes(self.tensors, {"torchslice": json.dumps(record)}))
        return self.path


@pytest.fixture
def forger(tmp_path: Path) -> Forger:
    return Forger(tmp_path / "m", nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Linear(4, 2)))


# -- any mutation -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "make", [Odd, Shared, lambda: models.create("lenet", width=0.2)], ids=["odd", "shared", "lenet"]
)
def test_a_mutated_record_loads_as_what_it_says_or_is_refused(tmp_path, make):
    forger, rng = Forger(tmp_path / "m", make().eval()), random.Random(0)
    memory, started, loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), 0
    for _ in range(400):
        record = mutated(forger.record, rng)
        forger.write(record)
        try:
            found = load(forger.path, allow_import=True)
        except TorchsliceError:
            continue
        assert meaning(describe(found.model)[0]) == meaning(record)
        loaded += 1
    assert 5 < loaded < 350
    assert time.process_time() - started < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000  # kB


# -- sizes ------------------------------------------------------------------------------------------------------------
def test_no_number_of_a_record_takes_memory(forger):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attributes = forger.record["modules"]["0"]["attributes"]
    attributes.update(out_channels=10**11, extra={"size": [10**11, 10**6]}, kernel_size={"tuple": [10**11, 10**11]})
    assert load(forger.write(forger.record)).model[0].out_channels == 10**11
    for change in (
        {"shape": [10**11]},
        {"strides": [10**11, 9, 3, 1]},
        {"strides": [0, 0, 0, 0]},
        {"dtype": "float64"},
    ):
        record = copy.deepcopy(forger.record)
        record["tensors"]["0.weight"].update(change)
        with pytest.raises(TorchsliceError, match="cannot load"):
            load(forger.write(record))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_modules_that_hold_themselves_or_each_other_are_refused(forger):
    for children in ({"0": ""}, {"0": "1", "1": "0"}, {"0": "1", "1": "1"}, {"0": "0", "1": "2"}):
        record = copy.deepcopy(forger.record)
        record["modules"][""]["modules"] = children
        record["modules"]["1"]["modules"] = {"x": "0"}
        with pytest.raises(TorchsliceError, match="cannot load"):
            load(forger.write(record))


def test_true_is_not_one_in_a_shape(forger):
    forger.record["tensors"]["0.weight"]["shape"][1] = True
    with pytest.raises(TorchsliceError, match=r"tensor '0.weight' should be .*True"):
        load(forger.write(forger.record))


def test_what_nothing_holds_is_refused(forger):
    del forger.record["modules"][""]["modules"]["3"]
    with pytest.raises(TorchsliceError, match=r"no module holds \['3'\]"):
        load(forger.write(forger.record))
    del forger.record["modules"]["3"]
    with pytest.raises(TorchsliceError, match=r"no module holds \['3.bias', '3.weight'\]"):
        load(forger.write(forger.record))


# -- code -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "builtins:eval",
        "torch:load",
        "torch.hub:load",
        "torch.nn.parallel.data_parallel:DataParallel",
        "torchslice.files:atomic_write",
        "torchvision.datasets:ImageFolder",
        "timmy.layers:Mlp",
        "torch.nn:Linear",
    ],
)
def test_names_outside_of_the_known_packages_need_permission(name):
    with pytest.raises(TorchsliceError, match="runs the code of the module"):
        resolve(name, allow_import=False)


@pytest.mark.parametrize(
    "name",
    [
        "torch.nn.functional:torch.load",  # through a module
        "torch.nn.functional:importlib",
        "torch.nn.functional:Tensor",
        "torch.nn.functional:has_torch_function",
        "torch.nn.modules.conv:Conv2d.forward",
        "torch.nn.modules.module:OrderedDict",
        "torch.nn.modules.lazy:warnings",
        "torch.nn.modules.module:register_module_forward_hook",
        "timm.models:load_checkpoint",  # unpickles a file
        "timm.models._helpers:load_state_dict",
        "timm.models:create_model",
        "timm.layers.create_act:_ACT_FN_DEFAULT",
        "torchvision.models:get_model",
        "torchvision.models.feature_extraction:DualGraphModule",
        "torchvision.ops.misc:torch.hub.load",
        "torchslice.models.catalogue:create",
        "torchslice.models.catalogue:import_object",
    ],
)
def test_names_inside_of_them_are_modules_and_tensor_functions_only(name):
    with pytest.raises(TorchsliceError, match="neither a network module nor a tensor function|there is no"):
        resolve(name, allow_import=False)


@pytest.mark.parametrize(
    "name",
    ["", "os", "a:b()", "os:path.__class__", "torch.nn.modules.conv:__name__", "a..b:c", "__main__:x.__y__", 3, None],
)
def test_names_of_another_form_are_refused(name):
    for allow_import in (False, True):
        with pytest.raises(TorchsliceError, match="not of the form"):
            resolve(name, allow_import=allow_import)


def test_names_that_are_written_are_read():
    layers = import_timm().layers
    for thing in (nn.Linear, torch.nn.functional.gelu, torch.nn.functional.max_pool2d, layers.Format, layers.Mlp):
        assert resolve(name_of(thing, "it"), allow_import=False) is thing


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (
            {"forward": {"name": "torch.nn.functional:relu"}},
            "'forward' is a method of ReLU, which no value may replace",
        ),
        ({"forward": {"method": "register_forward_hook"}}, "'register_forward_hook' is no method of ReLU itself"),
        ({"forward": {"method": "__call__"}}, "'__call__' cannot be the name"),
        ({"a": {"method": "forward", "name": "x"}}, "its record is not one that torchslice writes"),
        ({"__class__": 1}, "'__class__' cannot be the name"),
        ({"_parameters": {"dict": []}}, "'_parameters' cannot be the name"),
        ({"_forward_hooks": {"dict": [[0, 1]]}}, "'_forward_hooks' cannot be the name"),
        ({"training": True}, "'training' cannot be the name"),
        ({"_compiled_call_impl": {"name": "torch.nn.functional:relu"}}, "'_compiled_call_impl' cannot be the name"),
        ({"a": {"partial": [{"name": "os:system"}, ["true"], {"dict": []}]}}, "it needs 'os:system'"),
        ({"a": {"enum": ["torch.nn.modules.linear:Linear", "x"]}}, "is no sub-class of Enum"),
        ({"a": {"dtype": "load"}}, "'load' is no dtype"),
        ({"a": {"code": "print(1)"}}, "its record is not one that torchslice writes"),
        ({"a": {"tuple": [], "list": []}}, "its record is not one that torchslice writes"),
    ],
)
def test_attributes_that_are_refused(forger, attributes, message):
    forger.record["modules"]["2"]["attributes"] = attributes
    with pytest.raises(TorchsliceError, match=f"cannot load .*{message}"):
        load(forger.write(forger.record))


@pytest.mark.parametrize(
    "cls", ["torch.nn.functional:relu", "timm.layers:Format", "torch.nn.modules.linear:Bilinear.forward"]
)
def test_a_class_that_is_no_module_is_refused(forger, cls):
    forger.record["modules"]["2"]["class"] = cls
    with pytest.raises(TorchsliceError, match="is no sub-class of Module|neither a network"):
        load(forger.write(forger.record))
