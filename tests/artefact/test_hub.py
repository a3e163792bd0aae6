"""Pushing to and pulling from the Hub, with a client that keeps repositories in a folder: no network is used here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard

from tests.nets import Tiny, lively
from torchslice import models
from torchslice.artefact import load, pull, push, read_record, save
from torchslice.artefact.hub import FILE, card
from torchslice.errors import TorchsliceError


class FakeHub:
    """The three calls of `HfApi` that are used, with its names of parameters, over a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.private = folder, {}

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.private.setdefault(repo_id, private)
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)

    def create_commit(self, repo_id, operations, *, commit_message):
        assert commit_message
        for operation in operations:
            with operation.as_file() as content:
                (self.folder / repo_id / operation.path_in_repo).write_bytes(content.read())

    def hf_hub_download(self, repo_id, filename, *, revision):
        if not (self.folder / repo_id / filename).exists():
            raise OSError(f"404: {repo_id}")
        return shutil.copy(self.folder / repo_id / filename, self.folder / f"{revision}.safetensors")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake)
    return fake


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    net = models.create("convnet", num_classes=2, channels=1, width=0.1)
    metrics = {"accuracy": 0.912, "mac_retention": 0.25}
    about = {"mean": [0.5], "std": [0.25], "input_shape": [1, 8, 8]}
    save(net, tmp_path / "pets.safetensors", classes=["cat", "dog"], preprocessing=about, metrics=metrics)
    return tmp_path / "pets.safetensors"


def test_the_fake_client_takes_what_the_real_one_takes() -> None:
    import inspect

    for name in ("create_repo", "create_commit", "hf_hub_download"):
        real = {*inspect.signature(getattr(HfApi, name)).parameters}
        assert {*inspect.signature(getattr(FakeHub, name)).parameters} <= real


def test_what_is_pushed_is_pulled_bit_for_bit(hub: FakeHub, pets: Path) -> None:
    assert push(pets, "me/pets") == "https://huggingface.co/me/pets"
    assert hub.private == {"me/pets": True}
    path = pull("me/pets", revision="v1")
    assert path.name == "v1.safetensors" and path.read_bytes() == pets.read_bytes()
    assert load(path).classes == ("cat", "dog")


def test_the_card_says_what_the_file_says(hub: FakeHub, pets: Path) -> None:
    push(pets, "me/pets", private=False)
    assert hub.private == {"me/pets": False}
    text = (hub.folder / "me/pets/README.md").read_text()
    found = ModelCard(text)
    assert found.data.library_name == "torchslice" and found.data.tags == ["torchslice"]
    record = read_record(pets)
    parameters = sum(p.numel() for p in load(pets).model.parameters())
    for part in ("2 classes apart: cat, dog", f"| parameters | {parameters:,} |", "91.2%", "| mac retention | 25.0% |"):
        assert part in text
    assert 'pull("me/pets")' in text and record["sha256"] in text and '"mean": [0.5]' in text
    assert "allow_import" not in text


def test_the_card_of_a_class_of_ones_own_says_that_it_is_imported(tmp_path: Path) -> None:
    save(lively(Tiny()), tmp_path / "tiny.safetensors")
    text = card(read_record(tmp_path / "tiny.safetensors"), "me/tiny")
    assert "allow_import=True" in text and "Loading imports tests.nets" in text and "names are not known" in text


@pytest.mark.parametrize("part", ["modules", "tensors", "metrics", "preprocessing"])
def test_a_card_of_a_record_that_torchslice_did_not_write_is_refused(pets: Path, part: str) -> None:
    with pytest.raises(TorchsliceError, match="its record is not one that torchslice writes"):
        card({**read_record(pets), part: {"x": 1} if part in ("modules", "tensors") else "x"}, "me/pets")


def test_a_damaged_file_is_neither_pushed_nor_pulled(hub: FakeHub, pets: Path) -> None:
    push(pets, "me/pets")
    content = bytearray(pets.read_bytes())
    content[-3] ^= 1
    for path in (pets, hub.folder / "me/pets" / FILE):
        path.write_bytes(content)
    for action in (lambda: push(pets, "me/pets"), lambda: pull("me/pets")):
        with pytest.raises(TorchsliceError, match="does not match its hash"):
            action()


def test_errors_of_the_hub_are_one_line(hub: FakeHub) -> None:
    with pytest.raises(TorchsliceError, match="cannot pull torchslice.safetensors from me/none: 404: me/none"):
        pull("me/none")
