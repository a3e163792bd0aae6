"""Curves of benches: one panel per network, one line per arm, with the spread over the seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TorchsliceError
from ..files import atomic_write
from ..imports import import_optional
from .experiment import note

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#56B4E9", "#E69F00", "#CC79A7")  # told apart by colour-blind readers too
TICKS = (1, 2, 5, 10, 20, 50, 100)  # of logarithmic axes
CONTROLS = (("--", "s"), (":", "x"), ("-.", "^"))  # lines and points, all black
NO_PICTURE = (
    "No curves are drawn: matplotlib is not installed. After `pip install 'torchslice[dev]'` the same command draws "
    "them, and measures nothing again."
)

Curve = Sequence[tuple[float, float]]  # points of one seed
Panel = Mapping[str, Sequence[Curve]]  # an arm's curves, one per seed; names of controls begin with "control"


def is_control(arm: str) -> bool:
    """Tell whether an arm is there to be compared with only."""
    return arm.startswith("control")


def interpolated(curve: Curve, at: float) -> float | None:
    """Interpolate a curve, None beyond its ends."""
    x, y = zip(*sorted(curve), strict=True)
    return float(np.interp(at, x, y)) if x[0] <= at <= x[-1] else None


def draw(path: Path, panels: Mapping[str, Panel], *, x: str, y: str, title: str, log_x: bool = False) -> str:
    """Draw curves as a PNG, and return the Markdown that shows it, or says why there is none.

    A line is the mean over the seeds as far as all curves reach, in a band of one standard deviation; dots are points.

    Args:
        panels: curves by the title of their panel. The first panel has all arms.
        x: what is on the horizontal axis.
        y: what is on the vertical axis.
    """
    try:
        figure_of = import_optional("matplotlib.figure", extra="dev").Figure
    except TorchsliceError as error:
        note(f"no curves are drawn: {error}", True)
        return NO_PICTURE
    width = min(2, len(panels))
    height = math.ceil(len(panels) / width)
    figure = figure_of(figsize=(max(8, 5 * width), 3.5 * height + 0.8), layout="constrained", dpi=90)
    cells = list(figure.subplots(height, width, squeeze=False).flat)
    for cell, (name, panel) in zip(cells, panels.items(), strict=False):
        _lines(cell, panel, log_x)
        cell.set(title=name, xlabel=x, ylabel=y)
        low, high = cell.dataLim.intervalx
        cell.locator_params(axis="x", integer=low == int(low) and high == int(high))
        if log_x:
            cell.set_xscale("log")
            cell.set_xticks([tick for tick in TICKS if low <= tick <= high], minor=False)
            cell.set_xticks([], minor=True)
            cell.xaxis.set_major_formatter("{x:g}")
    for cell in cells[len(panels) :]:
        cell.remove()
    lines, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png", pil_kwargs={"optimize": True}))
    return f"![{title}]({path.name})"


def _lines(cell: Any, panel: Panel, log_x: bool) -> None:
    """Draw the arms of one panel."""
    colours, dashes = iter(COLOURS * 3), iter(CONTROLS * 3)
    for arm, found in panel.items():
        points = np.array([point for curve in found for point in curve], dtype=float)
        low, high = max(min(curve)[0] for curve in found), min(max(curve)[0] for curve in found)
        line_style, marker = next(dashes) if is_control(arm) else ("-", "o")
        colour = "black" if is_control(arm) else next(colours)
        grid = np.geomspace(low, high, 100) if log_x else np.linspace(low, high, 100)
        scale = np.log if log_x else np.positive  # straight lines on the picture
        curves = [np.array(sorted(curve), dtype=float).T for curve in found]
        values = np.array([np.interp(scale(grid), scale(x), y) for x, y in curves])
        mean, deviation = values.mean(0), values.std(0, ddof=1) if len(found) > 1 else 0
        cell.plot(grid, mean, color=colour, linestyle=line_style)
        cell.fill_between(grid, mean - deviation, mean + deviation, color=colour, alpha=0.15, lw=0)
        cell.plot(*points.T, linestyle="", marker=marker, color=colour, markersize=3, alpha=0.6)
        cell.plot([], [], color=colour, linestyle=line_style, marker=marker, markersize=3, label=arm)
