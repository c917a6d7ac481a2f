"""Tables: which columns there is room for, what is cut and what goes on in the next line."""

import re
from collections import Counter
from typing import Any

import pytest
from adaptlib.cli import table
from adaptlib.cli.table import lay_out, measure
from hypothesis import given
from hypothesis import strategies as st

CELLS = st.lists(
    st.text(st.sampled_from("ab "), max_size=20).map(lambda text: text.strip() or "x"),
    min_size=1,
    max_size=3,
).map("\n".join)


@given(
    st.lists(st.tuples(CELLS, CELLS, CELLS, CELLS), max_size=5),
    st.tuples(*[st.sampled_from(["left", "right", "cut", "fold"])] * 4),
    st.integers(10, 120),
)
def test_a_table_shows_every_column_and_loses_only_what_may_be_cut(
    rows: list[tuple[str, ...]], how: tuple[str, ...], width: int
) -> None:
    columns = [(f"C{i}", one) for i, one in enumerate(how)]
    lines = lay_out(columns, rows, width)
    assert re.fullmatch(r" *C0 +C1 +C2 +C3", lines[0])
    wanted = Counter(c for row in rows for cell in row for c in cell if c.strip())
    shown = Counter(c for line in lines[1:] for c in line if c.strip())
    assert shown == wanted or "cut" in how
    for i, one in enumerate(how):
        if one in ("left", "right"):
            kept = [line for row in rows for line in row[i].split("\n")]
            assert all(any(line in text for text in lines) for line in kept)
    assert all(line == line.rstrip() for line in lines)
    flexible = [i for i, one in enumerate(how) if one in ("cut", "fold")]
    fixed = sum(
        max([2, *(len(line) for row in rows for line in row[i].split("\n"))])
        for i in range(4)
        if i not in flexible
    )
    if fixed + 8 * len(flexible) + 6 <= width:
        assert max(map(len, lines)) <= width


def test_folding_and_cutting() -> None:
    columns = [("NAME", "left"), ("WHAT", "fold"), ("BASE", "cut"), ("N", "right")]
    rows = [("a", "some words here that go on", "org/a-long-name", "7"), ("bb", "x", "y", "123")]
    assert lay_out(columns, rows, 36) == [
        "NAME  WHAT          BASE           N",
        "a     some words    org/a-lon..    7",
        "      here that go",
        "      on",
        "bb    x             y            123",
    ]
    assert lay_out([("A", "fold")], [("x" * 25,)], 10) == ["A", "x" * 10, "x" * 10, "x" * 5]


def test_wide_characters_take_two_columns() -> None:
    assert measure("日本") == 4
    assert measure("é") == 1
    assert measure("e\u0301") == 1
    lines = lay_out([("A", "left"), ("B", "left")], [("日本", "x"), ("abcd", "y")], 80)
    assert [line.index(end) for line, end in zip(lines[1:], "xy", strict=True)] == [4, 6]
    assert lay_out([("A", "cut")], [("日本" * 10,)], 9) == ["A", "日本日.."]


@given(
    rows=st.lists(st.tuples(*[st.text("ab z", max_size=6)] * 3), max_size=6),
    hows=st.tuples(*[st.sampled_from(["left", "right", "cut", "fold"])] * 3),
    width=st.integers(8, 40),
)
def test_the_short_way_and_the_long_way_are_one(rows: Any, hows: Any, width: int) -> None:
    """Tables of plain lines that have room are laid out at once."""
    columns = [*zip(("ONE", "TWO", "THREE"), hows, strict=True)]
    quick = lay_out(columns, rows, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "_simple", lambda *_: None)
        assert lay_out(columns, rows, width) == quick
