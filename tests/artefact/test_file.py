"""What a file holds beside the network, and files that cannot be written or read."""

import errno
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.artefact.nets import Odd
from tests.nets import Tiny, lively
from torchslice import models
from torchslice.artefact import load, read_record, save
from torchslice.artefact.file import _digest
from torchslice.errors import TorchsliceError
from torchslice.slices import Slice

SLICE = Slice({"conv1": torch.arange(8) < 5, "conv2": torch.arange(6) % 2 == 0})
PREPROCESSING = {"mean": [0.5], "std": [0.25], "input_shape": [1, 8, 8]}


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    return models.create("convnet", num_classes=2, channels=1, width=0.1).eval()


@pytest.fixture
def file(tmp_path: Path, small: nn.Module) -> Path:
    save(small, tmp_path / "a" / "small.safetensors", classes=["red", "blue"], slice=SLICE)
    return tmp_path / "a" / "small.safetensors"


def rewrite(path: Path, change=lambda record: None, *, drop: str = "", forge: bool = False) -> None:
    """Write a file again with another record or without a tensor; `forge` gives it a new hash."""
    record, tensors = read_record(path), load_file(path)
    tensors.pop(drop, None)
    change(record)
    if forge:
        record["sha256"] = _digest(record, tensors)
    save_file(tensors, path, {"torchslice": json.dumps(record)})


# -- beside the network -----------------------------------------------------------------------------------------------
def test_an_artefact_says_what_it_is(tmp_path):
    extras = {"preprocessing": PREPROCESSING, "metrics": {"accuracy": 0.5}, "extension": {"tasks": [["a"], ["b"]]}}
    save(lively(Tiny(2)), tmp_path / "m", classes=("red", "blue"), slice=SLICE, **extras)
    found = load(tmp_path / "m", allow_import=True)
    assert (found.classes, found.slice) == (("red", "blue"), SLICE)
    assert (found.preprocessing, found.metrics, found.extension) == tuple(extras.values())
    assert found.versions.keys() == {"python", "torchslice", "torch"} and found.versions["torch"] == torch.__version__
    assert repr(found) == "Artefact(Tiny with 560 parameters, classes red, blue)"
    record = read_record(tmp_path / "m")
    assert record["metrics"] == {"accuracy": 0.5} and record["slice"] == ["conv1", "conv2"]
    assert record["modules"]["conv2"]["attributes"]["kernel_size"] == {"tuple": [3, 3]}


def test_nothing_but_the_network_is_needed(tmp_path, small):
    save(small, tmp_path / "m")
    found = load(tmp_path / "m")
    assert {found.classes, found.preprocessing, found.slice, found.metrics, found.extension} == {None}
    assert not any(hasattr(found.model, name) for name in ("classes", "preprocessing", "origin", "extension"))
    assert repr(found) == "Artefact(ConvNet with 2,977 parameters, no class names)"


@dataclass
class Result:
    model: nn.Module
    classes: tuple[str, ...] = ("red", "blue")
    slice: Slice = SLICE
    preprocessing: dict = field(default_factory=lambda: PREPROCESSING)


def test_a_result_brings_what_it_knows(tmp_path, small):
    save(Result(small), tmp_path / "m", classes=["blue", "red"], metrics={"a": 1})
    found = load(tmp_path / "m")
    assert (found.classes, found.slice, found.preprocessing) == (("blue", "red"), SLICE, PREPROCESSING)
    save(found, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "m").read_bytes()


def test_the_same_content_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        torch.manual_seed(0)
        save(Odd(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_weights_do_not_change_with_the_file(file, small):
    loaded = load(file).model
    content = bytearray(file.read_bytes())
    content[-1000:] = bytes(1000)
    with file.open("r+b") as same:  # in place, where the file may be mapped into memory
        same.write(content)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), loaded.parameters(), strict=True))


def test_other_code_is_imported_only_with_permission(tmp_path):
    save(Tiny(), tmp_path / "m")
    with pytest.raises(
        TorchsliceError, match=r"needs 'tests.nets:Tiny'.*runs the code of the module tests.nets.*=True"
    ):
        load(tmp_path / "m")
    assert type(load(tmp_path / "m", allow_import=True).model) is Tiny


def test_a_class_of_the_running_script_is_named_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(Tiny, "__module__", "__main__")
    monkeypatch.setattr("__main__.Tiny", Tiny, raising=False)
    save(Tiny(), tmp_path / "m")
    assert type(load(tmp_path / "m", allow_import=True).model) is Tiny
    monkeypatch.delattr("__main__.Tiny")
    with pytest.raises(TorchsliceError, match="unknown name in module __main__: 'Tiny'"):
        load(tmp_path / "m", allow_import=True)


