import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from torchslice import models
from torchslice.core.find import find_neurons
from torchslice.errors import TorchsliceError
from torchslice.slices import Slice
from torchslice.use.artefacts import _digest, load, read_record, save
from torchslice.use.extract import extract

from .nets import Tied, Tiny, lively

IMAGES = torch.linspace(-1, 1, 2 * 8 * 8).reshape(2, 1, 8, 8)
PART = Slice({"conv1": torch.arange(8) < 5, "conv2": torch.arange(6) % 2 == 0})


def made(name: str = "tests.use.nets:tiny", **arguments) -> nn.Module:
    return lively(models.create(name, **arguments))


@pytest.fixture
def small() -> nn.Module:
    return extract(made(num_classes=3), PART, IMAGES, classes=[0, 2])


@pytest.fixture
def file(tmp_path: Path, small: nn.Module) -> Path:
    save(small, tmp_path / "a" / "small.safetensors", classes=["red", "blue"], slice=PART)
    return tmp_path / "a" / "small.safetensors"


def rewrite(path: Path, change=lambda record: None, drop: str = "") -> None:
    """Write a file again with another record or without a tensor, as a hand that knows no hash would."""
    record, tensors = read_record(path), load_file(path)
    change(record)
    save_file({n: t for n, t in tensors.items() if n != drop}, path, {"torchslice": json.dumps(record)})


def rewrite_with_hash(path: Path, change) -> None:
    """Write a file again as somebody would who knows the hash."""
    tensors = load_file(path)
    rewrite(path, lambda record: (change(record), record.update(sha256=_digest(record, tensors))))


def test_cut_network_has_bit_equal_outputs_in_a_fresh_process(tmp_path, file, small):
    code = (
        "import sys; from torchslice.use.artefacts import load; from safetensors.torch import load_file, save_file\n"
        "model = load(sys.argv[1], allow_import=True)\n"
        "assert not any(m.training for m in model.modules()) and model.classes == ('red', 'blue')\n"
        "save_file({'y': model(load_file(sys.argv[2])['x']).detach()}, sys.argv[3])"
    )
    save_file({"x": IMAGES}, tmp_path / "x")
    command = [sys.executable, "-c", code, file, tmp_path / "x", tmp_path / "y"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    assert torch.equal(load_file(tmp_path / "y")["y"], small.eval()(IMAGES))
    assert small(IMAGES).shape == (2, 2) and small.conv2.weight.shape == (3, 5, 3, 3)


def test_loaded_network_says_what_it_is(tmp_path, small):
    preprocessing = {"mean": [0.5], "std": [0.25], "input_shape": [1, 8, 8]}
    extras = {"preprocessing": preprocessing, "metrics": {"accuracy": 0.5}}
    save(small, tmp_path / "m", classes=("red", "blue"), slice=PART, **extras)
    model = load(tmp_path / "m", allow_import=True)
    assert (model.classes, model.preprocessing) == (("red", "blue"), preprocessing)
    assert model.origin == {"factory": "tests.use.nets:tiny", "arguments": {"num_classes": 3}}
    record = read_record(tmp_path / "m")
    assert Slice.from_plain(record["slice"]) == PART and record["metrics"] == {"accuracy": 0.5}
    assert set(record["versions"]) == {"torchslice", "torch", "python"}
    assert (model.conv2.in_channels, model.conv2.out_channels, model.norm2.num_features) == (5, 3, 3)
    save(model, tmp_path / "again")  # classes and preprocessing travel with the network
    assert load(tmp_path / "again", allow_import=True).classes == ("red", "blue")


def test_loaded_network_can_be_trained_on(file):
    model = load(file, allow_import=True).train()
    model(IMAGES).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_model_without_origin_needs_a_factory(tmp_path):
    model = lively(Tiny(4))
    with pytest.raises(TorchsliceError, match=r"this Tiny does not say what built it; give factory='package"):
        save(model, tmp_path / "m")
    save(model, tmp_path / "m", factory="tests.use.nets:tiny", arguments={"num_classes": 4})
    assert torch.equal(load(tmp_path / "m", allow_import=True)(IMAGES), model(IMAGES))


@pytest.mark.parametrize("name", ["convnet", "resnet20", "mobilenet", "timm:mobilenetv3_small_050"])
def test_cut_known_networks_load_without_permission(tmp_path, name):
    model = models.create(name, num_classes=4).eval()
    images = torch.randn(2, 3, 32, 32)
    part = extract(model, find_neurons(model, images).random(0.5), images, classes=[1, 2])
    save(part, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m")(images), part(images))
    assert part(images).shape == (2, 2)
    assert (tmp_path / "m").stat().st_size < 0.6 * sum(p.nbytes for p in model.parameters())


def test_channels_last_and_shared_tensors(tmp_path):
    model = made(channels=4).to(memory_format=torch.channels_last)
    images = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m", allow_import=True)
    assert torch.equal(loaded(images), model(images))
    assert loaded.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    model = lively(Tied())
    model.first.weight.data = model.first.weight.data.t()  # shared with the other layer, and not contiguous
    save(model, tmp_path / "m", factory="tests.use.nets:tied")
    loaded = load(tmp_path / "m", allow_import=True)
    assert loaded.first.weight is loaded.second.weight
    assert torch.allclose(loaded(torch.eye(4)), model(torch.eye(4)))
    assert torch.equal(loaded.second.weight, model.second.weight)


def test_half_precision_and_training_mode(tmp_path):
    model = made().half().train()
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m", allow_import=True)
    assert loaded.conv1.weight.dtype == torch.float16 and not loaded.training and model.training
    assert loaded.norm1.num_batches_tracked.dtype == torch.int64


def test_the_same_content_gives_the_same_bytes_and_no_random_number_is_used(tmp_path, small):
    state = torch.random.get_rng_state()
    save(small, tmp_path / "a")
    save(small, tmp_path / "b")
    load(tmp_path / "a", allow_import=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_module_is_imported_only_with_permission(file):
    with pytest.raises(TorchsliceError, match=r"'tests.use.nets:tiny'.*runs the code.*allow_import=True"):
        load(file)
    for factory in ("timm:hf-hub:somebody/net", "torchvision:../net", "os:system"):
        rewrite_with_hash(file, lambda record, factory=factory: record["origin"].update(factory=factory))
        with pytest.raises(TorchsliceError, match="allow_import=True"):
            load(file)


def test_a_file_cannot_make_timm_unpickle_another(tmp_path):
    model = models.create("timm:mobilenetv3_small_050", num_classes=2).eval()
    (tmp_path / "other.pth").write_bytes(b"\x80\x04 not to be opened")
    save(model, tmp_path / "m")
    other = str(tmp_path / "other.pth")
    rewrite_with_hash(tmp_path / "m", lambda record: record["origin"]["arguments"].update(checkpoint_path=other))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load(tmp_path / "m")(images), model(images))


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


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"torchslice": "half a record {"}, {"torchslice": "{}"}])
def test_safetensors_of_another_program(tmp_path, metadata):
    save_file({"weight": torch.ones(2)}, tmp_path / "m", metadata)
    with pytest.raises(TorchsliceError, match="is a safetensors file of another program"):
        load(tmp_path / "m")


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.01])
def test_truncated(file, keep):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(TorchsliceError, match=r"is not a whole safetensors file .*copy it once more"):
        load(file, allow_import=True)


