"""The page of `bench slicing`: what slices of equal compression lose, all networks together, each alone, and as curves.

A run is one network and one seed; an arm is a slicer and a metric; a cell is a run and a compression.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .experiment import by_network, machine, spread, table
from .pictures import Curve, draw, interpolated, is_control

COMPRESSIONS = (0.1, 0.2, 0.3, 0.4, 0.5)
RANDOM, RANDOM_WIDTHS = "control: random", "control: random, widths of the last"
Arm = tuple[str, str]
Cell = tuple[Any, ...]  # seed, data, model, compression


def curves(run: Mapping[str, Any]) -> dict[Arm, list[dict[str, Any]]]:
    """Return the measured points of every arm and, as their beginning, the whole network."""
    arms = dict.fromkeys((point["slicer"], point["metric"]) for point in run["points"])
    return {arm: [run["whole"], *(p for p in run["points"] if (p["slicer"], p["metric"]) == arm)] for arm in arms}


def at_compression(curve: Sequence[Mapping[str, Any]], compression: float, split: str = "test") -> float | None:
    """Interpolate a curve's accuracy at a compression, None beyond its end."""
    return interpolated([(point["compression"], point[split]) for point in curve], compression)


def largest(curve: Sequence[Mapping[str, Any]], loss: float = 0.01) -> float:
    """Return the largest compression measured at which at most `loss` test accuracy is lost to the whole network."""
    return max(point["compression"] for point in curve if point["test"] >= curve[0]["test"] - loss)


def losses(runs: Sequence[Mapping[str, Any]], split: str) -> dict[Arm, dict[Cell, float]]:
    """Return the accuracy that every arm loses in every cell that its curve reaches."""
    found: dict[Arm, dict[Cell, float]] = {}
    for run in runs:
        for arm, curve in curves(run).items():
            cells = found.setdefault(arm, {})
            for at in COMPRESSIONS:
                accuracy = at_compression(curve, at, split)
                if accuracy is not None:
                    cells[run["seed"], run["data"], run["model"], at] = run["whole"][split] - accuracy
    return found


