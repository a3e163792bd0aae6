"""Pages and pictures of results: means over the seeds with their spread, one table and one panel per network.

A result is {"manifest": {...}, "runs": [{...}]}, a run is one network and one seed.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchslice.errors import TorchsliceError
from torchslice.files import atomic_write
from torchslice.imports import import_optional

Run = Mapping[Any, Any]
Runs = Sequence[Run]
Cell = Callable[[Runs, Run], str]  # (runs of one network, what a row is for) -> what stands there
Curve = Sequence[tuple[float, float]]  # points of one seed
Panel = Mapping[str, Sequence[Curve]]  # an arm's curves, one per seed; names of controls begin with "control"

# For colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#56B4E9", "#E69F00", "#CC79A7", "#886633", "#999933")
CONTROLS = (("--", "s"), (":", "x"), ("-.", "^"), ("-", "D"), ((0, (5, 1, 1, 1, 1, 1)), "v"), ("-", "*"))  # all black
TICKS = (1, 2, 5, 10, 20, 50, 100)  # of logarithmic axes
NO_PICTURE = (
    "No curves are drawn: matplotlib is not installed. After `pip install 'torchslice[dev]'` the same command draws "
    "them, and measures nothing again."
)


# -- tables -------------------------------------------------------------------------------------------------------
def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are there, None if none is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def deviation(values: Sequence[float]) -> float | None:
    """Return the standard deviation, None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def spread(values: Iterable[float | None], *, percent: bool = True, digits: int = 1) -> str:
    """Write a mean and, from two values on, its standard deviation.

    >>> spread([0.5, 0.7, None]), spread([2.0], percent=False), spread([None])
    ('60.0 ± 14.1', '2.0', '-')
    """
    known = [value * (100 if percent else 1) for value in values if value is not None]
    if not known:
        return "-"
    text = f"{statistics.fmean(known):z.{digits}f}"
    return text if len(known) == 1 else f"{text} ± {statistics.stdev(known):.{digits}f}"


def found(rows: Iterable[Run], **keys: Any) -> list[Run]:
    """Return the rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in keys.items())]


def figure(
    rows: str,
    key: str,
    *,
    of: Callable[[list[float]], float | None] = mean,
    percent: bool = True,
    digits: int = 1,
    unit: float = 1,
    **where: Any,
) -> Cell:
    """Return the cell of a figure: mean and spread over the seeds.

    Args:
        rows: name of the rows of a run in which it stands; "" is the run itself.
        key: of the figure in them.
        of: what is taken of several rows.
        where: values of the rows that count, beside those that a row of the table is for.
    """

    def read(run: Run, row: Run) -> float | None:
        known = [one[key] / unit for one in found(run[rows] if rows else [run], **row, **where) if one[key] is not None]
        return of(known) if known else None

    return lambda runs, row: spread([read(run, row) for run in runs], percent=percent, digits=digits)


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table; the first column is text, the others are numbers."""
    lines = [list(headings), ["---"] + ["---:"] * (len(headings) - 1), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(runs: Runs, rows: Iterable[tuple[str, Run]], figures: Mapping[str, Cell], *, corner: str = "") -> str:
    """Write a table of the runs of one network.

    Args:
        rows: titles, and what they are for: values by which its rows are found in a run.
        figures: cells by heading, see `figure`.

    >>> runs = [{"arms": [{"arm": "ours", "accuracy": 0.5}]}, {"arms": [{"arm": "ours", "accuracy": 0.7}]}]
    >>> print(table(runs, [("ours", {"arm": "ours"})], {"accuracy": figure("arms", "accuracy")}))
    |  | accuracy |
    | --- | ---: |
    | ours | 60.0 ± 14.1 |
    """
    lines = [[title, *(cell(runs, row) for cell in figures.values())] for title, row in rows]
    return markdown([corner, *figures], lines)


def by_network(runs: Runs) -> dict[str, list[Run]]:
    """Return the runs of every network, by "MODEL on DATA"."""
    networks: dict[str, list[Run]] = {}
    for run in runs:
        networks.setdefault(f"{run['model']} on {run['data']}", []).append(run)
    return networks


# -- pages --------------------------------------------------------------------------------------------------------
def page(
    title: str,
    result: Mapping[str, Any],
    *,
    text: Sequence[str],
    section: Callable[[Runs, Mapping[str, Any]], Sequence[str]],
    arms: Mapping[str, str] | None = None,
    picture: str = "",
    answer: str = "",
) -> str:
    """Write a page: what was run, how to read it, the arms, the picture, and the sections of every network.

    Args:
        answer: what comes of it; then it stands first and the picture second.
        text: paragraphs.
        section: the paragraphs and tables of one network, from its runs and settings.
        arms: what each arm is.
    """
    settings = result["manifest"]["settings"]
    networks = {f"{network['model']} on {network['data']}": network for network in settings["networks"]}
    counts = sorted(len(runs) for runs in by_network(result["runs"]).values())
    seeds = f"{counts[0]} seed(s)" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]} seeds"
    missing = ", ".join(name for name in networks if name not in by_network(result["runs"]))
    first = [answer, *([picture] if picture else [])] if answer else []
    about = head(result, seeds, *([f"**not measured: {missing}**"] if missing else []))
    blocks = [f"# {title}", *first, about, *text]
    if arms:
        blocks.append(meanings(arms))
    blocks += [picture] if picture and not answer else []
    for name, runs in by_network(result["runs"]).items():
        blocks += [f"## {name}", *section(runs, networks[name])]
    return "\n\n".join(blocks) + "\n"


