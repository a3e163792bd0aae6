"""The page of the bench restructure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .experiment import by_network, machine, spread, table
from .pictures import Curve, draw

ARMS = {
    "whole": "without slicing",
    "slice": "from the semantic slice",
    "random": "control: from a random slice with as many neurons in every layer",
}
SHARES = ("compression", "test_accuracy", "target_test_accuracy")


def page(result: dict[str, Any], path: Path) -> str:
    """Write one table per network: a row per method and arm; draw the way of LAMP from every start."""
    about, settings = result["manifest"], result["manifest"]["settings"]
    target = f"{1 - settings['param_retention']:.0%}"
    lines = [
        "# Restructuring",
        "",
        f"`{about['command']}`: {settings['seeds']} seeds; {machine(about)}.",
        "",
        f"Every iteration removes {settings['rate']:.0%} of the surviving weights and trains "
        f"{settings['epochs_per_iteration']} epoch(s), up to {settings['patience']} time(s) again where more than "
        f"{settings['max_accuracy_loss']:.0%} of validation accuracy is lost. Compression is the share of parameters "
        "that are gone, the largest within that loss, 0 where even the cut slice loses more; the test accuracy beside "
        f"it is that of the network kept. Then to {target} compression, whatever it costs: how many trainings it takes "
        "(that of the cut slice included), their time, and test accuracy at the end. Mean ± standard deviation.",
        "",
        *(f"- **{arm}**: {meaning}." for arm, meaning in ARMS.items()),
        "",
        _picture(result, path),
    ]
    headings = ["method", "compression, %", "test accuracy, %", f"trainings to {target}", "seconds", f"at {target}, %"]
    for name, runs in by_network(result["runs"]).items():
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
        title = f"## {name}: {whole} %; the slice keeps {kept} % of the neurons (theta {thetas})"
        lines += ["", title, "", table(headings, rows)]
    return "\n".join([*lines, ""])


def _picture(result: dict[str, Any], path: Path) -> str:
    """Draw validation accuracy over the parameters left, as far as the allowed loss lets LAMP go."""
    names = {"slice": "slice", "whole": "control: whole network", "random": "control: random slice"}
    panels: dict[str, dict[str, list[Curve]]] = {}
    for network, runs in by_network(result["runs"]).items():
        panels[network] = {
            name: [_way(row) for run in runs for row in run["rows"] if (row["method"], row["arm"]) == ("lamp", arm)]
            for arm, name in names.items()
        }
    title = "LAMP within the allowed loss; mean ± deviation over the seeds"
    axes = {"x": "parameters left, %", "y": "validation accuracy, %"}
    return draw(path.with_suffix(".png"), panels, title=title, log_x=True, **axes)


def _way(row: dict[str, Any]) -> Curve:
    """Return the last accuracy at every number of parameters, in percent."""
    steps = {100 * step["param_retention"]: 100 * step["validation_accuracy"] for step in row["steps"]}
    return list(steps.items())
