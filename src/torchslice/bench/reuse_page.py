"""The page of `bench reuse`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .experiment import by_network, machine, spread, table
from .pictures import Curve, draw

ARMS = {
    "standard, restricted": "standard training, whole, scores restricted to the sub-task: what sub-models are held to",
    "ours": "standard training for the first part, then sub-task training on class slices chosen from it",
    "MwT, as published": "trained with gates; gates dropped, nothing fine-tuned",
    "MwT, folded and recalibrated": "the same, mean gates in the weights, batch-norm statistics of the sub-task",
    "control: standard, sliced": "slices chosen as ours are, of the standard network, without sub-task training",
    "control: random slices, trained": "sub-task training on random class slices with as many neurons in every layer",
    "control: from scratch": "a network of our sub-model's size, trained on the sub-task as long as the parent",
}


def page(result: dict[str, Any], path: Path) -> str:
    """Draw the curves over retention, and write the tables of every network."""
    about, settings = result["manifest"], result["manifest"]["settings"]
    networks = {f"{network['model']} on {network['data']}": network for network in settings["networks"]}
    panels: dict[str, dict[str, list[Curve]]] = {}
    lines: list[str] = []
    for name, runs in by_network(result["runs"]).items():
        network = networks[name]
        for size in network["sizes"]:
            panels[f"{name}, {size} classes"] = _curves(runs, size)
        images = network["train_images"]
        many = f"{images:,}" if images else "all"
        about_training = (
            f"{len(runs)} seed(s), {network['epochs']} epochs, {many} training images, "
            f"batches of {network['batch_size']} (MwT {network['mwt_batch_size']})."
        )
        lines += ["", f"## {name}", "", about_training, "", _arms(runs, network["sizes"]), ""]
        lines += [_subsets(runs), "", _calibration(runs, network["sizes"]), "", *_seconds(runs)]
    title = "Sub-models without fine-tuning; mean ± deviation over the seeds"
    picture = draw(path.with_suffix(".png"), panels, x="neurons per class, %", y="test accuracy, %", title=title)
    return "\n".join(
        [
            "# Sub-models that work at once",
            "",
            f"`{about['command']}`: {machine(about)}.",
            "",
            "Test accuracy in percent of sub-models that were cut and never fine-tuned, mean over disjoint sub-tasks "
            f"({settings['sub_tasks']} of a size at most), then mean ± standard deviation over the seeds; in brackets "
            "its share of that of the standard network "
            f"restricted to the same classes. Cut networks get batch-norm statistics of "
            f"{settings['statistics_images']} training images of their classes, unless it says otherwise.",
            "",
            *(f"- **{arm}**: {meaning}." for arm, meaning in ARMS.items()),
            "",
            picture,
            *lines,
            "",
        ]
    )


def _points(runs: Sequence[dict[str, Any]], arm: str, size: int) -> list[list[tuple[float, float]]]:
    """Return per seed retention and accuracy of an arm."""
    return [
        [(row["retention"], row["accuracy"]) for row in run["arms"] if (row["arm"], row["size"]) == (arm, size)]
        for run in runs
    ]


def _curves(runs: Sequence[dict[str, Any]], size: int) -> dict[str, list[Curve]]:
    found = {arm: _points(runs, arm, size) for arm in ARMS}
    reach = [max(x for x, _ in points) for points in found["ours"]]
    low = [min(x for x, _ in points) for points in found["ours"]]
    found["standard, restricted"] = [
        [(low[i], points[0][1]), (reach[i], points[0][1])] for i, points in enumerate(found["standard, restricted"])
    ]
    return {
        arm: [[(100 * x, 100 * y) for x, y in points] for points in curves]
        for arm, curves in found.items()
        if all(curves)
    }


def _arms(runs: Sequence[dict[str, Any]], sizes: Sequence[int]) -> str:
    """Write a row per arm and retention."""
    parents = {size: [points[0][1] for points in _points(runs, "standard, restricted", size)] for size in sizes}
    rows = []
    for arm in ARMS:
        for place in range(len(_points(runs, arm, sizes[0])[0])):
            cells = []
            for size in sizes:
                found = [points[place] for points in _points(runs, arm, size)]
                share = statistics.fmean(y / p for (_, y), p in zip(found, parents[size], strict=True))
                cells.append(f"{spread([y for _, y in found])} ({share:.3f})")
            rows.append([arm, spread([x for x, _ in found]), *cells])
    return table(["", "neurons per class, %", *(f"{size} classes" for size in sizes)], rows)


def _subsets(runs: Sequence[dict[str, Any]]) -> str:
    """Write what any set of classes is worth: mean, spread and worst case over the sets, then over the seeds."""
    rows = []
    for place, first in enumerate(runs[0]["subsets"]):
        found = [run["subsets"][place]["values"] for run in runs]
        cells = []
        for side in (0, 1):
            values = [[pair[side] for pair in pairs] for pairs in found]
            cells += [spread([statistics.fmean(v) for v in values])]
            cells += [
                spread([statistics.stdev(v) if len(v) > 1 else None for v in values]),
                spread(list(map(min, values))),
            ]
        worst = [min(mine - parent for mine, parent in pairs) for pairs in found]
        count = len(found[0])
        rows.append([f"{count} {'sets' if count > 1 else 'set'} of {first['size']}", *cells, spread(worst)])
    headings = ["ours, any classes", "mean", "spread", "worst", "standard: mean", "spread", "worst", "largest loss"]
    return table(headings, rows)


def _calibration(runs: Sequence[dict[str, Any]], sizes: Sequence[int]) -> str:
    rows = []
    names = {"restricted": "standard, restricted", "cut": "ours, cut", "calibrated": "ours, calibrated"}
    for name, title in names.items():
        cells = []
        for size in sizes:
            values = [[r[name] for r in run["calibration"] if r["size"] == size] for run in runs]
            cells.append(spread([statistics.fmean(v) for v in values]))
        rows.append([title, *cells])
    return table(["calibration error, %", *(f"{size} classes" for size in sizes)], rows)


def _seconds(runs: Sequence[dict[str, Any]]) -> list[str]:
    ratio = {
        arm: spread([run["seconds"][arm] / run["seconds"]["standard"] for run in runs], percent=False, digits=2)
        for arm in ("ours", "MwT")
    }
    lines = [f"Training time over standard training: ours {ratio['ours']}, MwT {ratio['MwT']}."]
    times = {
        name: spread([run["artefact_seconds"][name] for run in runs], percent=False)
        for name in runs[0]["artefact_seconds"]
    }
    text = "; ".join(f"{name}: {seconds} s" for name, seconds in times.items())
    return [*lines, f"From a trained network in memory to a saved and checked artefact of two classes: {text}."]
