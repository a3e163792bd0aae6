"""Ratios of bench speed: by hand, and from runs in turns."""

from __future__ import annotations

from torchslice.bench.ratios import cells, compare, in_turns


def test_a_row_by_hand() -> None:
    row = compare("ours", "theirs", "<= 1", [(1.0, 2.0), (3.0, 2.0), (2.0, 2.0)])
    assert (row["ratio"], row["quartiles"]) == (1.0, [0.75, 1.25])
    assert cells(row) == ["ours (2.000 s)", "theirs (2.000 s)", "1.00 (0.75 to 1.25)", "<= 1"]
    assert cells(compare("a", "b", "-", [(3.0, 2.0)], figure="{:.0f} MiB"))[:3] == [
        *("a (3 MiB)", "b (2 MiB)"),
        "1.50 (1.50 to 1.50)",
    ]


def test_sides_run_in_turns_and_the_first_turn_does_not_count() -> None:
    order: list[str] = []
    turns = in_turns(2, *(lambda name=name: order.append(name) for name in "abc"))
    assert "".join(order) == "abc" + "bca" + "cab"
    assert len(turns) == 2 and all(len(turn) == 3 and min(turn) >= 0 for turn in turns)
