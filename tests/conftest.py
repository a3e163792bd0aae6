"""Quiet and repeatable tests that leave nothing behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from torch.nn.modules import module as torch_module

hypothesis.settings.register_profile("torchslice", deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile("torchslice")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_leaked_files(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run every test in an empty folder of its own and find it empty afterwards."""
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    yield
    stray = sorted(p.name for p in here.iterdir() if p.name not in (".hypothesis", "__pycache__"))
    assert not stray, f"the test left files in the current directory: {stray}"


@pytest.fixture(autouse=True)
def no_leaked_threads_and_processes() -> Iterator[None]:
    """Fail a test that leaves a thread or a process running."""
    before = {*threading.enumerate(), *multiprocessing.active_children()}

    def left() -> set[threading.Thread | multiprocessing.process.BaseProcess]:
        threads = {thread for thread in threading.enumerate() if type(thread).__name__ != "TMonitor"}  # one of tqdm's
        return {*threads, *multiprocessing.active_children()} - before

    yield
    if left():
        gc.collect()  # a reader in a reference cycle, such as an exception, keeps its workers until then
    for started in left():
        started.join(timeout=5)  # one that was told to stop may need a moment
    assert not left(), f"the test left running: {left()}"


@pytest.fixture(autouse=True)
def no_changed_settings() -> Iterator[None]:
    """Fail a test that changes what is global in torch."""

    def settings() -> tuple[object, ...]:
        return (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_autocast_enabled("cpu"),
        )

    before = settings()
    yield
    assert settings() == before


@pytest.fixture(autouse=True)
def no_leaked_hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that leaves a hook behind, global or on a module that is still alive."""
    handles = []
    for name in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        original = getattr(torch.nn.Module, name)

        def register(self, *args, _original=original, **kwargs):
            handle = _original(self, *args, **kwargs)
            handles.append(handle)
            return handle

        monkeypatch.setattr(torch.nn.Module, name, register)

    def left() -> list[object]:
        hooks = [handle.hooks_dict_ref() for handle in handles]
        return [hook[handle.id] for handle, hook in zip(handles, hooks, strict=True) if hook and handle.id in hook]

    before = _global_hooks()
    yield
    if left():
        gc.collect()  # modules in reference cycles are alive until then
    assert not left(), f"the test left hooks on modules: {left()}"
    assert _global_hooks() == before, "the test left global module hooks"


def _global_hooks() -> dict[str, list[int]]:
    hooks = {name: value for name, value in vars(torch_module).items() if name.startswith("_global_")}
    return {name: list(value) for name, value in hooks.items() if hasattr(value, "keys")}


@pytest.fixture(scope="session")
def real_data_dir() -> Path:
    """Folder with CIFAR-10, MNIST and Fashion-MNIST as torchvision lays them out."""
    named = os.environ.get("TORCHSLICE_DATA")
    missing = [
        name for name in ("cifar-10-batches-py", "MNIST", "FashionMNIST") if not named or not Path(named, name).is_dir()
    ]
    if missing:
        reason = f"real data: TORCHSLICE_DATA={named} holds no {', '.join(missing)}"
        if os.environ.get("TORCHSLICE_REQUIRE_DATA") == "1":
            pytest.fail(f"{reason}, and TORCHSLICE_REQUIRE_DATA=1 asks for it")
        pytest.skip(reason)
    return Path(named).resolve()
