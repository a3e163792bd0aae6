"""torchslice store, action by action."""

import json
import shutil

import pytest

import torchslice as ts


@pytest.fixture
def parts(tmp_path):
    """Two artefacts beside an empty store."""
    for name, classes, accuracy in (("pets", ["cat", "dog"], 0.9), ("birds", ["owl", "kea"], 0.7)):
        net = ts.models.create("convnet", num_classes=2, channels=1, width=0.1)
        ts.save(net, tmp_path / f"{name}.safetensors", classes=classes, metrics={"accuracy": accuracy})
    return tmp_path


def test_a_store_from_add_to_remove(torchslice, parts):
    store, files = parts / "store", [parts / "pets.safetensors", parts / "birds.safetensors"]
    assert "90.0%" in torchslice("store", "add", store, *files).out
    assert [a["name"] for a in torchslice("store", "list", store, "--json").json["artefacts"]] == ["birds", "pets"]
    found = torchslice("store", "search", store, "--classes", "cat", "--min-accuracy", 0.8, "--json").json["artefacts"]
    assert [a["classes"] for a in found] == [["cat", "dog"]]
    assert "birds" not in torchslice("store", "search", store, "--min-accuracy", 0.8).out
    assert "2 classes apart: cat, dog" in torchslice("store", "show", store, "pets").out
    assert torchslice("store", "show", store, "pets", "--json").json["metrics"] == {"accuracy": 0.9}
    torchslice("store", "add", store, files[0]).refused("has an artefact 'pets'")
    assert torchslice("store", "add", store, files[0], "--force").code == 0
    assert torchslice("store", "verify", store).code == 0
    assert torchslice("store", "remove", store, "pets", "--json").json["removed"] == "pets"
    torchslice("store", "show", store, "pets").refused("'pets'", "Known: birds")


def test_verify_lists_all_and_ends_with_2_if_a_file_is_damaged(torchslice, parts):
    store = parts / "store"
    torchslice("store", "add", store, parts / "pets.safetensors", parts / "birds.safetensors")
    content = bytearray((store / "pets.safetensors").read_bytes())
    content[-3] ^= 1
    (store / "pets.safetensors").write_bytes(content)
    result = torchslice("store", "verify", store, "--json")
    assert result.code == 2 and result.err == "torchslice: 1 of 2 files cannot be used: pets.\n"
    assert [bool(a["problem"]) for a in json.loads(result.out)["artefacts"]] == [False, True]


def test_push_and_pull(torchslice, parts, monkeypatch):
    """With functions that stand for the Hub; tests/artefact/test_hub.py tests those that talk to it."""
    hub = parts / "hub.safetensors"

    def push(path, repo, *, private):
        shutil.copy(path, hub)
        return f"{repo} {private}"

    monkeypatch.setattr("torchslice.artefact.hub.push", push)
    monkeypatch.setattr("torchslice.artefact.hub.pull", lambda repo: hub)
    store = parts / "store"
    torchslice("store", "add", store, parts / "pets.safetensors")
    assert torchslice("store", "push", store, "pets", "me/pets", "--public").out == "me/pets False\n"
    assert torchslice("store", "pull", store, "me/pets", "mine", "--json").json["artefacts"][0]["name"] == "mine"
    assert ts.load(store / "mine.safetensors").classes == ("cat", "dog")
