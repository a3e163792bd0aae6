"""The public names are frozen, each can be had, and importing torchslice imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import torchslice

NAMES = [
    *("Slice", "TorchsliceError", "Training", "accuracy", "compose", "data", "export", "extend", "extract"),
    *("find_neurons", "finetune", "fit", "gates", "judge", "load", "masked", "models", "readapt", "remove"),
    *("replace", "report", "restructure", "retention", "reuse", "save", "semantic", "subtasks", "update"),
]
MODULES = {
    "data": "Images Samples Split Stored Task hold_out joined limit load names task",
    "gates": "GatedModel attach class_slices objective report slices_from statistics",
    "judge": "accuracy auroc calibrate calibration_error compensate cost evaluate_stages "
    "false_positive_rate features forgetting latency_ms nearest predict random_like recalibrate reinitialised repair "
    "threshold",
    "models": "create names",
    "semantic": "METRICS ByGroup Contributions Group Groups PerClass PerLayer ReachTheta SemanticSlices class_slices "
    "contributions groups similarity",
    "subtasks": "SubTasks objective rank",
}


def test_public_names_are_frozen_and_few():
    assert torchslice.__all__ == NAMES and len(NAMES) <= 28
    assert set(dir(torchslice)) == {*NAMES, "__version__"}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_documented_and_is_what_it_seems(name):
    found = getattr(torchslice, name)
    assert found.__doc__ and (name in MODULES) == (type(found).__name__ == "module")


def test_names_of_the_public_modules():
    missing = [f"{m}.{n}" for m, ns in MODULES.items() for n in ns.split() if not hasattr(getattr(torchslice, m), n)]
    assert not missing


def test_types_are_declared():
    assert Path(torchslice.__file__).with_name("py.typed").is_file()


def test_version_is_that_of_the_package():
    assert torchslice.__version__.count(".") == 2


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'torchslice' has no attribute 'extrct'"):
        _ = torchslice.extrct


def run_fresh(code: str) -> None:
    """Run code in a new process, which must end well and say nothing on standard error."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and not result.stderr, result.stderr


def test_importing_is_light():
    heavy = {"torch", "numpy", "rich", "sklearn", "scipy", "typer"}
    run_fresh(f"import sys, torchslice; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)")


def test_names_need_no_optional_package_and_stay_what_they_are_whatever_is_imported():
    optional = {"torchvision", "timm", "sklearn", "matplotlib", "PIL", "typer"}
    run_fresh(
        "import importlib, pkgutil, sys, torchslice\n"
        "found = {name: getattr(torchslice, name) for name in torchslice.__all__}\n"
        f"if needed := {optional} & set(sys.modules): sys.exit(', '.join(needed))\n"
        "for found_module in pkgutil.walk_packages(torchslice.__path__, 'torchslice.'):\n"
        "    importlib.import_module(found_module.name)\n"
        "sys.exit(', '.join(name for name in found if getattr(torchslice, name) is not found[name]) or 0)"
    )
