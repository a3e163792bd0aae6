"""Bad input: every command ends with 2, before any work, says so in one line of its own words, and writes nothing."""

import os
import shlex

import pytest

TRAIN = "train convnet digits --out {out}"
SLICE = "slice {standard}"
EXTRACT = "extract {standard} --out {out} --classes"
RESTRUCTURE = "restructure {standard} --out {out}"
READAPT = "readapt {standard} --new digits --out {out}"
EXTEND = "extend {five} --new digits --out {out} --neuron-fraction 0.5 --classes"
REPLACE = "replace {standard} --out {out} --part"
REMOVE = "remove {subtasks} --out {out} --classes"
UPDATE = "update {subtasks} --out {out} --new digits --class"
COMPOSE = "compose {whole} {whole} --out {out}"
HALF = "--param-retention 0.5"
#: Refused before any data is loaded.
EARLY = [
    # no such command, argument or option
    ("trian", ["'trian'", "Did you mean 'train'?", "torchslice --help"]),
    ("--colour", ["--colour", "torchslice --help"]),
    ("train convnet", ["DATA", "torchslice train --help"]),
    ("train convnet digits", ["--out"]),
    (f"{TRAIN} --device meta", ["'meta'", "auto or cpu"]),
    ("store list {out}", ["there is no store", "store add"]),
    ("store verify {out}", ["there is no store", "store add"]),
    (f"{TRAIN} --colour red", ["--colour", "torchslice train --help"]),
    (f"{TRAIN} --epochs many", ["--epochs", "integer"]),
    (f"{TRAIN} extra", ["extra"]),
    ("extract {standard} --classes 1,2", ["--out"]),
    (f"{READAPT} --classes 1,2", ["--classes"]),
    ("extend {five} --new digits --out {out}", ["--classes"]),
    # names
    ("train convnt digits --out {out}", ["'convnt'", "Did you mean 'convnet'?"]),
    ("train nowhere.nets:make digist --out {out}", ["'digist'", "Did you mean 'digits'?"]),
    ("neurons convnett", ["'convnett'", "Did you mean 'convnet'?"]),
    ("neurons nowhere.nets:make", ["nowhere"]),
    ("evaluate convnett digits --weights {pt}", ["'convnett'"]),
    (f"{TRAIN} --method gatse", ["'gatse'", "Did you mean 'gates'?", "subtasks, gates, standard"]),
    (f"{TRAIN} --optimizer adam", ["'adam'", "'adamw'"]),
    (f"{TRAIN} --precision fp16", ["'fp16'", "fp32"]),
    (f"{SLICE} --metric tailor", ["'tailor'", "Did you mean 'taylor'?"]),
    (f"{SLICE} --criterion mas", ["'mas'", "cka, mass"]),
    (f"{SLICE} --strategy some", ["--strategy", "some", "reach-theta", "per-class"]),
    (f"{SLICE} --by luck", ["--by", "luck", "contribution"]),
    (f"{RESTRUCTURE} {HALF} --method lmap", ["lmap", "lamp", "uniform+", "structured"]),
    (f"{RESTRUCTURE} {HALF} --neuron-fraction 0.5 --metric tailor", ["'tailor'", "'taylor'"]),
    (f"{READAPT} --param-fraction 0.5 --metric tailor", ["'tailor'", "'taylor'"]),
    *(
        (f"{words} --device tpu", ["'tpu'"])
        for words in (TRAIN, SLICE, "neurons convnet", "evaluate {standard}", "demo")
    ),
    *((f"{words} --device tpu", ["'tpu'"]) for words in (f"{EXTRACT} 3,8", READAPT, f"{EXTEND} 5,6")),
    # values
    (f"{TRAIN} --epochs 0", ["--epochs must be", "at least 1, got 0"]),
    (f"{TRAIN} --batch-size 1", ["--batch-size", "at least 2, got 1"]),
    (f"{TRAIN} --seed 99999999999999999999", ["--seed"]),
    (f"{TRAIN} --learning-rate -1", ["--learning-rate", "above 0"]),
    (f"{TRAIN} --learning-rate nan", ["--learning-rate", "above 0"]),
    (f"{TRAIN} --momentum 1", ["--momentum", "[0, 1)"]),
    (f"{TRAIN} --weight-decay -1", ["--weight-decay", "0 or more"]),
    (f"{TRAIN} --label-smoothing 1", ["--label-smoothing", "[0, 1)"]),
    (f"{TRAIN} --warmup-fraction 1", ["--warmup-fraction", "[0, 1)"]),
    (f"{TRAIN} --method gates --coupling-weight -1", ["--coupling-weight must be 0 or more"]),
    (f"{TRAIN} --epochs 3 --standard-epochs 3", ["--standard-epochs 3 and --epochs 3"]),
    (f"{TRAIN} --train-limit 0", ["--train-limit"]),
    (f"{TRAIN} --model-argument width", ["'width'", "NAME=VALUE"]),
    ("neurons convnet --model-argument spec=x", ["'spec' cannot be set"]),
    ("neurons convnet --model-argument num_classes=x", ["at least 1 class"]),
    *((f"{TRAIN} --data-option {name}=1", ["cannot be set"]) for name in ("seed", "data_dir", "name")),
    ("neurons convnet --input-shape 3,32", ["--input-shape", "3x32x32", "'3,32'"]),
    ("neurons convnet --input-shape 99999x99999x99999", ["--input-shape", "memory"]),
    ("neurons convnet --num-classes 0", ["--num-classes"]),
    ("neurons convnet --model-argument widht=2", ["'widht'", "width=1.0"]),
    ("neurons convnet --seed 99999999999999999999", ["--seed"]),
    ("groups {standard} --outside 1", ["--outside must be in [0, 1)"]),
    ("groups {standard} --count 0", ["--count"]),
    ("groups {standard} --metric tailor", ["'tailor'", "Did you mean 'taylor'?"]),
    (f"{SLICE} --strategy by-group --outside -1", ["--outside must be in [0, 1)"]),
    (f"{SLICE} --outside 0.3", ["--outside plays no part"]),
    ("plot {standard} --out {out}", ["is written as .png, .svg or .pdf"]),
    ("plot {standard} --what tre --out {out}", ["tre", "sharing"]),
    ("plot {standard} --layer x --what tree --out x.png", ["--layer plays no part with --what tree"]),
    ("plot {pt} --what training --out x.png", ["is no run, so nothing is known of its training"]),
    ("plot {standard} --what training --metric avg --out x.png", ["--metric plays no part with --what training"]),
    ("report {standard}", ["--out"]),
    ("report {standard} --slices {file} --out {out}", ["--slices plays no part without --classes"]),
    ("report {standard} --out {out} --metric tailor", ["'tailor'", "Did you mean 'taylor'?"]),
    (f"{SLICE} --theta 0", ["--theta must be in (0, 1]"]),
    (f"{SLICE} --slope -1", ["--slope", "at least 0"]),
    (f"{SLICE} --strategy per-class --neuron-fraction 2", ["--neuron-fraction must be in (0, 1]"]),
    ("slice {subtasks} --share 2", ["--share must be in (0, 1]"]),
    (f"{SLICE} --samples-per-class 0", ["--samples-per-class"]),
    ("slice {gates} --frequency-threshold 1.5", ["--frequency-threshold must be in (0, 1]"]),
    ("slice {gates} --frequency-threshold nan", ["--frequency-threshold"]),
    (f"{EXTRACT} 3,8 --finetune -1", ["--finetune"]),
    (f"{EXTRACT} 3,8 --finetune 1 --learning-rate 0", ["--learning-rate must be"]),
    (RESTRUCTURE, ["give one target of --param-retention, --mac-retention, --latency-ms", "none"]),
    (f"{RESTRUCTURE} {HALF} --latency-ms 1", ["got --param-retention, --latency-ms"]),
    (f"{RESTRUCTURE} --latency-ms 1", ["zeros do not make a network faster", "--method 'structured'"]),
    (f"{RESTRUCTURE} --param-retention 1.5", ["--param-retention must be in (0, 1)"]),
    (f"{RESTRUCTURE} --mac-retention nan", ["--mac-retention must be in (0, 1)"]),
    (f"{EXTRACT} 3,8 --mac-retention 1.5", ["--mac-retention must be in (0, 1]"]),
    (f"{EXTRACT} 3,8 --latency-ms 0", ["--latency-ms must be above 0"]),
    (f"{EXTRACT} 3,8 --mac-retention 0.5 --param-retention 0.5", ["--mac-retention, --param-retention"]),
    (f"{EXTRACT} 3,8 --mac-retention 0.5 --slices {{file}}", ["class slices have no order", "leave out --slices"]),
    (f"{RESTRUCTURE} {HALF} --prune-fraction 1.5", ["--prune-fraction", "(0, 1)", "1.5"]),
    (f"{RESTRUCTURE} {HALF} --max-accuracy-loss 2", ["--max-accuracy-loss", "[0, 1]"]),
    (f"{RESTRUCTURE} {HALF} --patience -1", ["--patience"]),
    (f"{RESTRUCTURE} {HALF} --neuron-fraction 4", ["--neuron-fraction must be in (0, 1]"]),
    (f"{RESTRUCTURE} {HALF} --neuron-fraction 1", ["--neuron-fraction 1", "--no-slice"]),
    (f"{READAPT} --param-fraction 2", ["--param-fraction must be in (0, 1]"]),
    (f"{READAPT} --param-fraction 1", ["--param-fraction 1", "every neuron"]),
    (f"{READAPT} --replay some", ["--replay 'some'"]),
    (f"{READAPT} --replay 0,-1", ["--replay must be 0 or more"]),
    (f"{READAPT} --replay nan", ["--replay"]),
    (f"{EXTEND} 5,6 --replay 2", ["--replay"]),
    (f"{EXTEND} 5,6 --settle -1", ["--settle"]),
    (f"{EXTEND} 5,6 --widen 0.5", ["--widen must be above 1"]),
    (f"{EXTEND} 5,6 --widen nan", ["--widen must be above 1"]),
    ("extend {five} --new digits --out {out} --classes 5,6 --neuron-fraction 1", ["every neuron", "--widen"]),
    ("replace {standard} --out {out}", ["--part"]),
    (f"{REPLACE} 3", ["--part '3' must be CLASS=FILE"]),
    (f"{REPLACE} 3={{whole}} --part 3={{whole}}", ["once for every class"]),
    (f"{REPLACE} 3={{tmp}}/nowhere", ["no file", "nowhere"]),
    (f"{REPLACE} 3={{file}}", ["safetensors"]),
    (f"{COMPOSE} --data digits", ["2 files need as many data sets", "got 1"]),
    ("compose {whole} --data digits", ["--out"]),
    ("remove {subtasks} --out {out}", ["--classes"]),
    (f"{REMOVE} 3 --control --epochs 0", ["--epochs must be"]),
    (f"{REMOVE} 3 --device tpu", ["'tpu'"]),
    ("update {subtasks} --out {out} --class 3", ["--new"]),
    (f"{UPDATE} 3 --momentum 0.5", ["--momentum plays no part with --optimizer adamw"]),
    # options that play no part
    (f"{REMOVE} 3 --learning-rate 0.1", ["--learning-rate plays no part without --control"]),
    (f"{TRAIN} --coupling-weight 1", ["--coupling-weight plays no part", "--method gates"]),
    (f"{TRAIN} --method standard --standard-epochs 1", ["--standard-epochs plays no part", "--method subtasks"]),
    (f"{TRAIN} --method gates --label-smoothing 0.1", ["--label-smoothing plays no part with --method gates"]),
    (f"{TRAIN} --optimizer adamw --momentum 0.5", ["--momentum plays no part with --optimizer adamw"]),
    (f"{SLICE} --frequency-threshold 0.8", ["--frequency-threshold plays no part", "--by gates"]),
    ("slice {gates} --metric var", ["--metric plays no part", "--by contribution"]),
    ("slice {gates} --theta 0.9", ["--theta plays no part", "--by contribution"]),
    ("slice {gates} --strategy per-class", ["--strategy plays no part", "--by contribution"]),
    ("slice {gates} --samples-per-class 5", ["--samples-per-class plays no part"]),
    ("slice {gates} --gates fold", ["--gates plays no part"]),
    ("slice {subtasks} --theta 0.5", ["--theta plays no part with --by training"]),
    (
        f"{SLICE} --neuron-fraction 0.5",
        ["--neuron-fraction plays no part", "--strategy per-class or per-layer"],
    ),
    (f"{SLICE} --strategy per-layer --theta 0.9", ["--theta plays no part", "--strategy reach-theta"]),
    (f"{EXTRACT} 3,8 --learning-rate 0.1", ["--learning-rate plays no part without --finetune"]),
    (f"{RESTRUCTURE} {HALF} --metric var", ["--metric plays no part without --neuron-fraction"]),
    (f"{RESTRUCTURE} {HALF} --no-slice --neuron-fraction 0.5", ["--no-slice", "--neuron-fraction"]),
    (f"{RESTRUCTURE} {HALF} --slices {{out}} --neuron-fraction 0.5", ["--neuron-fraction", "--slices plays no part"]),
    (f"{READAPT} --metric var", ["--metric plays no part without --param-fraction"]),
    (f"{READAPT} --momentum 0.5", ["--momentum plays no part with --optimizer adamw"]),
    ("extend {five} --new digits --classes 5,6 --metric var --out {out}", ["--metric plays no part"]),
    # what a source is
    ("slice {tmp}/nowhere", ["nowhere", "--out FILE"]),
    ("export {whole} --out {out}.onnx", ["DATA"]),
    ("export {standard} --out {out}.onxn", ["'onxn'", "Did you mean 'onnx'?"]),
    ("export {standard} --out {out}", ["onnx, pt2"]),
    ("export {standard} --out {out}.bin --format tflite", ["'tflite'", "onnx, pt2"]),
    ("evaluate nowhere", ["nowhere is no folder of a run", "nowhere DATA"]),
    ("evaluate {standard} digits", ["knows its data", "DATA"]),
    (f"{SLICE} --weights {{pt}}", ["its own weights", "--weights"]),
    (f"{SLICE} --model-argument width=1", ["its own weights", "--model-argument"]),
    (f"{SLICE} --data-option workers=1", ["--data-option", "play no part"]),
    ("evaluate {whole} digits --weights {pt}", ["its own weights", "--weights"]),
    ("evaluate {whole}", ["DATA"]),
    ("evaluate convnet digits", ["untrained", "--weights FILE"]),
    ("evaluate timm:resnet18.a1_in1k digits", ["untrained", "--weights FILE"]),
    ("evaluate convnet digits --weights {tmp}/nowhere.pt", ["no file", "nowhere.pt"]),
    ("slice convnet digits --weights {pt}", ["--out FILE"]),
    (f"{EXTRACT} 3,8 --slices {{tmp}}/nowhere.json", ["no file", "nowhere.json"]),
    ("extend {whole} --classes 5,6 --out {out}", ["--new DATA"]),
    (f"{SLICE} --by gates", ["has no gates", "--by contribution"]),
    (f"{SLICE} --by training", ["given no rankings", "--by contribution"]),
    ("slice {subtasks} --by gates", ["has no gates", "--by training"]),
    ("slice {whole} digits --by training --out {out}", ["--by contribution"]),
    # what is written
    *((f"{words} --out {{tmp}}", ["cannot write", "folder"]) for words in (SLICE, "extract {standard} --classes 3,8")),
    ("extract {standard} --classes 3,8 --out {file}", ["exists", "--force"]),
    ("extract {standard} --classes 3,8 --out {pipe} --force", ["a device or a pipe"]),
    ("extract {standard} --classes 3,8 --out {standard}/part.safetensors", ["folder of a run"]),
    ("extract {standard} --classes 3,8 --out {standard}/run.json --force", ["folder of a run"]),
    ("train convnet digits --out {file}", ["cannot write", "folder"]),
    ("train convnet digits --out {file}/run", ["cannot write", "folder"]),
    ("train convnet digits --out {tmp}", ["is no run", "empty folder"]),
    (
        "train convnet digits --out {standard} --epochs 3 --learning-rate 0.2",
        [
            *("--method was 'standard', now 'subtasks'", "--epochs was 2, now 3", "--learning-rate was 0.1, now 0.2"),
            *("--batch-size was 64, now 128", "--model-argument was {'width': 0.125}, now {}", "another folder"),
        ],
    ),
]
#: Refused once the data are loaded.
LATE = [
    ("report {standard} --out {out} --classes 3,12", ["'12'"]),
    ("report {standard} --out {out} --classes 3", ["at least two classes, got '3' alone"]),
    ("plot {standard} --what overlap --layer nowhere --out x.png", ["unknown layer 'nowhere'"]),
    ("groups {standard} --count 11", ["--count must be 1 to 10", "got 11"]),
    ("train convnet folder:{tmp}/nowhere --out {out}", ["nowhere", "one sub-folder"]),
    ("train convnet cifar10 --out {out}", ["cifar10", "cifar-10-batches-py", "--data-dir"]),
    (f"{TRAIN} --data-option colour=1", ["colour"]),
    *((f"{TRAIN} --data-option {name}=1", ["takes no options", name]) for name in ("path", "split")),
    (f"{TRAIN} --data-option validation_fraction=x", ["between 0 and 1, got 'x'"]),
    (f"{TRAIN} --model-argument channels=3", ["[2, 1, 8, 8]"]),
    (f"{TRAIN} --model-argument num_classes=3 --method standard", ["3 logits", "10 different classes"]),
    (f"{TRAIN} --model-argument width=abc", ["'convnet'", "__round__"]),
    (f"{TRAIN} --model-argument width=0", ["no neuron", "single neuron"]),
    (f"{TRAIN} --train-limit 5", ["class '0'", "no training sample", "--train-limit"]),
    (f"{SLICE} --gates drop", ["--gates plays no part"]),
    (f"{EXTRACT} 3,8 --gates drop", ["--gates plays no part"]),
    (f"{EXTRACT} 3", ["at least two classes, got '3' alone"]),
    (f"{EXTRACT} 3,eight", ["'eight'", "Known: 0, 1"]),
    (f"{EXTRACT} 3,3", ["each once"]),
    (f"{EXTRACT} ,", ["at least one class"]),
    (f"{EXTRACT} 3,8", ["no slices yet", "torchslice slice"]),
    (f"{EXTRACT} 3,8 --slices {{standard}}/run.json", ["not of torchslice"]),
    (f"{RESTRUCTURE} {HALF}", ["no slices yet", "torchslice slice"]),
    (READAPT, ["no slices yet", "torchslice slice"]),
    (f"{READAPT} --new {{own}}:letters", ["'a'", "Known: 0, 1"]),
    (f"{READAPT} --param-fraction 0.3 --new {{own}}:wide", ["1x8x16", "1x8x8"]),
    (f"{REPLACE} ten={{whole}}", ["'ten'", "Known: 0, 1"]),
    (f"{COMPOSE} --data digits --data digits", ["class '0' is named twice"]),
    ("compose {whole} --out {out} --data digits", ["at least two parts, got 1"]),
    (f"{REMOVE} ten", ["'ten'", "Known: 0, 1"]),
    (f"{REMOVE} 0,1,2,3,4,5,6,7,8", ["1 of 10 classes left", "leave two"]),
    ("remove {standard} --out {out} --classes 3", ["no slices yet", "torchslice slice"]),
    (f"{UPDATE} ten", ["'ten'", "Known: 0, 1"]),
    (f"{UPDATE} 3 --replay 0", ["--replay must be above 0"]),
    (f"{UPDATE} 3 --new {{own}}:wide", ["1x8x16", "1x8x8"]),
    (f"{EXTEND} 4,5", ["knows '4' already"]),
    (f"{EXTEND} 5", ["a single new class ('5')", "--replay"]),
    (f"{EXTEND} 5,ten", ["'ten'", "Known: 0, 1"]),
    (f"{EXTEND} 5,6 --new {{own}}:wide", ["1x8x16", "1x8x8"]),
    ("extend {five} --new digits --classes 5,6 --out {out}", ["no slices yet", "torchslice slice"]),
]


