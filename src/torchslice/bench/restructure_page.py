"""The page of the bench restructure."""

from __future__ import annotations

from typing import Any

from .experiment import spread, table

SHARES = ("compression", "test_accuracy", "target_test_accuracy")


def markdown(result: dict[str, Any]) -> str:
    """Write one table per network: a row per method and arm."""
    about, settings = result["manifest"], result["manifest"]["settings"]
    target = f"{1 - settings['param_retention']:.0%}"
    lines = [
        "# Restructuring",
        "",
        f"`{about['command']}`: {settings['seeds']} seeds; {about['processor']}, accelerator "
        f"{about['accelerator'] or 'none'}, torch {about['torch']}, Python {about['python']}.",
        "",
        f"Every iteration removes {settings['rate']:.0%} of the surviving weights and trains "
        f"{settings['epochs_per_iteration']} epoch(s), up to {settings['patience']} time(s) again where more than "
        f"{settings['max_accuracy_loss']:.0%} of validation accuracy is lost. Compression is the share of parameters "
        "that are gone, the largest within that loss, 0 where even the cut slice loses more; the test accuracy beside "
        f"it is that of the network kept. Then to {target} compression, whatever it costs: how many trainings it takes "
        "(that of the cut slice included), their time, and test accuracy at the end. Mean ± standard deviation.",
        "",
        *(f"- **{arm}**: {meaning}." for arm, meaning in result["arms"].items()),
    ]
    headings = ["method", "compression, %", "test accuracy, %", f"trainings to {target}", "seconds", f"at {target}, %"]
    for data, model in dict.fromkeys((run["data"], run["model"]) for run in result["runs"]):
        runs = [run for run in result["runs"] if (run["data"], run["model"]) == (data, model)]
        rows = []
        for method, arm in dict.fromkeys((row["method"], row["arm"]) for row in runs[0]["rows"]):
            found = [row for run in runs for row in run["rows"] if (row["method"], row["arm"]) == (method, arm)]
            shares = {key: spread([row.get(key) for row in found]) for key in SHARES}
            counts = {key: spread([row.get(key) for row in found], percent=False) for key in ("trainings", "seconds")}
            cells = {**shares, **counts}
            columns = ("compression", "test_accuracy", "trainings", "seconds", "target_test_accuracy")
            rows.append([f"{method}, {arm}", *(cells[key] for key in columns)])
        whole, kept = (spread([run[key] for run in runs], digits=1) for key in ("test_accuracy", "neuron_retention"))
        thetas = ", ".join(f"{run['theta']:g}" for run in runs)
        title = f"## {model} on {data}: {whole} %; the slice keeps {kept} % of the neurons (theta {thetas})"
        lines += ["", title, "", table(headings, rows)]
    return "\n".join([*lines, ""])