def test_every_flipped_byte_is_found(file):
    content = bytearray(file.read_bytes())
    for place in range(8, len(content), len(content) // 97):
        content[place] ^= 1
        file.write_bytes(content)
        with pytest.raises(TorchsliceError):
            load(file, allow_import=True)
        content[place] ^= 1
    content[-1] ^= 128
    file.write_bytes(content)
    with pytest.raises(TorchsliceError, match="its content does not match its hash"):
        load(file, allow_import=True)


def test_changed_record(file):
    rewrite(file, lambda record: record.update(classes=["blue", "red"]))
    with pytest.raises(TorchsliceError, match="its content does not match its hash"):
        load(file, allow_import=True)


def test_newer_format(file):
    rewrite(file, lambda record: record.update(format_version=2))
    with pytest.raises(TorchsliceError, match="has format version 2 and this torchslice reads up to 1; install"):
        load(file, allow_import=True)


def test_tensor_missing_or_of_another_shape(file):
    rewrite(file, drop="conv1.bias")
    with pytest.raises(TorchsliceError, match=r"'conv1.bias' should be \['float32', \[5\], False\] and is absent"):
        load(file, allow_import=True)


def test_network_of_the_factory_has_changed(file):
    cases = [
        (
            lambda r: r["layers"]["conv1"].update(out_channels=4),
            r"'conv1.weight' is .*\[5, 1, 3, 3\], .* needs .*\[4, 1, 3, 3\]",
        ),
        (
            lambda r: r["origin"]["arguments"].update(norm=False),
            "'norm1' is a BatchNorm2d, and .* builds Identity there",
        ),
        (lambda r: r["layers"].update(extra={"type": "Linear"}), "'extra' is a Linear, and .* builds nothing there"),
        (lambda r: r["shared"].update(x="head.bias"), "tensor 'x' is not part of the network"),
        (lambda r: r["origin"].update(factory="no.such.module:f"), "there is no module"),
        (lambda r: r["origin"].update(factory="tests.use.nets:tyni"), "tiny"),
        (lambda r: r["origin"].update(factory="tests.use.nets:failing"), "failed with RuntimeError: no network today"),
        (lambda r: r["origin"]["arguments"].update(colour="red"), "colour"),
        (lambda r: r["origin"].update(factory="resnet21"), "unknown model 'resnet21'. Did you mean 'resnet20'"),
    ]
    whole = file.read_bytes()
    for change, message in cases:
        file.write_bytes(whole)
        rewrite_with_hash(file, change)
        with pytest.raises(TorchsliceError, match=r"cannot load .*: .*" + message):
            load(file, allow_import=True)


# -- files that cannot be saved -----------------------------------------------------------------------------------
def test_what_could_not_be_loaded_is_not_saved(tmp_path, small):
    small.head = nn.Linear(3, 2, bias=False)
    with pytest.raises(TorchsliceError, match=r"cannot save .* again: tensor 'head.bias' is missing, but is part of"):
        save(small, tmp_path / "m")
    with pytest.raises(TorchsliceError, match="there is no module"):
        save(small, tmp_path / "m", factory="nowhere.at_all:net")
    with pytest.raises(TorchsliceError, match=r"arguments=... belongs to factory=..."):
        save(small, tmp_path / "m", arguments={"num_classes": 3})
    assert not list(tmp_path.iterdir())


def test_only_plain_data_is_saved(tmp_path, small):
    with pytest.raises(TorchsliceError, match=r"Tensor is not JSON serializable. .* must be plain data"):
        save(small, tmp_path / "m", metrics={"accuracy": torch.ones(())})


def test_wrapped_model(tmp_path, small):
    with pytest.raises(TorchsliceError, match="wrapped"):
        save(nn.DataParallel(small), tmp_path / "m")


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
