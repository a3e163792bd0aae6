"""The page of the bench readapt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .experiment import by_network, machine, spread, table
from .pictures import Curve, draw

ARMS = {
    "not adapted": "the network as it was",
    "full fine-tuning": "all parameters, and batch-norm statistics",
    "last layer": "the rows of the class scores only",
    "DeepArc": "the layers, five or half of all, at which the similarity of old and new images drops most",
    "low-rank adapters": "low-rank additions to all weights, as many parameters as the critical neurons have",
    "critical neurons": "the neurons that contribute most per parameter, up to a share of all parameters",
    "critical neurons, classifier": "the same and the rows of the class scores",
    "critical neurons, equal shares": "the neurons that contribute most in every layer, the same share of each",
    "control: random neurons": "as many random neurons in every layer as the critical ones",
    "control: random, equal shares": "the same share of every layer",
}

DRAWN = (
    "full fine-tuning",
    "last layer",
    "DeepArc",
    "low-rank adapters",
    "critical neurons",
    "control: random neurons",
)


def to_target(arms: dict[str, dict[str, Any]], *, gain: float = 0.9) -> dict[str, dict[str, Any] | None]:
    """Return for every arm the first epoch with nine tenths of the gain on new samples that full fine-tuning makes.

    All on validation images; None for an arm that does not get there, nothing at all where that gain is below a point.
    """
    epochs = {arm: found["epochs"] for arm, found in arms.items() if "epochs" in found}
    full = epochs["full fine-tuning"]
    start, end = full[0]["new_accuracy"], full[arms["full fine-tuning"]["best_epoch"]]["new_accuracy"]
    if end - start < 0.01:
        return {}
    target = start + gain * (end - start) - 1e-9
    return {arm: next((row for row in rows if row["new_accuracy"] >= target), None) for arm, rows in epochs.items()}


def page(result: dict[str, Any], path: Path) -> str:
    """Write two tables per network: means over the scenarios, and the accuracies in each of them."""
    about, settings = result["manifest"], result["manifest"]["settings"]
    rates = " or ".join(f"{rate:g}" for rate in settings["learning_rates"])
    lines = [
        "# Re-adaptation",
        "",
        f"`{about['command']}`: {settings['seeds']} seeds; {machine(about)}.",
        "",
        f"Each arm is trained on {settings['new_samples']} new samples and {settings['replay']:g} old ones per new one "
        f"for {settings['epochs']} epochs; learning rate ({rates}) and epoch are those of the best mean accuracy on "
        "held-back new samples and clean validation images. Test accuracy in percent, on held-out new samples and on "
        "the clean test set; damage leaves images as they are. Steps and seconds are those to nine tenths of the "
        "gain that full fine-tuning makes on new validation samples, where it makes any and an arm gets there. "
        "First the mean over the scenarios, then mean ± standard deviation over the seeds.",
        "",
        *(f"- **{arm}**: {meaning}." for arm, meaning in ARMS.items()),
        "",
        _picture(result, path),
    ]
    for name, runs in by_network(result["runs"]).items():
        lines += ["", f"## {name}", "", _means(runs, ARMS), "", _each(runs, ARMS)]
    return "\n".join([*lines, ""])


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _means(runs: list[dict[str, Any]], arms: dict[str, str]) -> str:
    """Average over the scenarios of every seed."""
    columns: dict[str, dict[str, list[float | None]]] = {arm: {} for arm in arms}
    for run in runs:
        cases: list[dict[str, dict[str, Any]]] = []  # one scenario or mutant each: arm -> row
        for row in run["rows"]:
            if row["arm"] == "not adapted":
                cases.append({})
            cases[-1][row["arm"]] = row
        reached = [found_at for case in cases if (found_at := to_target(case))]
        for arm, found in columns.items():
            rows = [case[arm] for case in cases]
            first = [row for case in reached if (row := case.get(arm)) is not None]
            figures = {
                "new": _mean([row["new_accuracy"] for row in rows]),
                "clean": _mean([row["clean_accuracy"] for row in rows]),
                "both": _mean([(row["new_accuracy"] + row["clean_accuracy"]) / 2 for row in rows]),
                "share": _mean([row["param_share"] for row in rows if "param_share" in row]),
                "reached": len(first) / len(reached) if reached and arm != "not adapted" else None,
                "steps": _mean([row["steps"] for row in first]),
                "seconds": _mean([row["seconds"] for row in first]),
            }
            for name, value in figures.items():
                found.setdefault(name, []).append(value)
    cells = [
        [arm, *(spread(values, percent=name not in ("steps", "seconds")) for name, values in found.items())]
        for arm, found in columns.items()
    ]
    headings = ["arm", "new samples", "clean", "mean", "parameters trained", "target reached", "steps", "seconds"]
    return table(headings, cells)


def _each(runs: list[dict[str, Any]], arms: dict[str, str]) -> str:
    """Write new and clean accuracy of every scenario."""
    scenarios = list(dict.fromkeys(row["scenario"] for row in runs[0]["rows"]))
    cells = []
    for arm in arms:
        line = [arm]
        for scenario in scenarios:
            rows = [row for run in runs for row in run["rows"] if (row["scenario"], row["arm"]) == (scenario, arm)]
            line.append(" / ".join(spread([row[f"{name}_accuracy"] for row in rows]) for name in ("new", "clean")))
        cells.append(line)
    return table(["new / clean", *scenarios], cells)


def _picture(result: dict[str, Any], path: Path) -> str:
    """Draw the mean of both accuracies over the epochs, averaged over the scenarios."""
    panels: dict[str, dict[str, list[Curve]]] = {}
    for network, runs in by_network(result["runs"]).items():
        panels[network] = {arm: [_curve(run, arm) for run in runs] for arm in DRAWN}
    title = "Re-adaptation, validation; mean ± deviation over the seeds"
    return draw(path.with_suffix(".png"), panels, x="epoch", y="mean of new and clean accuracy, %", title=title)


def _curve(run: dict[str, Any], arm: str) -> Curve:
    ways = [row["epochs"] for row in run["rows"] if row["arm"] == arm]
    means = [
        _mean([50 * (e["new_accuracy"] + e["clean_accuracy"]) for e in epochs]) for epochs in zip(*ways, strict=True)
    ]
    return [(float(epoch), mean) for epoch, mean in enumerate(means) if mean is not None]
