"""What the rows of `bench speed` share: random images, runs taken in turns, and the ratio of two figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..data import Data, Split


def noise(images: int) -> Data:
    """Return random images in the shape of CIFAR-10: the time of a step does not depend on what they show."""
    split = Split(torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8), torch.arange(images) % 10)
    return Data.build("noise", split, split, classes=[str(c) for c in range(10)], validation=split)


def seconds(run: Callable[[], Any]) -> float:
    """Return how long a call takes, with what it started on the GPU."""
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turns(repeats: int, *sides: Callable[[], Any]) -> list[tuple[float, ...]]:
    """Run all sides once to warm up, then in turns, another one first each time; return the seconds of every turn."""
    turns = []
    for turn in range(repeats + 1):
        first = turn % len(sides)
        taken = {side: seconds(side) for side in (*sides[first:], *sides[:first])}
        turns.append(tuple(taken[side] for side in sides))
    return turns[1:]


def compare(
    what: str, against: str, goal: str, pairs: Sequence[tuple[float, ...]], *, figure: str = "{:.3f} s"
) -> dict[str, Any]:
    """Return the row of pairs of figures (ours, theirs): the median and the quartiles of their ratios.

    >>> compare("a cut", "another", "<= 1", [(1.0, 2.0)])["what"]
    'a cut (1.000 s)'
    """
    ratios = [ours / theirs for ours, theirs in pairs]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    medians = [figure.format(statistics.median(side)) for side in zip(*pairs, strict=True)]
    return {
        "what": f"{what} ({medians[0]})",
        "against": f"{against} ({medians[1]})",
        "goal": goal,
        "ratio": statistics.median(ratios),
        "quartiles": [low, high],
        "pairs": [list(pair) for pair in pairs],
    }


def missing(what: str, against: str, goal: str) -> dict[str, Any]:
    """Return the row of a ratio that cannot be measured here; `against` says why."""
    return {"what": what, "against": against, "goal": goal, "ratio": None, "quartiles": None, "pairs": []}


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row as the cells of a Markdown table."""
    if row["ratio"] is None:
        return [row["what"], row["against"], "-", row["goal"]]
    low, high = row["quartiles"]
    return [row["what"], row["against"], f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})", row["goal"]]
