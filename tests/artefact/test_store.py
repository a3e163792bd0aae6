"""A store is its files: whatever other programs and killed processes do to the folder, it says what is there."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from torchslice import models
from torchslice.artefact import Store, load, save
from torchslice.errors import TorchsliceError
from torchslice.files import atomic_write


def artefact(path: Path, classes: list[str], **metrics: object) -> Path:
    torch.manual_seed(len(classes))
    net = models.create("convnet", num_classes=len(classes), channels=1, width=0.05 * len(classes))
    save(net, path, classes=classes, metrics=metrics or None)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three artefacts: pets and birds say how accurate they are, letters do not."""
    store = Store(tmp_path / "store")
    store.add(artefact(tmp_path / "pets.safetensors", ["cat", "dog"], accuracy=0.9))
    tuned = {"validation_accuracy": {"extracted": 0.5, "fine-tuned": 0.8}, "kept": "fine-tuned"}
    store.add(artefact(tmp_path / "b", ["owl", "cat", "kea"], **tuned), name="birds")
    store.add(artefact(tmp_path / "letters.safetensors", ["a", "b", "c", "d"]))
    return store


def names(entries) -> list[str]:
    return [entry.name for entry in entries]


def test_entries_say_what_the_files_say(store: Store) -> None:
    birds, letters, pets = store.entries()
    assert (birds.name, birds.classes, birds.accuracy) == ("birds", ("owl", "cat", "kea"), 0.8)
    assert (letters.accuracy, pets.accuracy, pets.problem) == (None, 0.9, None)
    file = store.folder / "pets.safetensors"
    net = store.load("pets").model
    assert pets.parameters == sum(p.numel() for p in net.parameters()) and pets.size_bytes == file.stat().st_size
    assert torch.equal(net(torch.ones(1, 1, 8, 8)), load(file).model(torch.ones(1, 1, 8, 8)))


@pytest.mark.parametrize(
    "wanted, found",
    [
        ({}, ["pets", "birds", "letters"]),  # smallest first
        ({"classes": ["cat"]}, ["pets", "birds"]),
        ({"classes": ["kea", "cat"]}, ["birds"]),
        ({"classes": ["cat", "a"]}, []),
        ({"min_accuracy": 0.8}, ["pets", "birds"]),
        ({"min_accuracy": 0.85}, ["pets"]),
        ({"classes": ["cat"], "min_accuracy": 0.8, "max_parameters": 0}, []),
    ],
)
def test_search(store: Store, wanted, found) -> None:
    assert names(store.search(**wanted)) == found


def test_search_by_size(store: Store) -> None:
    sizes = {entry.name: entry.parameters for entry in store.entries()}
    assert sizes["pets"] < sizes["birds"] < sizes["letters"]
    assert names(store.search(max_parameters=sizes["birds"])) == ["pets", "birds"]


def test_the_files_are_the_truth(store: Store) -> None:
    shutil.copy(store.folder / "pets.safetensors", store.folder / "copied in.safetensors")
    (store.folder / "letters.safetensors").unlink()
    artefact(store.folder / "birds.safetensors", ["x", "y"])
    found = {entry.name: entry.classes for entry in store.entries()}
    assert found == {"birds": ("x", "y"), "copied in": ("cat", "dog"), "pets": ("cat", "dog")}


@pytest.mark.parametrize(("metrics", "accuracy"), [({"validation_accuracy": 0.93}, 0.93), ({"accuracy": "good"}, None)])
def test_accuracy_is_what_was_saved_if_it_is_a_number(store: Store, tmp_path: Path, metrics, accuracy) -> None:
    entry = store.add(artefact(tmp_path / "own.safetensors", ["x", "y"], **metrics))
    assert (entry.accuracy, entry.problem) == (accuracy, None)


