"""The public names are frozen, each can be had, and importing torchslice imports nothing heavy."""

import subprocess
import sys

import pytest

import torchslice

NAMES = [
    *("Slice", "TorchsliceError", "accuracy", "cost", "data", "evaluate_stages", "extend", "extract", "find_neurons"),
    *("finetune", "fit", "latency_ms", "load", "masked", "models", "modular", "readapt", "recalibrate", "restructure"),
    *("retention", "reuse", "save", "semantic", "settle", "widen"),
]
MODULAR = [
    *("attach_gates", "class_slices", "cohesion_loss", "coupling_loss", "mean_gate_values", "objective", "report"),
    "SubTasks",
]
SEMANTIC = [
    *("METRICS", "Contributions", "Metric", "Rule", "SemanticSlices", "contributions", "prefix_similarity"),
    *("slice_model", "slices_from"),
]


def test_public_names_are_frozen():
    assert torchslice.__all__ == NAMES
    assert set(dir(torchslice)) == {*NAMES, "__version__"}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_documented_and_not_a_module_of_that_name(name):
    found = getattr(torchslice, name)
    assert found.__doc__ and (name in ("data", "models", "modular", "semantic")) == (type(found).__name__ == "module")


def test_modular_names():
    assert not [name for name in MODULAR if not hasattr(torchslice.modular, name)]


def test_semantic_names():
    assert not [name for name in SEMANTIC if not hasattr(torchslice.semantic, name)]


def test_version_is_that_of_the_package():
    assert torchslice.__version__.count(".") == 2


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'torchslice' has no attribute 'extrct'"):
        _ = torchslice.extrct


def test_importing_is_light():
    code = "import sys, torchslice; sys.exit(','.join({'torch', 'numpy', 'rich', 'sklearn'} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and not result.stderr, result.stderr


def test_using_everything_imports_no_optional_package():
    code = (
        "import sys, torchslice; [getattr(torchslice, name) for name in torchslice.__all__];"
        "sys.exit(','.join({'torchvision', 'timm', 'sklearn', 'matplotlib', 'PIL'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and not result.stderr, result.stderr
