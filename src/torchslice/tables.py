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
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in (lines[0], "-" * len(lines[0]), *lines[1:]))


def percent(share: float | None) -> str:
    """Write a share in [0, 1] in percent; None is a dash."""
    return "-" if share is None else f"{share:.1%}"