def meanings(arms: Mapping[str, str]) -> str:
    """Say what every arm is."""
    return "\n".join(f"- **{arm}**: {meaning}." for arm, meaning in arms.items())


def head(result: Mapping[str, Any], *more: str) -> str:
    """Write the command of a result, and where and with what it was run."""
    about = result["manifest"]
    machine = f"{about['processor']}, accelerator {about['accelerator'] or 'none'}"
    return f"`{about['command']}`: {'; '.join([*more, machine])}, torch {about['torch']}, Python {about['python']}."


def about_training(network: Mapping[str, Any]) -> str:
    """Write how long and on how many images a network was trained."""
    images = network["train_images"]
    return f"{network['epochs']} epochs, {f'{images:,}' if images else 'all'} training images"


# -- pictures -----------------------------------------------------------------------------------------------------
def curve(rows: Iterable[Run], x: str, y: str, **where: Any) -> Curve:
    """Return two figures of the rows that have these values as points, in percent."""
    return [(100 * row[x], 100 * row[y]) for row in found(rows, **where)]


def draw(path: Path, panels: Mapping[str, Panel], *, x: str, y: str, title: str, log_x: bool = False) -> str:
    """Draw curves as a PNG, and return the Markdown that shows it, or says why there is none.

    A line is the mean over the seeds as far as all curves reach, in a band of one standard deviation; dots are points.

    Args:
        panels: curves by the title of their panel. An arm looks the same in all.
        x, y: what is on the axes.
    """
    try:
        figure_of = import_optional("matplotlib.figure", extra="dev").Figure
    except TorchsliceError as error:
        print(f"no curves are drawn: {error}", file=sys.stderr, flush=True)
        return NO_PICTURE
    width = min(2, len(panels))
    height = math.ceil(len(panels) / width)
    drawn = figure_of(figsize=(max(8, 5 * width), 3.5 * height + 0.8), layout="constrained", dpi=90)
    places = list(drawn.subplots(height, width, squeeze=False).flat)
    looks = _looks(dict.fromkeys(arm for panel in panels.values() for arm in panel))
    for place, (name, panel) in zip(places, panels.items(), strict=False):
        _lines(place, panel, looks, log_x)
        place.set(title=name, xlabel=x, ylabel=y)
        low, high = place.dataLim.intervalx
        place.locator_params(axis="x", integer=low == int(low) and high == int(high))
        if log_x:
            place.set_xscale("log")
            place.set_xticks([tick for tick in TICKS if low <= tick <= high], minor=False)
            place.set_xticks([], minor=True)
            place.xaxis.set_major_formatter("{x:g}")
    for place in places[len(panels) :]:
        place.remove()
    shown = {arm: line for axes in drawn.axes for line, arm in zip(*axes.get_legend_handles_labels(), strict=True)}
    drawn.legend(shown.values(), shown, loc="outside lower center", ncols=3, frameon=False)
    drawn.suptitle(title)
    atomic_write(path, lambda temporary: drawn.savefig(temporary, format="png", pil_kwargs={"optimize": True}))
    return f"![{title}]({path.name})"


def _looks(arms: Iterable[str]) -> dict[str, tuple[str, Any, str]]:
    """Return colour, line and marker of every arm; controls are black."""
    colours, dashes = iter(COLOURS * 3), iter(CONTROLS * 2)
    return {arm: ("black", *next(dashes)) if arm.startswith("control") else (next(colours), "-", "o") for arm in arms}


def _lines(place: Any, panel: Panel, looks: Mapping[str, tuple[str, Any, str]], log_x: bool) -> None:
    """Draw the arms of one panel."""
    for arm, curves in panel.items():
        colour, line_style, marker = looks[arm]
        points = np.array([point for curve in curves for point in curve], dtype=float)
        low, high = max(min(curve)[0] for curve in curves), min(max(curve)[0] for curve in curves)
        grid = np.geomspace(low, high, 100) if log_x else np.linspace(low, high, 100)
        scale = np.log if log_x else np.positive  # straight lines on the picture
        known = [np.array(sorted(curve), dtype=float).T for curve in curves]
        values = np.array([np.interp(scale(grid), scale(x), y) for x, y in known])
        middle, deviation = values.mean(0), values.std(0, ddof=1) if len(curves) > 1 else 0
        place.plot(grid, middle, color=colour, linestyle=line_style)
        place.fill_between(grid, middle - deviation, middle + deviation, color=colour, alpha=0.15, lw=0)
        place.plot(*points.T, linestyle="", marker=marker, color=colour, markersize=3, alpha=0.6)
        place.plot([], [], color=colour, linestyle=line_style, marker=marker, markersize=3, label=arm)
