"""Optional packages and the user's own functions, by name."""

import sys

import pytest

from torchslice import imports
from torchslice.errors import TorchsliceError
from torchslice.imports import call, import_object, import_optional, import_timm, import_torchvision


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Current directory with the user's modules in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in ("own_nets", "own_nets_broken"):
        sys.modules.pop(name, None)


def test_an_object_is_found_in_an_installed_module():
    assert import_object("os.path:join")("a", "b") == "a/b"
    assert import_object("json:JSONEncoder.item_separator") == ", "


def test_an_object_is_found_in_the_current_directory(own_folder):
    (own_folder / "own_nets.py").write_text("def make(): return 7")
    assert import_object("own_nets:make")() == 7


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("json", "'json' is not of the form package.module:function"),
        ("json:", "'json:' is not of the form package.module:function"),
        (":dumps", "':dumps' is not of the form package.module:function"),
        ("json:dumps()", "is not of the form package.module:function"),
        (".json:dumps", "is not of the form package.module:function"),
        ("math:pi.rael", "unknown name in 'math:pi.rael': 'rael'. Did you mean 'real'?"),
        ("own_nest:make", "there is no module 'own_nest', neither installed nor in "),
        ("json.nothing:make", "there is no module 'json.nothing'"),
        ("json:dumbs", "unknown name in module json: 'dumbs'. Did you mean 'dumps'?"),
        ("json:JSONEncoder.encoed", "unknown name in 'json:JSONEncoder.encoed': 'encoed'. Did you mean 'encode'?"),
    ],
)
def test_a_name_that_leads_nowhere_says_where_it_ends(spec, message):
    with pytest.raises(TorchsliceError) as caught:
        import_object(spec)
    assert message in str(caught.value)


def test_the_current_directory_is_added_only_where_it_is_needed(own_folder):
    import_object("json:dumps")
    assert str(own_folder) not in sys.path


def test_a_mistake_inside_the_users_module_is_shown_as_it_is(own_folder):
    (own_folder / "own_nets_broken.py").write_text("import surely_not_installed")
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        import_object("own_nets_broken:make")


def test_a_missing_optional_package_gives_the_install_line():
    with pytest.raises(TorchsliceError, match=r"needs surely_missing, .* Run: pip install 'torchslice\[vision\]'"):
        import_optional("surely_missing.models", extra="vision")


def test_missing_torchvision_and_timm_give_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(TorchsliceError, match="needs timm"):
        import_timm()
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(TorchsliceError, match="needs torchvision"):
        import_torchvision()


def test_torchvision_and_timm_import_with_any_build_of_torch():
    assert import_torchvision().models.resnet18 and import_torchvision() is sys.modules["torchvision"]
    assert import_timm().create_model


def test_other_failures_of_torchvision_are_not_covered_up(monkeypatch):
    def fail(module, *, extra):
        raise RuntimeError("something else")

    monkeypatch.setattr(imports, "import_optional", fail)
    with pytest.raises(RuntimeError, match="something else"):
        import_torchvision()


def test_call_checks_the_users_arguments():
    def make(num_classes: int, *, width: float = 1.0) -> tuple[int, float]:
        if width < 0:
            raise TypeError("a mistake inside")
        return num_classes, width

    assert call(make, "model 'x'", num_classes=3, width=0.5) == (3, 0.5)
    with pytest.raises(TorchsliceError) as caught:
        call(make, "model 'x'", num_classes=3, widht=0.5)
    assert str(caught.value) == (
        "model 'x': got an unexpected keyword argument 'widht'. It takes: num_classes, width=1.0."
    )
    with pytest.raises(TypeError, match="a mistake inside"):
        call(make, "model 'x'", num_classes=3, width=-1.0)
    assert call(dict, "model 'x'", num_classes=3) == {"num_classes": 3}
