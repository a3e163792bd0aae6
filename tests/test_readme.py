"""The README says what is so: its Python runs as printed, its commands and names are those there are."""

import re
from pathlib import Path

import pytest

import torchslice as ts

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def readme() -> str:
    return README.read_text()


def test_the_python_runs_as_printed(readme, tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(block, names)
    assert ts.load("pair.safetensors").classes == ("3", "8")
    task = names["data"].restrict(["3", "8"])
    assert ts.accuracy(ts.load("pair.safetensors"), task, split="validation").overall > 0.9


def test_every_command_and_no_other_is_in_the_table(readme):
    import typer

    from torchslice.cli import app

    assert re.findall(r"^\| `torchslice (\w+)", readme, re.MULTILINE) == list(typer.main.get_command(app).commands)


def test_every_built_in_name_is_given(readme):
    assert not [name for name in (*ts.models.names(), *ts.data.names()) if f"`{name}`" not in readme]


def test_what_torchslice_is_called_in_prose_exists(readme):
    names = set(re.findall(r"\bts\.(\w+)", readme))
    assert names and not [name for name in names if not hasattr(ts, name)]
