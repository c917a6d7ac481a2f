"""Files as plain records: where each is, and its columns. What they mean is up to `readers`."""

import csv
import difflib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from adaptlib.errors import CorruptError, NotFoundError, UsageError

Record = tuple[str, dict[str, Any]]  # "tasks/a.csv, line 3", {"input": ..., "output": ...}


def file_records(path: Path) -> Iterator[Record]:
    """The records of one file, by its suffix (see `FORMATS`). Text is UTF-8, with or without a
    byte order mark.

    .jsonl: an object a line. .json: a list of objects. .csv, .tsv: a row each, under a header.
    .txt: a paragraph each, in the column `text`; blank lines part them.

    Raises NotFoundError (no such file), UsageError (a directory, another suffix), CorruptError
    (bytes that are not text, or not of the format, with the line).
    """
    if path.is_dir():
        raise UsageError(
            f"{path} is a directory, not a task", hint=f"give one of its files: {path / '*.jsonl'}"
        )
    if not path.is_file():
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, there, n=1, cutoff=0.5)
        raise NotFoundError(
            f"there is no task file {path}"
            + (f"; did you mean {path.parent / close[0]}?" if close else ""),
            hint=f"a file of {', '.join(FORMATS)}, or - for JSON lines on stdin",
        )
    read = FORMATS.get(path.suffix.lower())
    if read is None:
        wanted = ", ".join(FORMATS)
        raise UsageError(
            f"{path} has the suffix {path.suffix!r}; a task wants one of {wanted}",
            hint="name it after what is in it; .jsonl is one JSON object a line",
        )
    return read(_text(path.read_bytes(), str(path)), str(path))


def stdin_records() -> Iterator[Record]:
    """The JSON lines on standard input."""
    return _jsonl(_text(sys.stdin.buffer.read(), "standard input"), "standard input")


def _text(data: bytes, name: str) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CorruptError(f"{name} is UTF-16; wanted UTF-8", hint="save it as UTF-8")
    zero = data.find(0)
    if zero >= 0:
        raise CorruptError(f"{name}, line {_line(data, zero)}: a zero byte; this is no text file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + 3 * data.startswith(b"\xef\xbb\xbf")  # counted from after the mark
        raise CorruptError(
            f"{name}, line {_line(data, at)}: not UTF-8 (byte 0x{data[at]:02x})",
            hint="save it as UTF-8",
        ) from error


def _line(data: bytes, at: int) -> int:
    return data.count(b"\n", 0, at) + 1


def _jsonl(text: str, name: str) -> Iterator[Record]:
    # not splitlines(), which also parts at characters that JSON has within strings
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{name}, line {number}"
            yield place, _object(_parsed(line, place), place)


def _json(text: str, name: str) -> Iterator[Record]:
    if not text.strip():
        return
    values = _parsed(text, name)
    if not isinstance(values, list):
        raise CorruptError(f"{name}: wanted a list of objects, got {type(values).__name__}")
    for number, value in enumerate(values, 1):
        place = f"{name}, item {number}"
        yield place, _object(value, place)


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise CorruptError(f"{place}: JSON that is nested too deeply") from error
    except ValueError as error:
        hint = None
        if place.lower().endswith(".json") and str(error).startswith("Extra data"):
            hint = "name it .jsonl, if it has one object a line"
        raise CorruptError(f"{place}: not JSON ({error})", hint=hint) from error


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CorruptError(f"{place}: wanted an object, got {type(value).__name__}")
    return value


def _csv(text: str, name: str) -> Iterator[Record]:
    return _table(text, name, "CSV", ",")


def _tsv(text: str, name: str) -> Iterator[Record]:
    return _table(text, name, "TSV", "\t")


def _table(text: str, name: str, kind: str, delimiter: str) -> Iterator[Record]:
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        place = f"{name}, line {lines.line_num + 1}"  # where the row begins; it may have several
        try:
            row = next(lines, None)
        except csv.Error as error:
            long = "field limit" in str(error)
            raise CorruptError(
                f"{place}: not {kind} ({error})",
                hint="give texts of this length as .jsonl"
                if long
                else 'quotes in a field are doubled, and it is put in quotes: "he said ""no"""',
            ) from error
        if row is None:
            return
        if not row:
            continue  # a blank line
        if header is None:
            header = [column.strip() for column in row]
            again = sorted({column for column in header if column and header.count(column) > 1})
            if again:
                raise CorruptError(f"{place}: the header has {', '.join(again)} twice")
        elif len(row) != len(header):
            raise CorruptError(
                f"{place}: {len(row)} fields; the header has {len(header)}: {', '.join(header)}",
                hint="put fields that have separators or line breaks in quotes",
            )
        else:
            yield place, dict(zip(header, row, strict=True))


def _txt(text: str, name: str) -> Iterator[Record]:
    paragraph: list[str] = []
    for number, line in enumerate([*re.split(r"\r\n|\n|\r", text), ""], 1):
        if line.strip():
            paragraph.append(line.rstrip())
        elif paragraph:
            yield f"{name}, line {number - len(paragraph)}", {"text": "\n".join(paragraph)}
            paragraph = []


# How each suffix is read: text and the file's name in, records out.
FORMATS: dict[str, Callable[[str, str], Iterator[Record]]] = {
    ".csv": _csv,
    ".json": _json,
    ".jsonl": _jsonl,
    ".tsv": _tsv,
    ".txt": _txt,
}