def test_damaged_and_foreign_files_leave_the_others_usable(store: Store) -> None:
    folder = store.folder
    whole = (folder / "pets.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-9])
    (folder / "empty.safetensors").touch()
    (folder / "folder.safetensors").mkdir()
    (folder / "link.safetensors").symlink_to("nowhere")
    (folder / "notes.txt").write_text("not ours")
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, folder / "other.safetensors")
    found = {entry.name: entry.problem for entry in store.entries()}
    assert {name for name, problem in found.items() if not problem} == {"birds", "letters", "pets"}
    assert "not a whole safetensors file" in found["cut"] and "another program" in found["other"]
    assert found.keys() == {"birds", "cut", "empty", "folder", "letters", "link", "other", "pets"}
    assert names(store.search(classes=["cat"])) == ["pets", "birds"]
    assert store.load("pets").classes == ("cat", "dog")
    with pytest.raises(TorchsliceError, match="another program"):
        store.load("other")


def test_verify_finds_a_flipped_bit_that_lists_cannot_see(store: Store) -> None:
    path = store.folder / "pets.safetensors"
    content, status = bytearray(path.read_bytes()), path.stat()
    content[-3] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not [entry for entry in store.entries() if entry.problem]
    (damaged,) = [entry for entry in store.verify() if entry.problem]
    assert damaged.name == "pets" and "does not match its hash" in damaged.problem


def test_what_is_damaged_is_not_added(store: Store, tmp_path: Path) -> None:
    content = bytearray((tmp_path / "pets.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(TorchsliceError, match="does not match its hash"):
        store.add(tmp_path / "bad.safetensors")
    with pytest.raises(TorchsliceError, match="no file"):
        store.add(tmp_path / "nowhere.safetensors")
    assert names(store.entries()) == ["birds", "letters", "pets"]


def test_names(store: Store, tmp_path: Path) -> None:
    with pytest.raises(TorchsliceError, match="has an artefact 'pets'"):
        store.add(tmp_path / "b", name="pets")
    assert store.add(tmp_path / "b", name="pets", overwrite=True).classes == ("owl", "cat", "kea")
    for name in ("../pets", "", ".hidden", "a/b", ".."):
        with pytest.raises(TorchsliceError, match="cannot be a name"):
            store.add(tmp_path / "b", name=name)
    with pytest.raises(TorchsliceError, match="Did you mean 'birds'"):
        store.load("brids")
    with pytest.raises(TorchsliceError, match="Did you mean 'birds'"):
        store.remove("brids")
    store.remove("birds")
    assert names(store.entries()) == ["letters", "pets"]
    with pytest.raises(TorchsliceError, match="a store is a folder"):
        Store(tmp_path / "b")


def test_a_store_that_is_not_there_is_empty_and_is_not_made(tmp_path: Path) -> None:
    assert Store(tmp_path / "none").entries() == Store(tmp_path / "none").verify() == []
    assert not (tmp_path / "none").exists()


def _add_many(folder: Path, file: Path, first: int) -> None:
    store = Store(folder)
    for number in range(first, first + 6):
        store.add(file, name=f"part{number}")
        store.add(file, name="shared", overwrite=True)
        assert not [entry for entry in store.entries() if entry.problem]
        if number % 3 == 0:
            store.remove(f"part{number}")


def test_two_processes_lose_nothing(store: Store, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # which need not import torch again
    workers = [
        context.Process(target=_add_many, args=(store.folder, tmp_path / "pets.safetensors", first))
        for first in (100, 200)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=110)
        assert worker.exitcode == 0
    left = {f"part{n}" for first in (100, 200) for n in range(first, first + 6) if n % 3}
    assert {*names(store.verify())} == {"birds", "letters", "pets", "shared", *left}
    assert not [entry for entry in store.entries() if entry.problem]
    assert {path.suffix for path in store.folder.iterdir()} == {".safetensors"}


def test_a_file_that_another_program_is_writing_there_is_left_alone(store: Store, tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes((tmp_path / "pets.safetensors").read_bytes())
        store.add(tmp_path / "pets.safetensors", name="other")

    atomic_write(store.folder / "mine.safetensors", write)
    assert {"mine", "other"} <= {*names(store.verify())}


def test_parts_are_whole_networks(store: Store) -> None:
    """A part can be copied out of the store and needs nothing that stays there."""
    path = shutil.copy(store.folder / "pets.safetensors", store.folder.parent / "alone.safetensors")
    shutil.rmtree(store.folder)
    assert isinstance(load(path).model, nn.Module)
