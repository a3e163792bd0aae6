"""README says what is so: its first recipe runs as printed, and its tables name what there is."""

import re
from pathlib import Path

import typer

import torchslice as ts
from torchslice.cli import COMMANDS, app

TEXT = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_first_recipe_runs_as_printed(tmp_path, monkeypatch):
    """What README leaves to the reader: a trained network, two DataLoaders, and the names of the classes."""
    monkeypatch.chdir(tmp_path)
    digits, model = ts.data.load("digits"), ts.models.create("convnet", channels=1, width=0.5)
    ts.fit(model, digits, ts.Training(epochs=2, batch_size=64, progress=False))
    train_loader, test_loader = (list(digits.batches(name, 128)) for name in ("train", "test"))
    names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    given = {"model": model, "train_loader": train_loader, "test_loader": test_loader, "names": names}
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(code, given)
    assert ts.load("pets.safetensors").classes == ("cat", "dog", "frog")


def test_every_command_and_no_other_is_in_the_table():
    assert re.findall(r"^\| `torchslice (\w+)", TEXT, re.MULTILINE) == list(COMMANDS)


def test_every_built_in_name_is_given():
    assert not [name for name in (*ts.models.names(), *ts.data.names()) if f"`{name}`" not in TEXT]


def test_the_options_in_the_text_exist():
    group = typer.main.get_command(app)
    known = {word for name in COMMANDS for p in group.resolve_command(None, [name])[1].params for word in p.opts}
    for code in re.findall(r"`([^`\n]+)`", TEXT):
        if "python -m benchmarks" not in code:
            assert set(re.findall(r"(?<!\S)--[a-z][a-z-]*", code)) <= known, code
