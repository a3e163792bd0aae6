import json

import pytest

from torchslice.bench import BENCHES
from torchslice.bench.readapt_page import ARMS, to_target


def test_every_arm_in_every_scenario(tmp_path, monkeypatch):
    result = BENCHES["readapt"]("smoke", out=tmp_path, progress=False)
    assert json.loads((tmp_path / "readapt-smoke.json").read_text()) == json.loads(json.dumps(result))
    (run,) = result["runs"]
    found = {(row["scenario"], row["arm"]): row for row in run["rows"]}
    assert set(found) == {(scenario, arm) for scenario in ("fgsm", "contrast", "damage 30%") for arm in ARMS}
    shares = {arm: found["fgsm", arm].get("param_share") for arm in ARMS}
    assert shares["not adapted"] is None and shares["full fine-tuning"] == 1
    for one, other in (
        ("critical neurons", "random neurons"),
        ("critical neurons, equal shares", "random, equal shares"),
    ):
        assert shares[one] == shares[f"control: {other}"] < 0.25
    assert shares["last layer"] < shares["critical neurons"] <= 0.2 < shares["critical neurons, classifier"] < 0.3
    assert shares["low-rank adapters"] <= shares["critical neurons"]
    for row in found.values():
        assert 0 <= row["new_accuracy"] <= 1 and 0 <= row["clean_accuracy"] <= 1
        if row["arm"] != "not adapted":
            means = [(epoch["new_accuracy"] + epoch["clean_accuracy"]) / 2 for epoch in row["epochs"]]
            assert means[row["best_epoch"]] == max(means)
        if row["scenario"].startswith("damage"):
            assert row["new_accuracy"] == row["clean_accuracy"]
    clean = {row["clean_accuracy"] for row in found.values() if row["arm"] == "not adapted"}
    assert len(clean) == 2  # of the network, and of the damaged one
    page = (tmp_path / "readapt-smoke.md").read_text()
    assert (
        all(page.count(f"| {arm} |") == 2 for arm in ARMS) and "| new / clean | fgsm | contrast | damage 30% |" in page
    )
    monkeypatch.setattr("torchslice.bench.experiment.fit", None)  # what is finished is not run again
    assert BENCHES["readapt"]("smoke", out=tmp_path, progress=False)["runs"] == result["runs"]


def test_the_target_is_nine_tenths_of_the_gain_of_full_fine_tuning():
    def arm(*values: float, best: int = 2) -> dict:
        rows = [{"new_accuracy": value, "steps": 10 * n, "seconds": n / 2} for n, value in enumerate(values)]
        return {"epochs": rows, "best_epoch": best}

    arms = {
        "not adapted": {},
        "full fine-tuning": arm(0.2, 0.6, 0.8),
        "slow": arm(0.2, 0.5, 0.73),
        "late": arm(0.2, 0.3),
    }
    arms["exact"] = arm(0.2, 0.3, 0.2 + 0.9 * 0.6, 0.9)
    found = to_target(arms)
    assert {name: row and row["steps"] for name, row in found.items()} == {
        **{"full fine-tuning": 20, "slow": None, "late": None, "exact": 20},
    }
    assert found["exact"]["seconds"] == pytest.approx(1.0)
    assert to_target({"full fine-tuning": arm(0.9, 0.9, 0.905), "other": arm(0.9, 0.9, 0.99)}) == {}
