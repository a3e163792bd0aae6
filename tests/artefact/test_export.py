"""What an exported file holds, and networks that cannot be exported: the error says why, and there is no file."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tests.nets import Tiny, lively, state
from torchslice.artefact import export, load, save
from torchslice.errors import TorchsliceError

PREPROCESSING = {"mean": [0.5], "std": [0.25], "input_shape": [1, 6, 6]}
SAMPLES = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(3))


@torch.library.custom_op("torchslice_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return 2 * x


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Failing(nn.Module):
    """A linear network with something at its end that no program can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.head(x.flatten(1)))


class Custom(Failing):
    def end(self, x: Tensor) -> Tensor:
        return doubled(x)


class Unknown(Failing):
    def end(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Branching(Failing):
    def end(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class OfNumpy(Failing):
    def end(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)


class OneSize(Failing):
    def end(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0] if x.shape[0] != 2 else 2, 3) if len(x) == 2 else x


class Noisy(Failing):
    def end(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Counting(Failing):
    calls = 0

    def end(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x * self.calls


@pytest.mark.parametrize("pool", [nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d])
def test_windows_of_different_sizes_are_exported(pool: type[nn.Module], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), pool((5, 4)), nn.Flatten(), nn.Linear(80, 3))
    assert export(model, tmp_path / "a.onnx", samples=torch.randn(5, 1, 14, 6)).difference < 1e-5


def test_an_onnx_file_runs_without_torch_and_says_what_its_numbers_mean(tmp_path: Path) -> None:
    net = lively(Tiny()).train()
    before = state(net)
    made = export(net, tmp_path / "a.onnx", samples=SAMPLES, classes=["x", "y", "z"], preprocessing=PREPROCESSING)
    assert net.training and all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in before.items())
    session = onnxruntime.InferenceSession((tmp_path / "a.onnx").read_bytes())
    about = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    assert about == {"classes": ["x", "y", "z"], "preprocessing": PREPROCESSING, "inputs": ["input"]}
    assert session.get_inputs()[0].shape == ["batch", 1, 6, 6] and session.get_outputs()[0].name == "logits"
    with torch.no_grad():
        expected = net.eval()(SAMPLES)
    for count in (1, 4, 5):
        (logits,) = session.run(["logits"], {"input": SAMPLES[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected[:count], rtol=1e-5, atol=1e-5)
    assert made.size_bytes == (tmp_path / "a.onnx").stat().st_size and made.samples == 5 and str(made)


def test_a_pt2_file_says_the_same_and_holds_no_sample(tmp_path: Path) -> None:
    net = lively(Tiny())
    export(net, tmp_path / "net", samples=SAMPLES, format="pt2", classes=["x", "y", "z"])
    about = {"classes": "", "preprocessing": "", "inputs": ""}
    program = torch.export.load(tmp_path / "net", extra_files=about)
    assert {name: json.loads(text) for name, text in about.items()} == {
        **{"classes": ["x", "y", "z"], "preprocessing": None, "inputs": ["input"]}
    }
    assert not any(tensor.any() for tensor in program.example_inputs[0])
    with torch.no_grad():
        torch.testing.assert_close(program.module()(SAMPLES[:1]), net(SAMPLES[:1]), rtol=1e-5, atol=1e-5)


def test_an_artefact_is_exported_with_what_it_knows(tmp_path: Path) -> None:
    save(lively(Tiny()), tmp_path / "a.safetensors", classes=["x", "y", "z"], preprocessing=PREPROCESSING)
    export(load(tmp_path / "a.safetensors", allow_import=True), tmp_path / "a.pt2", samples=SAMPLES)
    about = {"classes": "", "preprocessing": ""}
    torch.export.load(tmp_path / "a.pt2", extra_files=about)
    assert json.loads(about["classes"]) == ["x", "y", "z"] and json.loads(about["preprocessing"]) == PREPROCESSING


@pytest.mark.parametrize(
    "kind, format, parts",
    [
        (Custom, "onnx", ["the operation torchslice_tests.doubled"]),
        (Unknown, "onnx", ["the operation prims.bessel_j0"]),
        (Branching, "pt2", ["if x.sum() > 0", "test_export.py"]),
        (OfNumpy, "pt2", [".numpy()", "x.detach().numpy()"]),
        (OneSize, "pt2", ["one batch size only"]),
        (Noisy, "onnx", ["differs from the network", "random numbers"]),
        (Noisy, "pt2", ["differs from the network"]),
        (Counting, "pt2", ["differs from the network", "state of its own"]),
    ],
)
def test_what_cannot_be_exported_is_named_and_leaves_no_file(kind, format: str, parts, tmp_path: Path) -> None:
    with pytest.raises(TorchsliceError) as caught:
        export(kind().eval(), tmp_path / f"net.{format}", samples=SAMPLES)
    assert not [part for part in parts if part not in str(caught.value)], str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given, message",
    [
        ({"format": "onxn"}, "unknown format of exports 'onxn'. Did you mean 'onnx'"),
        ({"samples": SAMPLES[:2]}, "at least 3 samples, got 2"),
        ({"classes": ["x", "y"]}, "3 logits, and 2 different classes"),
        ({"preprocessing": {"mean": torch.ones(1)}}, "Give plain data"),
    ],
)
def test_bad_requests(given, message: str, tmp_path: Path) -> None:
    with pytest.raises(TorchsliceError, match=message):
        export(lively(Tiny()), tmp_path / "a.pt2", **{"samples": SAMPLES, **given})
    assert not list(tmp_path.iterdir())


def test_a_name_without_a_format() -> None:
    with pytest.raises(TorchsliceError, match=r"unknown format of exports ''.*Known: onnx, pt2"):
        export(lively(Tiny()), "network", samples=SAMPLES)