@pytest.fixture
def places(standard, gates, subtasks, five, sources, shared, own, tmp_path):
    """What stands for the names in braces."""
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    runs = {"standard": standard, "gates": gates, "subtasks": subtasks, "five": five, "own": own}
    files = {
        "pt": sources["pt"][-1],
        "whole": sources["artefact"][0],
        "file": tmp_path / "file",
        "pipe": tmp_path / "pipe",
    }
    return {**runs, **files, "tmp": tmp_path, "out": tmp_path / "out"}


@pytest.fixture
def refuse(torchslice, places, shared, tmp_path):
    """Run a command that has to be refused and compare the files before and after."""

    def files():
        return {path: path.stat().st_mtime_ns for top in (shared, tmp_path) for path in sorted(top.rglob("*"))}

    def run(line, parts):
        before = files()
        torchslice(*shlex.split(line.format(**places))).refused(*parts)
        assert files() == before

    return run


@pytest.mark.parametrize(("line", "parts"), EARLY, ids=[line for line, _ in EARLY])
def test_before_any_data_are_loaded(refuse, monkeypatch, line, parts):
    import torchslice.data

    known = torchslice.data.names()
    load = torchslice.data.load
    monkeypatch.setattr(
        "torchslice.data.load", lambda name, *a, **k: load(name) if name not in known else pytest.fail("loaded")
    )
    refuse(line, parts)


@pytest.mark.parametrize(("line", "parts"), LATE, ids=[line for line, _ in LATE])
def test_before_any_work(refuse, monkeypatch, tmp_path, line, parts):
    monkeypatch.setattr("urllib.request.urlopen", _no_network)
    monkeypatch.setenv("TORCHSLICE_DATA", str(tmp_path))
    refuse(line, parts)


def _no_network(*args, **kwargs):
    raise OSError("no network")
