"""Tables as lines of text. Rich makes them too, at a tenth of the speed, and leaves out columns
that have no room."""

import unicodedata
from collections.abc import Callable, Sequence

GAP = "  "
LEAST = 8  # characters that a column which can be narrow keeps


def lay_out(
    columns: Sequence[tuple[str, str]],
    rows: Sequence[Sequence[str]],
    width: int,
    *,
    ellipsis: str = "..",
    bold: Callable[[str], str] = str,
) -> list[str]:
    """The lines of a table, the headings first. A column is (heading, how): `left` and `right` are
    shown whole, however wide; `cut` and `fold` share what is left of `width`, where the one loses
    its end and the other goes on in the next line. A cell may have several lines."""
    headings = [heading for heading, _ in columns]
    if lines := _simple(columns, rows, width):
        return [_join(headings, columns, lines[0], bold), *lines[1]]
    cells = [[cell.split("\n") for cell in row] for row in rows]
    whole = [
        max(map(measure, [heading, *(line for row in cells for line in row[i])]))
        for i, heading in enumerate(headings)
    ]
    widths = _share(columns, whole, width)
    lines = [_join(headings, columns, widths, bold)]
    for row in cells:
        fitted = [
            [part for line in cell for part in _fit(line, how, room, ellipsis)]
            for cell, (_, how), room in zip(row, columns, widths, strict=True)
        ]
        for k in range(max(map(len, fitted))):
            texts = [cell[k] if k < len(cell) else "" for cell in fitted]
            lines.append(_join(texts, columns, widths))
    return lines


def _simple(
    columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], width: int
) -> tuple[list[int], list[str]] | None:
    """The widths and the lines where each cell is a line of ASCII and has room, as in most tables
    of thousands: a tenth of the time. None where that is not so."""
    whole: list[int] = []
    for (heading, _), cells in zip(columns, zip(*rows, strict=True), strict=False):
        text = "\n".join((heading, *cells, ""))
        if not text.isascii() or text.count("\n") > len(cells) + 1 or " \n" in text:
            return None
        whole.append(max(len(heading), max(map(len, cells))))
    if not whole or _share(columns, whole, width) != whole:
        return None
    sides = [">" if how == "right" else "<" for _, how in columns]
    line = GAP.join(f"{{:{side}{room}}}" for side, room in zip(sides, whole, strict=True))
    return whole, [line.format(*row).rstrip(" ") for row in rows]


def measure(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    return sum(_cells(c) for c in text)


def _cells(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _share(columns: Sequence[tuple[str, str]], whole: Sequence[int], width: int) -> list[int]:
    """The width of each column. Of those that can be narrow, the narrowest are served first."""
    widths = list(whole)
    free = [i for i, (_, how) in enumerate(columns) if how in ("cut", "fold")]
    room = width - len(GAP) * (len(columns) - 1)
    room -= sum(whole[i] for i in range(len(columns)) if i not in free)
    for rank, i in enumerate(sorted(free, key=lambda i: whole[i])):
        share = max(room // (len(free) - rank), LEAST, len(columns[i][0]))
        widths[i] = min(whole[i], share)
        room -= widths[i]
    return widths


def _fit(line: str, how: str, room: int, ellipsis: str) -> list[str]:
    if measure(line) <= room or how not in ("cut", "fold"):
        return [line]
    if how == "fold":
        return _fold(line, room)
    return [_head(line, room - measure(ellipsis)) + ellipsis]


def _fold(line: str, room: int) -> list[str]:
    """A line as several: between words where it can be, else within one."""
    parts, part = [], ""
    for word in line.split(" "):
        joined = f"{part} {word}" if part else word
        if measure(joined) <= room:
            part = joined
            continue
        if part:
            parts.append(part)
        while measure(word) > room:
            head = _head(word, room) or word[0]
            parts.append(head)
            word = word[len(head) :]
        part = word
    return [one.rstrip(" ") for one in (*parts, part) if one.strip(" ")]


def _head(text: str, room: int) -> str:
    """The longest start of a text that has room."""
    if text.isascii():
        return text[: max(room, 0)]
    end = len(text)
    while end and measure(text[:end]) > room:
        end -= 1
    return text[:end]


def _join(
    texts: Sequence[str],
    columns: Sequence[tuple[str, str]],
    widths: Sequence[int],
    style: Callable[[str], str] = str,
) -> str:
    """A line. After its last text there is nothing, so that what is wide stays on one line."""
    last = max((i for i, text in enumerate(texts) if text), default=-1)
    parts = []
    for i, text in enumerate(texts[: last + 1]):
        space = " " * (widths[i] - measure(text))
        if columns[i][1] == "right":
            parts.append(space + style(text))
        else:
            parts.append(style(text) + (space if i < last else ""))
    return GAP.join(parts)