def summarise(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what every arm loses on average over the cells that it reaches, the best one first.

    Lists hold one mean per seed. Arms that do not reach every cell come last: they lack the hardest ones. `ahead_of` is
    what others lose more in the same cells: the controls on test images, the best arm on validation images.
    """
    validation, test = losses(runs, "validation"), losses(runs, "test")
    every = len(runs) * len(COMPRESSIONS)

    def rank(arm: Arm) -> tuple[bool, bool, float]:
        lost = validation[arm].values()
        return is_control(arm[0]), len(lost) < every, statistics.fmean(lost) if lost else math.inf

    first = validation[min(validation, key=rank)]
    rows = []
    for arm in sorted(validation, key=lambda arm: rank(arm)[1:]):
        lost, own, (slicer, metric) = validation[arm], test[arm], arm
        ahead = {
            "best": _ahead(lost, first),
            "random": _ahead(own, test[RANDOM, "-"]),
            "random_widths": _ahead(own, test.get((RANDOM_WIDTHS, metric), {})),
        }
        means = {"validation": _by_seed(lost), "test": _by_seed(own)}
        reached = len(lost) / every
        rows.append({"slicer": slicer, "metric": metric, "reached": reached, "lost": means, "ahead_of": ahead})
    return rows


def best(summary: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the first row of a summary that is no control."""
    return next(row for row in summary if not is_control(row["slicer"]))


def _ahead(own: Mapping[Cell, float], other: Mapping[Cell, float]) -> list[float]:
    """Return per seed what another arm loses more in the cells that both reach."""
    return _by_seed({cell: other[cell] - own[cell] for cell in own if cell in other})


def _by_seed(cells: Mapping[Cell, float]) -> list[float]:
    """Return the mean over the cells of every seed."""
    seeds = dict.fromkeys(cell[0] for cell in cells)
    return [statistics.fmean(value for cell, value in cells.items() if cell[0] == seed) for seed in seeds]


def page(result: dict[str, Any], path: Path) -> str:
    """Add the summary to a result, draw the curves of all slicers by the best metric, and write the page."""
    result["summary"] = summarise(result["runs"])
    metric = best(result["summary"])["metric"]
    panels: dict[str, dict[str, list[Curve]]] = {}
    for name, runs in by_network(result["runs"]).items():
        found = [curves(run) for run in runs]
        panels[name] = {
            _plain(arm[0]): [[(100 * p["compression"], 100 * p["test"]) for p in curve[arm]] for curve in found]
            for arm in found[0]
            if arm[1] in (metric, "-")
        }
    title = f"Slices by {metric} contributions, no training after the cut; mean ± deviation over the seeds"
    picture = draw(path.with_suffix(".png"), panels, x="compression, %", y="test accuracy, %", title=title)
    return markdown(result, picture)


def markdown(result: Mapping[str, Any], picture: str) -> str:
    """Write the summary, the picture, and one table per network."""
    about, settings = result["manifest"], result["manifest"]["settings"]
    lines = [
        "# Slicing precision",
        "",
        f"`{about['command']}`: {settings['seeds']} seeds, {settings['samples_per_class']} images per class for the "
        f"contributions; {machine(about)}.",
        "",
        "Networks are held to slices without any training after the cut. Compression is the share of masked "
        "parameters. Accuracies at 10 to 50 % compression are interpolated between the measured points of a curve, the "
        "whole network being its beginning: where even the largest slice is smaller than that, they lie on a straight "
        "line to it. Figures are mean ± standard deviation over the seeds.",
        "",
        "## All networks together",
        "",
        *_summary(result["summary"]),
        "",
        picture,
        "",
        "Below, for each network alone: test accuracy in percent at 10 to 50 % compression, and the largest measured "
        "compression at which at most one point of it is lost; - where a curve does not get that far for any seed.",
    ]
    for name, own in by_network(result["runs"]).items():
        by_run = [curves(run) for run in own]
        rows = []
        for slicer, metric in by_run[0]:
            arm = [found[slicer, metric] for found in by_run]
            cells = [spread([at_compression(curve, at) for curve in arm]) for at in COMPRESSIONS]
            rows.append([slicer, metric, *cells, spread([largest(curve) for curve in arm])])
        whole = spread([run["whole"]["test"] for run in own], digits=2)
        headings = ["slicer", "metric", *(f"{at:.0%}" for at in COMPRESSIONS), "largest compression, %"]
        lines += ["", f"## {name}: {whole} uncut", "", table(headings, rows)]
    return "\n".join([*lines, ""])


def _summary(summary: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write the table of all networks, and before it how to read it and which arm is best."""
    rows = [
        [
            _plain(row["slicer"]),
            row["metric"],
            f"{row['reached']:.0%}",
            *(spread(row["lost"][split]) for split in ("validation", "test")),
            *(spread(row["ahead_of"][name]) for name in ("best", "random", "random_widths")),
        ]
        for row in summary
    ]
    headings = ["slicer", "metric", "reached", "lost, validation", "lost, test", "ahead of best"]
    headings += ["ahead of random", "ahead of random widths"]
    first = best(summary)
    return [
        "Points of accuracy lost to the whole network, mean over the networks and 10 to 50 % compression. Choices are "
        "made on validation images; test images stand beside them. A curve counts where it gets to; *reached* says in "
        "how many of the networks, seeds and compressions that is. Arms that do not reach all lack the hardest, and so "
        "stand at the end whatever they lose. The last three columns compare in the same cells: how many points more "
        "are lost, on validation images, by the best arm, and on test images by random slices: of one "
        "share in every layer, and with the layer widths of the slices by CKA of maps.",
        "",
        f"Least is lost on validation images by **{_plain(first['slicer'])}, {first['metric']}**: "
        f"{spread(first['lost']['validation'])} points, {spread(first['lost']['test'])} on test images, where random "
        f"slices lose {spread(first['ahead_of']['random'])} points more, and those with the layer widths of CKA of "
        f"maps {spread(first['ahead_of']['random_widths'])} more.",
        "",
        table(headings, rows),
    ]


def _plain(slicer: str) -> str:
    """Name the slices whose widths a control has: in a table of another order "the last" says nothing."""
    return slicer.replace("the last", "CKA of maps")
