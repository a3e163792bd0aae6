"""The names of commands and options are frozen; help is quick; streams and exit codes are kept apart."""

import json
import subprocess
import sys

import pytest
import typer

from torchslice.cli import app

COMMON = ["--seed", "--device", "--json"]
COMMANDS = {
    "demo": ["--out", *COMMON],
    "neurons": ["MODEL", "--num-classes", "--input-shape", "--model-argument", *COMMON],
    "train": [
        *("MODEL", "DATA", "--out", "--method", "--epochs", "--learning-rate", "--batch-size", "--retention"),
        *("--taper", "--standard-epochs", "--cohesion-weight", "--coupling-weight"),
        *("--precision", "--train-limit", "--model-argument", "--data-option", "--data-dir"),
        *COMMON,
    ],
    "slice": [
        *("RUN", "--by", "--threshold", "--metric", "--slicer", "--criterion", "--theta", "--slope", "--positions"),
        *("--share", "--taper", "--samples", "--gates", "--data-dir", *COMMON),
    ],
    "extract": [
        *("RUN", "--classes", "--out", "--finetune", "--learning-rate", "--gates", "--data-dir"),
        *COMMON,
    ],
    "restructure": [
        *("RUN", "--out", "--method", "--param-retention", "--mac-retention", "--latency-ms", "--no-slice", "--share"),
        *("--metric", "--rate", "--epochs", "--max-accuracy-loss", "--patience", "--learning-rate", "--data-dir"),
        *COMMON,
    ],
    "readapt": [
        *("RUN", "DATA", "--out", "--param-share", "--metric", "--classifier", "--replay", "--epochs"),
        *("--learning-rate", "--data-option", "--data-dir", *COMMON),
    ],
    "extend": [
        *(
            "SOURCE",
            "DATA",
            "--classes",
            "--out",
            "--share",
            "--metric",
            "--settle",
            "--widen",
            "--restart",
            "--replay",
        ),
        *("--epochs", "--learning-rate", "--allow-import", "--data-option", "--data-dir", *COMMON),
    ],
    "evaluate": ["ARTEFACT", "DATA", "--allow-import", "--data-option", "--data-dir", *COMMON],
    "bench": ["NAME", "--scale", "--out", "--data-dir", *COMMON],
}
HEAVY = ("torch", "torchvision", "timm", "sklearn", "scipy", "matplotlib", "numpy")


def test_commands_and_options_are_frozen():
    group = typer.main.get_command(app)
    names = {
        name: [p.metavar if p.param_type_name == "argument" else p.opts[0] for p in command.params]
        for name, command in group.commands.items()
    }
    assert names == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(torchslice, command):
    result = torchslice(command, "--help")
    assert result.code == 0 and not result.err
    assert "Example:" in result.out and f"torchslice {command}" in result.out


def test_slice_offers_what_there_is(torchslice):
    from torchslice import semantic

    text = torchslice("slice", "--help").out
    assert not [name for name in (*semantic.METRICS.names(), *semantic.SLICERS, *semantic.CRITERIA) if name not in text]


def test_no_command_shows_the_help(torchslice):
    result = torchslice()
    assert result.code == 0 and "torchslice demo" in result.out


def test_version(torchslice):
    assert torchslice("--version").out.startswith("torchslice 0.")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from torchslice.cli import main; main(['train', '--help']);"
        f"sys.exit(','.join(m for m in {HEAVY} if m in sys.modules) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and not result.stderr, result.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian"], ["trian", "torchslice --help"]),
        (["train", "convnet"], ["DATA", "torchslice train --help"]),
        (["train", "convnet", "digits", "--out", "x", "--epochs", "many"], ["--epochs", "integer"]),
        (["train", "convnet", "digits", "--out", "x", "--method", "modlar"], ["modlar", "modular", "mwt", "standard"]),
        (["neurons", "convnet", "--device", "tpu"], ["tpu", "auto", "cpu", "cuda"]),
        (["neurons", "convnet", "--colour"], ["--colour"]),
        (["extract", "run", "--classes", "1,2"], ["--out"]),
    ],
)
def test_usage_errors_are_one_line(torchslice, arguments, parts):
    result = torchslice(*arguments)
    result.refused(*parts)
    assert len(result.err.strip().splitlines()) == 1


def test_neurons_as_table_and_as_json(torchslice):
    result = torchslice("neurons", "convnet", "--input-shape", "1x8x8", "--device", "cpu")
    assert result.code == 0 and "features.0.0" in result.out and "class scores" in result.out
    found = torchslice(
        *("neurons", "convnet", "--input-shape", "1x8x8", "--num-classes", 4, "--model-argument", "width=0.25"),
        *("--device", "cpu", "--json"),
    ).json
    assert found["layers"]["features.0.0"]["count"] == 8 and found["pinned"] == {"classifier": "class scores"}
    assert found["model"] == {"factory": "convnet", "arguments": {"num_classes": 4, "channels": 1, "width": 0.25}}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["convnett"], ["'convnett'", "Did you mean 'convnet'?"]),
        (["convnet", "--input-shape", "3,32"], ["3,32", "3x32x32"]),
        (["resnet18", "--input-shape", "3x32"], ["[2, 3, 32]"]),
        (["convnet", "--model-argument", "widht=2"], ["widht", "width=1.0"]),
        (["convnet", "--model-argument", "width"], ["'width'", "NAME=VALUE"]),
        (["nowhere.nets:make"], ["nowhere"]),
    ],
)
def test_neurons_refuses(torchslice, arguments, parts):
    torchslice("neurons", *arguments, "--device", "cpu").refused(*parts)


def test_bench_hands_its_options_on_and_prints_its_table(torchslice, monkeypatch, tmp_path):
    from torchslice.bench import BENCHES

    seen = {}

    def tiny(scale, **options):
        seen.update(options, scale=scale)
        (tmp_path / "tiny-smoke.md").write_text("| a table |")
        return {"figure": 1}

    monkeypatch.setitem(BENCHES._entries, "tiny", tiny)
    arguments = ("bench", "tiny", "--scale", "smoke", "--out", tmp_path, "--seed", 3, "--device", "cpu")
    assert torchslice(*arguments).out == "| a table |\n"
    assert json.loads(torchslice(*arguments, "--json").out) == {"figure": 1}
    assert seen == {
        **{"scale": "smoke", "data_dir": None, "out": tmp_path, "seed": 3, "device": "cpu"},
        "progress": True,
    }
    torchslice("bench", "mtw").refused("'mtw'", "mwt")
    torchslice("bench", "tiny", "--scale", "huge").refused("huge", "smoke")
