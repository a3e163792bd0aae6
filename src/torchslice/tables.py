"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay rows out under their headings, the first column to the left, the others to the right.

    >>> print(table(("class", "accuracy"), [("cat", "91.2%")]))
    class  accuracy
    ---------------
    cat       91.2%
    """
    cells = [[str(cell) for cell in row] for row in (headings, *rows)]
    first, *others = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([name.ljust(first), *map(str.rjust, figures, others)]) for name, *figures in cells]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def percent(fraction: float | None) -> str:
    """Write a fraction in [0, 1] in percent; None is a dash.

    >>> percent(0.912), percent(None)
    ('91.2%', '-')
    """
    return "-" if fraction is None else f"{fraction:.1%}"
