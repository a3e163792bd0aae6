import json

import pytest

from torchslice.bench import BENCHES
from torchslice.bench.restructure import SETTINGS, steps_to_kept
from torchslice.bench.restructure_page import ARMS
from torchslice.use.pruning import PRUNING
from torchslice.use.restructured import Restructured, Step


def test_every_method_from_every_start(tmp_path, monkeypatch):
    settings = SETTINGS["smoke"]
    result = BENCHES["restructure"]("smoke", out=tmp_path, progress=False)
    assert json.loads((tmp_path / "restructure-smoke.json").read_text()) == json.loads(json.dumps(result))
    (run,) = result["runs"]
    found = {(row["method"], row["arm"]): row for row in run["rows"]}
    assert set(found) == {(method, arm) for method in (*PRUNING.names(), "structured") for arm in ARMS}
    for (method, arm), row in found.items():
        assert 0 <= row["compression"] <= 1 - settings.param_retention + 0.01 and 0 <= row["test_accuracy"] <= 1
        steps = row["steps"]
        least = steps[0]["validation_accuracy"] - settings.max_accuracy_loss - 1e-9
        assert row["compression"] == 0 or any(
            1 - step["param_retention"] == row["compression"] and step["validation_accuracy"] >= least for step in steps
        )
        assert ("cut" in [step["name"] for step in steps]) == (arm != "whole")
        if method != "structured":
            assert row["trainings"] >= 2 and row["seconds"] > 0
    sizes = {arm: found["lamp", arm]["steps"][1]["param_retention"] for arm in ("slice", "random")}
    assert sizes["slice"] == pytest.approx(sizes["random"], abs=0.01) and sizes["slice"] < 1
    page = (tmp_path / "restructure-smoke.md").read_text()
    assert all(f"| {method}, {arm} |" in page for method, arm in found) and "## lenet on digits" in page
    monkeypatch.setattr("torchslice.bench.experiment.fit", None)  # what is finished is not run again
    assert BENCHES["restructure"]("smoke", out=tmp_path, progress=False)["runs"] == result["runs"]


def test_rows_up_to_the_network_that_was_kept():
    steps = tuple(Step(name, 1.0, 1.0, 0.0, None, 0.5, 1.0) for name in ("whole", "iteration 1", "iteration 2"))
    assert steps_to_kept(Restructured(None, "lamp", steps, "iteration 1", "accuracy")) == list(steps[:2])
    assert Restructured(None, "lamp", steps, "iteration 1", "accuracy").iterations == 2
