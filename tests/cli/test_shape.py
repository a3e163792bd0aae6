"""The names of commands and options are frozen; help is quick; streams and exit codes are kept apart."""

import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
import typing

import pytest
import typer

from torchslice.cli import COMMANDS, app, main

TRAINING = {
    **{
        "epochs": 10,
        "learning_rate": 0.1,
        "batch_size": 128,
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": 1e-3,
    },
    **{"warmup_fraction": 0.2, "label_smoothing": 0.1, "seed": 0, "device": "auto", "precision": "auto"},
}
OPENING = {
    **{"weights": None, "slices": None, "model_argument": None, "data_option": None, "data_dir": None},
    "allow_import": False,
}
RUNNING = {"seed": 0, "device": "auto", "json": False}
SOURCE, OUT = {"SOURCE": None, "[DATA]": None}, {"out": None, "force": False}
TABLE = {
    "demo": {"out": None, **RUNNING},
    "neurons": {"MODEL": None, "num_classes": 10, "input_shape": "3x32x32", "model_argument": None, **RUNNING},
    "train": {
        **{"MODEL": None, "DATA": None, "out": None, "method": "subtasks", "standard_epochs": None},
        **{"cohesion_weight": 0.5, "coupling_weight": 1.5},
        **TRAINING,
        **{"epochs": 30, "train_limit": None, "model_argument": None, "data_option": None, "data_dir": None},
        "json": False,
    },
    "slice": {
        **SOURCE,
        **{name: default for name, default in OPENING.items() if name != "slices"},
        **{"by": None, "frequency_threshold": 0.9, "metric": "taylor", "samples_per_class": 256},
        **{"strategy": "reach-theta", "theta": None, "slope": None, "criterion": None},
        **{"neuron_fraction": None, "outside": None, "tied": True, "share": 0.3, "gates": "fold", **OUT, **RUNNING},
    },
    "groups": {
        **SOURCE,
        **{name: default for name, default in OPENING.items() if name != "slices"},
        **{"metric": "taylor", "samples_per_class": 256, "outside": 0.5, "count": None, **RUNNING},
    },
    "extract": {
        **{**SOURCE, **OPENING, **OUT, "classes": None, "finetune": None, "gates": "fold"},
        **{"mac_retention": None, "param_retention": None, "latency_ms": None, "round_to": 8},
        **{name: default for name, default in TRAINING.items() if name != "epochs"},
        "json": False,
    },
    "restructure": {
        **{**SOURCE, **OPENING, **OUT, "method": "lamp", "param_retention": None, "mac_retention": None},
        **{"latency_ms": None, "no_slice": False, "neuron_fraction": None, "metric": "taylor", "prune_fraction": 0.2},
        **{"max_accuracy_loss": 0.01, "patience": 0, **TRAINING, "epochs": 3, "learning_rate": 0.01, "json": False},
    },
    "readapt": {
        **{**SOURCE, **OPENING, **OUT, "new": None, "param_fraction": None, "metric": "taylor", "classifier": False},
        **{"replay": "1", **TRAINING, "learning_rate": 0.005, "batch_size": 64, "optimizer": "adamw", "json": False},
    },
    "extend": {
        **{**SOURCE, **OPENING, **OUT, "classes": None, "new": None, "neuron_fraction": None, "metric": "taylor"},
        **{"settle": 0, "widen": None, "restart": True, "replay": 0.0, **TRAINING, "json": False},
    },
    "replace": {
        **{**SOURCE, **{name: x for name, x in OPENING.items() if name != "slices"}, **OUT, **RUNNING},
        **{"part": None, "renormalise": False},
    },
    "compose": {
        **{"FILE...": None, "data": None, "data_option": None, "data_dir": None, "allow_import": False},
        **{**OUT, "renormalise": False, "seed": 0, "json": False},
    },
    "remove": {
        **{**SOURCE, **OPENING, **OUT, "classes": None, "control": False, **TRAINING, "json": False},
    },
    "update": {
        **{**SOURCE, **OPENING, **OUT, "class": None, "new": None, "replay": 5.0, **TRAINING},
        **{"learning_rate": 0.005, "batch_size": 64, "optimizer": "adamw", "json": False},
    },
    "export": {
        **{**SOURCE, **{name: x for name, x in OPENING.items() if name != "slices"}, "out": None, "force": False},
        **{"format": None, "seed": 0, "json": False},
    },
    "store add": {"STORE": None, "FILE...": None, "force": False, "json": False},
    "store list": {"STORE": None, "json": False},
    "store search": {"STORE": None, "classes": "", "min_accuracy": None, "max_parameters": None, "json": False},
    "store show": {"STORE": None, "NAME": None, "json": False},
    "store verify": {"STORE": None, "json": False},
    "store remove": {"STORE": None, "NAME": None, "json": False},
    "store push": {"STORE": None, "NAME": None, "USER/REPOSITORY": None, "public": False, "json": False},
    "store pull": {"STORE": None, "USER/REPOSITORY": None, "NAME": None, "force": False, "json": False},
    "report": {
        **{**SOURCE, **OPENING, **OUT, **RUNNING},
        **{"classes": None, "metric": "taylor", "samples_per_class": 128},
    },
    "plot": {
        **{**SOURCE, **OUT, **RUNNING},
        **{name: default for name, default in OPENING.items() if name != "slices"},
        **{"what": "tree", "layer": None, "metric": "taylor", "samples_per_class": 128},
    },
    "evaluate": {**SOURCE, **{name: x for name, x in OPENING.items() if name != "slices"}, **RUNNING},
}
HEAVY = ("torch", "torchvision", "timm", "sklearn", "scipy", "matplotlib", "numpy")


