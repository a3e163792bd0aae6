"""torchslice slice, extract and evaluate, from a run to figures, and what they refuse."""

import json

import pytest
import torch

import torchslice as ts
from torchslice.runs import Run

from .conftest import TINY


def test_slice_writes_the_slices_and_reports_them(torchslice, run_copy):
    (run_copy / "slices.json").unlink()
    result = torchslice("slice", run_copy, "--by", "gates", "--threshold", 0.8, "--device", "cpu", "--json").json
    assert result["threshold"] == 0.8 and set(result["report"]["classes"]) == set("0123456789")
    stored = json.loads((run_copy / "slices.json").read_text())
    assert stored["report"] == result["report"] and stored["threshold"] == 0.8
    assert list(Run.open(run_copy).slices()) == list("0123456789")
    assert "mean" in torchslice("slice", run_copy, "--device", "cpu").out


def test_extract_saves_what_python_makes(torchslice, trained, tmp_path):
    path = tmp_path / "new" / "three.safetensors"
    result = torchslice("extract", trained, "--classes", "8,1,3", "--out", path, "--device", "cpu", "--json").json
    assert result["classes"] == ["1", "3", "8"] and 0 < result["neuron_retention"] <= 1
    assert list(result["validation_accuracy"]) == ["whole, restricted", "extracted", "recalibrated"]
    run, data = Run.open(trained), TINY.load_data()
    made = ts.reuse(
        run.gated(data, device="cpu"), data, slices=run.slices(), classes=["1", "3", "8"], progress=False, device="cpu"
    )
    small = ts.load(path)
    with torch.no_grad():
        assert torch.equal(small(data.example), made.model(data.example))
        logits = made.networks[made.kept](data.example)
        assert torch.allclose(small(data.example) * made.temperature, logits, rtol=1e-4, atol=1e-5)
    assert small.classes == ("1", "3", "8") and small.preprocessing == data.preprocessing


def test_extract_with_dropped_gates_and_fine_tuning(torchslice, trained, tmp_path):
    common = ("extract", trained, "--classes", "3,8", "--device", "cpu", "--json", "--out")
    folded, dropped = tmp_path / "folded.safetensors", tmp_path / "dropped.safetensors"
    assert torchslice(*common, folded).json["gates"] == "fold"
    tuned = torchslice(*common, dropped, "--gates", "drop", "--finetune", 1).json
    assert "fine-tuned" in tuned["validation_accuracy"] and tuned["best_epoch"] in (0, 1)
    norm = "features.1.1.weight"
    assert not torch.equal(ts.load(folded).state_dict()[norm], ts.load(dropped).state_dict()[norm])


def test_evaluate_scores_the_classes_of_the_artefact(torchslice, pair):
    result = torchslice("evaluate", pair, "digits", "--device", "cpu", "--json").json
    task = ts.data.load("digits").restrict(["3", "8"])
    assert result["accuracy"] == ts.accuracy(ts.load(pair), task).overall
    assert list(result["class_accuracy"]) == ["3", "8"] and set(result["latency"]) == {"1", "64"}
    assert result["macs"] > 0 and 0 < result["param_retention"] <= 1 and 0 <= result["calibration_error"] < 0.5
    text = torchslice("evaluate", pair, "digits", "--device", "cpu").out
    assert "accuracy" in text and "at batch 64" in text and "MACs" in text and "calibration error" in text


def test_a_saved_network_with_all_classes_needs_no_class_names(torchslice, tmp_path):
    path = tmp_path / "all.safetensors"
    ts.save(ts.models.create("convnet", channels=1, width=0.125), path)
    assert 0 <= torchslice("evaluate", path, "digits", "--device", "cpu", "--json").json["accuracy"] <= 1


def test_a_standard_run_has_no_gates(torchslice, standard, tmp_path):
    torchslice("slice", standard, "--by", "gates").refused(
        "--method standard", "no gates", "--by contribution", "--method mwt"
    )
    path = tmp_path / "x.safetensors"
    torchslice("extract", standard, "--classes", "3,8", "--out", path).refused("no slices yet", "--by contribution")


@pytest.mark.parametrize(
    ("classes", "parts"),
    [
        ("3", ["at least two classes", "'3'"]),
        ("3,eight", ["'eight'", "Known: 0, 1"]),
        ("3,3", ["each once"]),
        (",", ["at least one class"]),
    ],
)
def test_extract_refuses_classes(torchslice, trained, tmp_path, classes, parts):
    path = tmp_path / "x.safetensors"
    torchslice("extract", trained, "--classes", classes, "--out", path, "--device", "cpu").refused(*parts)
    assert not path.exists()


