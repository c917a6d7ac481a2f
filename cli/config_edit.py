"""Changing one setting in a file, and leaving all other lines as they are."""

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptlib.errors import UsageError
from adaptlib.experts.settings import SettingsFile, find, outline, parse


def with_setting(file: SettingsFile, keys: tuple[str, ...], value: Any) -> str:
    """The text of a file with this setting, where it was or below its table. UsageError where that
    cannot be done line by line."""
    lines, full = _lines(file.text), (*file.table, *keys)
    literal = _literal(value)
    number = find(file.text, full)
    if number is not None:
        start = lines[number].partition("=")[0].rstrip()
        comment = lines[number].rpartition(" #")[2].strip() if " #" in lines[number] else ""
        drafts = [f"{start} = {literal}  # {comment}"] * bool(comment) + [f"{start} = {literal}"]
        texts = [_text(file, [*lines[:number], draft, *lines[number + 1 :]]) for draft in drafts]
    else:
        at, header = _place(lines, full[:-1])
        new = [*header, f"{keys[-1]} = {literal}"]
        new += [""] * (not header and at < len(lines) and lines[at] != "")
        texts = [_text(file, [*lines[:at], *new, *lines[at:]])]
    return _checked(file, texts, keys, value)


def without_setting(file: SettingsFile, keys: tuple[str, ...]) -> str:
    """The text of a file without this setting. UsageError where that cannot be done."""
    number = find(file.text, (*file.table, *keys))
    lines = _lines(file.text)
    texts = [] if number is None else [_text(file, [*lines[:number], *lines[number + 1 :]])]
    return _checked(file, texts, keys, None)


def write(path: Path, text: str) -> None:
    """Put the text in place of the file in one step. A file that is a link stays one."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o644
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _lines(text: str) -> list[str]:
    return text.splitlines()


def _text(file: SettingsFile, lines: list[str]) -> str:
    ending = "\r\n" if "\r\n" in file.text else "\n"
    return "".join(line + ending for line in lines)


def _place(lines: list[str], table: tuple[str, ...]) -> tuple[int, list[str]]:
    """Where a new key of a table goes: the line, and a header where the table is not there yet."""
    headers = [i for i, line in enumerate(lines) if line.lstrip().startswith("[")]
    start = -1
    if table:
        tables = [found for found, _ in outline(lines)]
        start = next((i for i in headers if tables[i] == table), -2)
    if start == -2:
        return len(lines), [*([""] if lines and lines[-1] else []), f"[{'.'.join(table)}]"]
    end = next((i for i in headers if i > start), len(lines))
    if end < len(lines):  # what stands right above a header belongs to that
        while end > start + 1 and (not lines[end - 1] or lines[end - 1].lstrip()[:1] == "#"):
            end -= 1
    return end, []


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, int | float):
        return repr(value)
    # Text in JSON is text in TOML, but for one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _checked(file: SettingsFile, texts: list[str], keys: tuple[str, ...], value: Any) -> str:
    """The first of the texts that says what the file said, and this."""
    wanted = _plain(file.values)
    table = wanted
    for key in keys[:-1]:
        table = table.setdefault(key, {})
    table.pop(keys[-1], None)
    if value is not None:
        table[keys[-1]] = value
    for text in texts:
        with contextlib.suppress(UsageError):
            if _plain(parse(text, file.path, file.table)) == wanted:
                return text
    raise UsageError(
        f"{file.where(*keys)}: {'.'.join(keys)} is not on a line of its own, so it was not changed",
        hint="change it in an editor",
    )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tables as dicts with hyphens in their keys."""
    return {
        key.replace("_", "-"): _plain(value) if isinstance(value, dict) else value
        for key, value in values.items()
    }