def command(name):
    found = typer.main.get_command(app)
    for word in name.split():
        found = found.resolve_command(None, [word])[1]
    return found


def function(name):
    """What a command runs."""
    module, _, own = name.partition(" ")
    return getattr(importlib.import_module(f"torchslice.cli.{module}"), "list_" if own == "list" else own or module)


def test_commands_are_frozen():
    assert [*COMMANDS] == [*dict.fromkeys(name.split()[0] for name in TABLE)]
    assert {f"store {name}" for name in command("store").commands} == {n for n in TABLE if n.startswith("store ")}


@pytest.mark.parametrize("name", TABLE)
def test_options_and_their_defaults_are_frozen(name):
    found = {}
    for parameter in command(name).params:
        is_argument = parameter.param_type_name == "argument"
        word = parameter.metavar if is_argument else parameter.opts[0].removeprefix("--").replace("-", "_")
        found[word] = parameter.default
    assert found == TABLE[name]


@pytest.mark.parametrize("name", TABLE)
def test_the_help_of_a_command(torchslice, name):
    text = inspect.getdoc(function(name))
    if name in COMMANDS:
        assert text.splitlines()[0] == COMMANDS[name]
    assert [p.help for p in command(name).params if p.param_type_name == "option" and not p.help] == []
    result = torchslice(*name.split(), "--help")
    assert result.code == 0 and not result.err
    (example,) = re.findall(r"Example:  torchslice (.*)", text)
    assert example.startswith(f"{name} ") and "Example:" in result.out
    command(name).make_context(name, shlex.split(example.removeprefix(name)))
    assert torchslice(*name.split(), "-h").out == result.out


def test_no_command_shows_the_help(torchslice):
    result = torchslice()
    assert result.code == 0 and result.out == torchslice("--help").out
    assert not [name for name in COMMANDS if f" {name} " not in result.out]


def test_slice_offers_what_there_is(torchslice):
    from torchslice import semantic
    from torchslice.cli.slice import STRATEGIES

    text = torchslice("slice", "--help").out
    assert not [name for name in (*semantic.METRICS.names(), *STRATEGIES) if name not in text]


def test_restructure_offers_what_there_is():
    from torchslice.cli.restructure import Removal
    from torchslice.maintain import PRUNING

    assert [*typing.get_args(Removal)] == [*PRUNING.names(), "structured"]


def test_train_offers_what_there_is():
    from torchslice.runs import METHODS
    from torchslice.training.placement import PRECISIONS
    from torchslice.training.settings import OPTIMIZERS

    texts = {parameter.name: parameter.help for parameter in command("train").params}
    for name, known in (("method", METHODS), ("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
        assert not [word for word in known if word not in texts[name]]


def test_version(torchslice):
    result = torchslice("--version")
    assert result.code == 0 and result.out.startswith("torchslice 0.") and result.out.count("\n") == 1


def fresh(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=settings)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["trian"]])
def test_nothing_heavy_is_imported_before_a_command_is_known(arguments):
    code = (
        f"import sys; from torchslice.cli import main; main({arguments});"
        f"sys.exit(','.join(m for m in {HEAVY} if m in sys.modules) or 0)"
    )
    assert fresh(code).returncode == 0


def complete(*words: str, code: str = "from torchslice.cli import main; main()") -> list[str]:
    """Return what bash is offered for the last of the words."""
    typed = {"COMP_WORDS": " ".join(["torchslice", *words]), "COMP_CWORD": str(len(words))}
    result = fresh(code, _TORCHSLICE_COMPLETE="complete_bash", **typed)
    assert not result.stderr, result.stderr
    return result.stdout.split()


def test_completion_of_commands_imports_nothing_heavy():
    code = (
        "import atexit, sys; from torchslice.cli import main;"
        f"atexit.register(lambda: print(*(m for m in {HEAVY} if m in sys.modules))); main()"
    )
    assert sorted(complete("re", code=code)) == ["readapt", "remove", "replace", "report", "restructure"]
    assert complete("", code=code) == [*COMMANDS]


def test_completion_of_options():
    assert complete("train", "--lea") == ["--learning-rate"]


def test_ctrl_c_says_what_was_kept(torchslice, monkeypatch, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("torchslice.graph.find.find_neurons", interrupted)
    monkeypatch.setattr("torchslice.cli.neurons.find_neurons", interrupted)
    result = torchslice("neurons", "convnet", "--device", "cpu")
    assert (result.code, result.out) == (130, "")
    assert result.err == "torchslice: Interrupted; nothing half-written was left.\n"


def test_the_command_is_installed():
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="console_scripts", name="torchslice")
    assert entry.load() is main


def test_processes_of_torchrun_speak_once(torchslice, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    result = torchslice("neurons", "convnet", "--device", "cpu")
    assert (result.code, result.out, result.err) == (0, "", "")


def test_neurons_as_table_and_as_json(torchslice):
    result = torchslice("neurons", "convnet", "--input-shape", "1x8x8", "--device", "cpu")
    assert result.code == 0 and not result.err and "features.0.0" in result.out and "logits" in result.out
    options = ("--input-shape", "1x8x8", "--num-classes", 4, "--model-argument", "width=0.25", "--device", "cpu")
    found = torchslice("neurons", "convnet", *options, "--json").json
    assert found["layers"]["features.0.0"]["count"] == 8 and [*found["pinned"]] == ["classifier"] == found["head"]
    assert found["arguments"] == {"num_classes": 4, "channels": 1, "width": 0.25} and found["neurons"] == 112
