"""The page of `reuse`: what a sub-model is worth over what it costs and over what it took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from .tables import (
    Cell,
    Curve,
    Panel,
    Run,
    Runs,
    about_training,
    by_network,
    deviation,
    draw,
    figure,
    found,
    mean,
    page,
    spread,
    table,
)

WHOLE, TUNED, ONCE = "whole network", "slice, tuned", "slice"
CONTROLS = ("slice, statistics only", "random slice", "random slice, tuned", "from scratch")
FRONT = (ONCE, TUNED, *(f"control: {arm}" for arm in CONTROLS), "MODA", "MwT, as published")  # arms on the front page
FIGURES = {
    "accuracy": figure("rows", "accuracy"),
    "of the whole": figure("rows", "of_whole", percent=False, digits=3),
    "parameters": figure("rows", "param_retention"),
    "MACs": figure("rows", "mac_retention"),
    "speed-up, batch 1": figure("rows", "speed_up_1", percent=False, digits=2),
    "speed-up, batch 64": figure("rows", "speed_up_64", percent=False, digits=2),
    "core seconds": figure("rows", "core_seconds", percent=False, digits=0),
    "calibration error": figure("rows", "calibration_error"),
}
PAIRS = {
    "mean": figure("pairs", "ours"),
    "spread": figure("pairs", "ours", of=deviation),
    "worst": figure("pairs", "ours", of=min),
    "whole: mean": figure("pairs", "whole"),
    "whole: worst": figure("pairs", "whole", of=min),
    "largest loss": figure("pairs", "change", of=min),
}
ORDINARY = {
    "mean": figure("pairs", "ordinary"),
    "spread": figure("pairs", "ordinary", of=deviation),
    "worst": figure("pairs", "ordinary", of=min),
    "largest loss": figure("pairs", "ordinary_change", of=min),
}
TEXT = (
    "Test accuracy in percent, without averaging over mirrored images; parameters and MACs in percent of the whole "
    "network's, speed-ups over its forward pass, measured in turns. Sub-tasks are drawn at random and disjoint (of "
    "five classes the superclasses, where a data set has them); a figure is the mean over them, then mean ± standard "
    "deviation over the seeds. *Core seconds* are those of one core from the trained network in memory to the "
    "sub-model (on a GPU, of the process that drives it); controls as wide as a slice include its choice, unless it "
    "was known. Where speed-ups are left out, accuracy was measured on a GPU. Epochs are chosen on validation images "
    "of the classes."
)


def write_page(arms: dict[str, str], result: dict[str, Any], path: Path) -> str:
    """Write the answer, the pictures and the tables of every network."""
    runs = by_network(result["runs"])
    measured = {row["arm"] for run in result["runs"] for row in run["rows"]}
    arms = {arm: meaning for arm, meaning in arms.items() if arm in measured}
    parts = {f"{name}, {size} classes": (own, size) for name, own in runs.items() for size in sizes(own)}
    over_macs = {name: panel(*of, "mac_retention") for name, of in parts.items()}
    over_time = {name: found for name, of in parts.items() if (found := panel(*of, "core_seconds"))}
    title = "What a sub-model is worth; mean ± deviation over the seeds"
    kept, work, time = "of its accuracy, %", "MACs, % of the whole network", "seconds of a core, to make it"
    picture = draw(path.with_suffix(".png"), over_macs, x=work, y=kept, title=title, log_x=True)
    if over_time:
        beside = path.with_name(f"{path.name}-time.png")
        picture += "\n\n" + draw(beside, over_time, x=time, y=kept, title=title, log_x=True)
    first, of = next(iter(parts.items()))  # for the front page
    one = {labelled(arm, *of): curves for arm, curves in over_macs[first].items() if arm in FRONT}
    title = "What a sub-model keeps, and in how many seconds of a core it is made"
    draw(path.with_name(f"{path.name}-one.png"), {first: one}, x=work, y=kept, title=title, log_x=True)
    epochs = result["manifest"]["settings"]["tuning_epochs"]
    tuning = f" *Tuned* is for {epochs} epochs." if epochs else ""
    text = [*(answer(name, own) for name, own in runs.items()), TEXT + tuning]
    return page("Name your classes and a budget", result, text=text, section=section, arms=arms, picture=picture)


def sizes(runs: Runs) -> list[int]:
    """Return the sizes of the sub-tasks of a network."""
    return list(dict.fromkeys(row["size"] for row in runs[0]["rows"]))


def budgets(runs: Runs, **where: Any) -> list[float]:
    """Return the budgets of some rows, rising."""
    return sorted({row["budget"] for row in found(runs[0]["rows"], **where) if row["budget"] is not None})


def answer(name: str, runs: Runs) -> str:
    """Write the first thing to know: what a tuned slice keeps at every budget, and what the control does."""
    kept = []
    for size in sizes(runs):
        for budget in budgets(runs, arm=TUNED, size=size):
            where = {"budget": budget, "size": size}
            own, seconds, once, chance = (
                figure("rows", key, percent=False, digits=digits)(runs, {"arm": arm, **where})
                for arm, key, digits in (
                    (TUNED, "of_whole", 3),
                    (TUNED, "core_seconds", 0),
                    (ONCE, "of_whole", 3),
                    ("control: random slice, tuned", "of_whole", 3),
                )
            )
            took = "" if seconds == "-" else f" in {seconds} core seconds"
            took += "" if once == "-" else f", {once} untuned"
            kept.append(f"{size} classes at {budget:.0%} of the MACs: **{own}**{took} (random {chance})")
    return (
        f"A tuned slice of {name} keeps, of the whole network's accuracy on the same classes, " + "; ".join(kept) + "."
    )


def panel(runs: Runs, size: int, x: str) -> Panel:
    """Return the curves of all arms for sub-tasks of one size; the whole network is 100 % of itself.

    Over seconds, those that a budget decides and that were timed; a point is the mean over the seeds.
    """
    rows = [row for row in runs[0]["rows"] if row["size"] == size and row["arm"] != WHOLE]
    arms = dict.fromkeys(row["arm"] for row in rows if x != "core_seconds" or (row["budget"] and row["speed_up_64"]))
    curves = {arm: [curve for run in runs if (curve := points(run, arm, size, x))] for arm in arms}
    if x != "core_seconds":
        return curves
    return {
        arm: [[(fmean(times), fmean(kept)) for times, kept in (zip(*of, strict=True) for of in zip(*own, strict=True))]]
        for arm, own in curves.items()
    }


def points(run: Run, arm: str, size: int, x: str) -> Curve:
    """Return one point for each budget: means over the sub-tasks, accuracies and fractions in percent."""
    rows, unit = found(run["rows"], arm=arm, size=size), 1 if x == "core_seconds" else 100
    groups = [found(rows, budget=budget) for budget in dict.fromkeys(row["budget"] for row in rows)]
    return [(unit * fmean(r[x] for r in group), 100 * fmean(r["of_whole"] for r in group)) for group in groups]


def labelled(arm: str, runs: Runs, size: int) -> str:
    """Return an arm with the seconds that it takes, where these were measured."""
    rows = [row for run in runs for row in found(run["rows"], arm=arm, size=size)]
    seconds = [row["core_seconds"] for row in rows if row["core_seconds"]]
    return f"{arm} ({fmean(seconds):.0f} s)" if len(seconds) == len(rows) else arm


def section(runs: Runs, network: Run) -> list[str]:
    """Write the tables of one network."""
    parts = [f"{about_training(network)}."]
    for size in sizes(runs):
        keys = dict.fromkeys((row["arm"], row["budget"]) for run in runs for row in found(run["rows"], size=size))
        wheres = [{"arm": arm, "budget": budget, "size": size} for arm, budget in keys]
        rows = [(named(runs, where), where) for where in wheres]
        parts += [table(runs, rows, FIGURES, corner=f"{size} classes"), *differences(runs, size)]
    if drawn := len(runs[0]["pairs"]):
        rows = [(f"{drawn} pairs", {})]
        parts.append(table(runs, rows, PAIRS, corner="trained to be cut, any two classes"))
        if "ordinary" in runs[0]["pairs"][0]:
            parts.append(table(runs, rows, ORDINARY, corner="slice, any two classes"))
    trainings = [(row["what"], {"what": row["what"]}) for row in runs[0]["training"]]
    cost = {"of standard": figure("training", "of_standard", percent=False, digits=2)}
    return [*parts, table(runs, trainings, cost, corner="time of training")]


def named(runs: Runs, where: Mapping[str, Any]) -> str:
    """Return the name of a row: its arm, its budget, and its seeds where not all have it."""
    name = where["arm"] + (f", {where['budget']:.0%}" if where["budget"] else "")
    seeds = sum(bool(found(run["rows"], **where)) for run in runs)
    return name if seeds == len(runs) else f"{name} ({seeds} of {len(runs)} seeds)"


def differences(runs: Runs, size: int) -> Iterator[str]:
    """Write by how many points a tuned slice is ahead of the other arms on the same classes at the same budget."""
    tuned = budgets(runs, arm=TUNED, size=size)
    others = dict.fromkeys(
        (row["arm"], row["budget"])
        for row in found(runs[0]["rows"], size=size)
        if row["budget"] in tuned and row["arm"] != TUNED
    )
    if others:
        wheres = [{"arm": arm, "budget": budget, "size": size} for arm, budget in others]
        rows = [(named(runs, where), where) for where in wheres]
        yield table(runs, rows, {"points": ahead}, corner=f"{TUNED}, is ahead of")


def _ahead(run: Run, row: Run) -> float | None:
    """Return the mean difference of a tuned slice to another arm, over the same sub-tasks; None without this arm."""
    own = {tuple(r["classes"]): r["accuracy"] for r in found(run["rows"], **{**row, "arm": TUNED})}
    return mean(own[tuple(r["classes"])] - r["accuracy"] for r in found(run["rows"], **row))


ahead: Cell = lambda runs, row: spread([_ahead(run, row) for run in runs])  # noqa: E731
