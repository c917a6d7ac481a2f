"""What commands print: data on stdout, words about it on stderr."""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, Final

COLORS: Final = ("auto", "always", "never")
_color: Final = ContextVar("color", default="auto")


def document(command: str, **fields: Any) -> None:
    """One JSON document with its schema's name, such as `adaptlib.list/1`. In ASCII where stdout
    is not UTF-8, since JSON has an escape for everything and an encoding has not."""
    import msgspec

    body = {"schema": f"adaptlib.{command}/1", **fields}
    text = msgspec.json.format(msgspec.json.encode(body), indent=2).decode()
    if not _is_utf8(sys.stdout.encoding):
        text = re.sub(r"[^\x00-\x7f]", _json_escape, text)
    elif not text.replace("\n", "").isprintable():  # a terminal obeys more than JSON must escape
        text = re.sub(
            r"[^\x20-\x7e\n]", lambda m: m[0] if m[0].isprintable() else _json_escape(m), text
        )
    sys.stdout.write(text + "\n")


def _json_escape(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be")  # two of them above U+FFFF
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


def _is_utf8(encoding: str | None) -> bool:
    return (encoding or "").lower().replace("-", "").replace("_", "") == "utf8"


@contextmanager
def coloring(choice: str) -> Iterator[None]:
    """Inside, `--color` or the setting is this one of `COLORS`."""
    token = _color.set(choice)
    try:
        yield
    finally:
        _color.reset(token)


def colored() -> bool:
    """Whether stdout takes colours: not with `NO_COLOR`, whatever else is said; then as `--color`
    or the setting says; then always with `FORCE_COLOR` or `CLICOLOR_FORCE`; else on a terminal
    that is not dumb."""
    if os.environ.get("NO_COLOR"):
        return False
    if _color.get() != "auto":
        return _color.get() == "always"
    forced = (os.environ.get("FORCE_COLOR"), os.environ.get("CLICOLOR_FORCE"))
    if any(value not in (None, "", "0") for value in forced):
        return True
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def console() -> Any:
    """Rich's console for stdout, without any escape where it has no colours. 80 columns where
    nobody says."""
    from rich.console import Console

    colors, terminal = colored(), sys.stdout.isatty()
    known = terminal and os.environ.get("TERM") != "dumb"
    return Console(
        highlight=False,
        width=None if terminal else _columns(),
        color_system=("auto" if known else "standard") if colors else None,
        force_terminal=terminal or colors,
        no_color=not colors,
    )


def _columns() -> int:
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and int(columns) else 80


def line(text: str = "") -> None:
    """A line of plain output."""
    sys.stdout.write(plain(text) + "\n")


def note(text: str) -> None:
    """A sentence for the reader, on stderr."""
    sys.stderr.write(plain(text) + "\n")


def plain(text: str) -> str:
    """Text without what would steer the terminal: a card or a file name may come from anybody.
    What stdout's encoding lacks is an escape, as long here as it will be there."""
    if not (text.isprintable() or text.replace("\n", "").isprintable()):
        text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    encoding = sys.stdout.encoding
    if text.isascii() or encoding is None or _is_utf8(encoding):
        return text
    return text.encode(encoding, "backslashreplace").decode(encoding)


def plain_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Tab-separated values for programs: the columns' names, then a line a row, nothing cut. A tab,
    a newline or a backslash in a cell is `\\t`, `\\n` or `\\\\`; a cell without value is empty."""
    for row in (columns, *rows):
        sys.stdout.write("\t".join(map(_cell, row)) + "\n")


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return plain(str(value).replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n"))


def table(columns: Iterable[tuple[str, str]], rows: Iterable[Iterable[str]]) -> None:
    """A table without lines. A column is (heading, how): `left` and `right` are shown whole,
    however narrow the terminal; there, `cut` loses its end and `fold` goes on in the next line."""
    from .table import lay_out

    width = _columns()
    if sys.stdout.isatty() and not os.environ.get("COLUMNS"):
        width = os.get_terminal_size(sys.stdout.fileno()).columns or width
    bold = (lambda text: f"\x1b[1m{text}\x1b[0m") if colored() else str
    cells = [[plain(cell) for cell in row] for row in rows]
    lines = lay_out([*columns], cells, width, ellipsis=ellipsis(), bold=bold)
    sys.stdout.write("\n".join([*lines, ""]))


def size(count: int) -> str:
    """Bytes for people: 1.4 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return ""


def ago(age: timedelta) -> str:
    """How long ago, in the largest unit of which it is two or more: `3 days ago`."""
    seconds = age.total_seconds()
    for unit, length in (("year", 31_536_000), ("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}s ago"
    return "just now" if seconds < 60 else f"{seconds:.0f} s ago"


def count(number: int, noun: str) -> str:
    """`1 expert`, `2 experts`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def cut(text: str, width: int) -> str:
    """Text of at most `width` characters; where it is longer, its head and tail."""
    if len(text) <= width:
        return text
    return f"{text[: width // 2 - 1]}..{text[-(width - width // 2 - 1) :]}"


def bar(share: float, width: int) -> str:
    """A bar of `width` cells for a share of 1; in ASCII where the terminal has no blocks."""
    width = max(0, width)
    if not unicode():
        return "#" * round(share * width)
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]


def unicode(characters: str = "█▏─") -> bool:
    """Whether stdout takes these, or block characters."""
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def ellipsis() -> str:
    """What stands for the rest of a text."""
    return "…" if unicode("…") else ".."


def short(digest: str) -> str:
    """`sha256:` and the first 12 digits."""
    return digest[:19]