def test_an_error_names_versions_that_differ(file):
    def old(record):
        record["modules"]["pool"]["class"] = "torch.nn.modules.pooling:Vanished"
        record["versions"]["torch"] = "1.2.3"

    rewrite(file, old, forge=True)
    message = (
        rf"there is no '.*Vanished' in the torch .*\. It was saved with torch 1.2.3 \(here {torch.__version__[:4]}"
    )
    with pytest.raises(TorchsliceError, match=message):
        load(file)


# -- files that cannot be loaded ----------------------------------------------------------------------------------
def test_missing_file(tmp_path):
    with pytest.raises(TorchsliceError, match=r"there is no file .*nowhere; give a file that torchslice saved"):
        load(tmp_path / "nowhere")
    with pytest.raises(TorchsliceError, match="there is no file"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"these are not the tensors you are looking for", b"\x80\x04pickle" * 10])
def test_something_else(tmp_path, content):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(TorchsliceError, match="is not a whole safetensors file"):
        load(tmp_path / "m")


@pytest.mark.parametrize("text", [None, "half a record {", "{}", "[2]", "2", "[" * 100_000])
def test_safetensors_of_another_program(tmp_path, text):
    save_file({"weight": torch.ones(2)}, tmp_path / "m", None if text is None else {"torchslice": text})
    with pytest.raises(TorchsliceError, match="is a safetensors file of another program"):
        load(tmp_path / "m")


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.01])
def test_truncated(file, keep):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(TorchsliceError, match=r"is not a whole safetensors file .*copy it once more"):
        load(file)


def test_every_flipped_byte_is_found(file):
    content = bytearray(file.read_bytes())
    for place in [*range(0, len(content), len(content) // 197), len(content) - 1]:
        content[place] ^= 1
        file.write_bytes(content)
        for read in (load, read_record):
            with pytest.raises(TorchsliceError):
                read(file)
        content[place] ^= 1
    content[-1] ^= 128
    file.write_bytes(content)
    with pytest.raises(TorchsliceError, match="its content does not match its hash"):
        load(file)


def test_a_changed_record_or_a_missing_tensor(file):
    whole = file.read_bytes()
    for changes in ({"drop": "classifier.bias"}, {"change": lambda record: record.update(classes=["blue", "red"])}):
        file.write_bytes(whole)
        rewrite(file, **changes)
        with pytest.raises(TorchsliceError, match="its content does not match its hash"):
            load(file)
    file.write_bytes(whole)
    rewrite(file, drop="classifier.bias", forge=True)
    with pytest.raises(TorchsliceError, match=r"'classifier.bias' should be \['float32', \[2\]\] and is absent"):
        load(file)


def test_another_format(file):
    rewrite(file, lambda record: record.update(format_version=1))
    with pytest.raises(TorchsliceError, match="has format version 1, and this torchslice reads 3; load it with"):
        load(file)


# -- files that cannot be saved -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metrics": {"accuracy": torch.ones(())}}, "Tensor is not JSON serializable.*dictionaries of plain data"),
        ({"metrics": [1]}, r"metrics is \[1\].*dictionaries of plain data"),
        ({"preprocessing": "none"}, "preprocessing is 'none'"),
        ({"classes": ["a", "a"]}, r"classes are \['a', 'a'\].*different names"),
        ({"classes": "ab"}, "classes are ab.*different names"),
        ({"classes": [1, 2]}, r"classes are \[1, 2\]"),
        ({"slice": {"conv1": [1]}}, "slice must be a Slice, got dict"),
    ],
)
def test_only_plain_data_is_saved(tmp_path, small, given, message):
    with pytest.raises(TorchsliceError, match=message):
        save(small, tmp_path / "m", **given)
    assert not list(tmp_path.iterdir())


def test_a_kind_of_number_that_safetensors_does_not_take(tmp_path, monkeypatch, small):
    def refuse(*arguments):
        raise KeyError("float3")

    monkeypatch.setattr("torchslice.artefact.file.to_bytes", refuse)
    with pytest.raises(TorchsliceError, match="safetensors does not take its tensors .*float3"):
        save(small, tmp_path / "m")


def test_unwritable_folder(tmp_path, small):
    (tmp_path / "file").touch()
    with pytest.raises(TorchsliceError, match=r"cannot write .*file/m"):
        save(small, tmp_path / "file" / "m")


def test_full_disk_leaves_the_old_file(file, small, monkeypatch):
    before = file.read_bytes()

    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as half:
            half.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(TorchsliceError, match=r"cannot write .*No space left on device"):
        save(small, file)
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]