def test_extract_finds_an_unwritable_output_first(torchslice, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "load_data", lambda *_: pytest.fail("loaded"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "x.safetensors"):
        torchslice("extract", trained, "--classes", "3,8", "--out", out).refused("cannot write", str(out))


def test_runs_that_are_missing_foreign_damaged_or_stale(torchslice, run_copy, tmp_path):
    extract = ("extract", run_copy, "--classes", "3,8", "--out", tmp_path / "x.safetensors", "--device", "cpu")
    torchslice("slice", tmp_path / "nowhere").refused("no run", "torchslice train")
    checkpoint = run_copy / "training" / "checkpoint.safetensors"
    slices = (run_copy / "slices.json").read_text()
    weights = checkpoint.read_bytes()

    (run_copy / "slices.json").write_text(slices[:100])
    torchslice(*extract).refused("slices.json", "damaged")
    (run_copy / "slices.json").unlink()
    torchslice(*extract).refused("no slices yet", "torchslice slice")
    (run_copy / "slices.json").write_text(slices.replace('"weights_sha256": "', '"weights_sha256": "0'))
    torchslice(*extract).refused("other weights", "torchslice slice")

    checkpoint.write_bytes(weights[:1000])
    torchslice("slice", run_copy, "--device", "cpu").refused("checkpoint.safetensors", "damaged")
    checkpoint.unlink()
    torchslice("slice", run_copy, "--device", "cpu").refused("0 of 2 epochs")
    checkpoint.write_bytes(weights)

    recipe = json.loads((run_copy / "run.json").read_text())
    recipe["recipe"]["model_arguments"]["width"] = 0.25
    (run_copy / "run.json").write_text(json.dumps(recipe))
    torchslice("slice", run_copy, "--device", "cpu").refused("does not belong to the network")
    recipe["fingerprint"] = "0" * 16
    (run_copy / "run.json").write_text(json.dumps(recipe))
    torchslice("slice", run_copy, "--device", "cpu").refused("other images", "--data-dir")
    for text, part in (("{", "damaged"), ("[]", "damaged"), ("{}", "no 'format_version'")):
        (run_copy / "run.json").write_text(text)
        torchslice("slice", run_copy).refused("run.json", part)
    (run_copy / "run.json").write_text('{"format_version": 2, "recipe": {}, "fingerprint": ""}')
    torchslice("slice", run_copy).refused("newer torchslice")


def test_slice_refuses_a_threshold_above_one(torchslice, run_copy):
    torchslice("slice", run_copy, "--threshold", 1.5, "--device", "cpu").refused("(0, 1]", "1.5")


def test_artefacts_that_are_missing_damaged_or_for_other_data(torchslice, pair, tmp_path, wide_digits):
    torchslice("evaluate", tmp_path / "nowhere.safetensors", "digits").refused("no file")
    torchslice("evaluate", pair, "digist").refused("Did you mean 'digits'?")
    torchslice("evaluate", pair, wide_digits, "--device", "cpu").refused("1x8x8", "1x8x16")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(pair.read_bytes()[:-100])
    torchslice("evaluate", damaged, "digits").refused("damaged.safetensors")
    damaged.write_bytes(pair.read_bytes()[:-4] + b"\1\2\3\4")
    torchslice("evaluate", damaged, "digits").refused("does not match its hash")


def test_classes_that_the_data_do_not_have(torchslice, tmp_path):
    path = tmp_path / "pets.safetensors"
    model = ts.models.create("convnet", num_classes=2, channels=1, width=0.125)
    ts.save(model, path, classes=["cat", "dog"])
    torchslice("evaluate", path, "digits").refused("'cat'", "Known: 0, 1")


@pytest.fixture
def wide_digits(tmp_path, monkeypatch):
    """Name of a data set of one's own: the digits, twice as wide."""
    text = (
        "import dataclasses, torchslice as ts\n"
        "def load():\n"
        "    data = ts.data.load('digits')\n"
        "    wide = {n: ts.data.Split(s.images.repeat(1, 1, 1, 2), s.labels) for n, s in vars(data).items()\n"
        "            if isinstance(s, ts.data.Split)}\n"
        "    return dataclasses.replace(data, **wide)\n"
    )
    (tmp_path / "wide_digits_for_a_test.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return "wide_digits_for_a_test:load"
