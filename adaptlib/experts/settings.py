"""Settings in files: where the files are, what they say, and in which line.

    .adaptlib.toml              of a project, the nearest from here upwards; in pyproject.toml it is
                                the table [tool.adaptlib]
    <config>/adaptlib/config.toml   the user's, for what the project's does not say

`adaptlib config` prints what holds and where it comes from. Nothing is read where no file is.
"""

import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, final

from adaptlib.errors import UsageError

PROJECT: Final = ".adaptlib.toml"
PYPROJECT: Final = "pyproject.toml"
VARIABLE: Final = "ADAPTLIB_NO_CONFIG"

_ignored: Final = ContextVar("ignored", default=False)
# Compiled where they are used: most commands find no file, and should not wait for that.
_OURS: Final = r"(?m)^[ \t]*\[[ \t]*tool[ \t]*\.[ \t]*adaptlib[ \t]*[.\]]"
_TABLE: Final = r"\s*\[\s*([^\[\]#]+?)\s*\]\s*(#.*)?"
_KEY: Final = r"""\s*([A-Za-z0-9_\-."' ]+?)\s*="""


@final
@dataclass(frozen=True)
class SettingsFile:
    """A file of settings. `table` is where in it they are, `values` what they are."""

    scope: Literal["project", "user"]
    path: Path
    table: tuple[str, ...]
    text: str
    values: Mapping[str, Any]

    def where(self, *keys: str) -> str:
        """`path:line` of a setting, or the path where its line cannot be told."""
        line = find(self.text, (*self.table, *keys))
        return str(self.path) if line is None else f"{self.path}:{line + 1}"

    def word(self, key: str) -> str | None:
        """A setting that is text; None where it is not there. UsageError for anything else."""
        value = self.values.get(key)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise UsageError(
                f"{self.where(key)}: {key} is {value!r}, wanted text",
                hint=f'write {key} = "..." there, or leave the files out: adaptlib --no-config',
            )
        return value


@contextmanager
def without_files() -> Iterator[None]:
    """Inside, there are no files of settings: `--no-config`."""
    token = _ignored.set(True)
    try:
        yield
    finally:
        _ignored.reset(token)


def settings_files() -> tuple[SettingsFile, ...]:
    """The files that hold here, the strongest first. UsageError where one cannot be read."""
    if _ignored.get() or os.environ.get(VARIABLE):
        return ()
    user = load(user_file(), "user")
    return tuple(file for file in (project_file(), user) if file is not None)


def project_file() -> SettingsFile | None:
    """The project's file: the nearest from here upwards. One that lies where everybody may write,
    such as /tmp, counts only if it is the user's own: anybody could have put it there."""
    here = Path.cwd()
    for directory in (here, *here.parents):
        for name in (PROJECT, PYPROJECT):
            found = load(directory / name, "project")
            if found and not _planted(found.path):
                return found
    return None


def _planted(path: Path) -> bool:
    try:
        return bool(path.parent.stat().st_mode & stat.S_IWOTH) and path.stat().st_uid != os.getuid()
    except OSError:
        return True


def user_file() -> Path:
    """Where the user's file is, or would be."""
    if sys.platform == "linux":  # as platformdirs says, which takes 8 ms to import
        config = Path(os.environ.get("XDG_CONFIG_HOME", "").strip())
        home = config if config.is_absolute() else _expand("~/.config")
        return home / "adaptlib" / "config.toml"
    from platformdirs import user_config_path

    return user_config_path("adaptlib", appauthor=False) / "config.toml"


def load(path: Path, scope: Literal["project", "user"]) -> SettingsFile | None:
    """A file of settings; None where there is none, or it is a pyproject.toml without ours."""
    data = _read(path)
    if data is None:
        return None
    table = ("tool", "adaptlib") if path.name == PYPROJECT else ()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if table:
            return None  # whoever it is for will say so
        line = data[: error.start].count(b"\n") + 1
        raise _unreadable(f"{path}:{line}", "it is not UTF-8") from None
    if table and not re.search(_OURS, text):
        return None
    return SettingsFile(scope, path, table, text, parse(text, path, table))


def parse(text: str, path: Path, table: tuple[str, ...]) -> Mapping[str, Any]:
    """The settings in a file of this text. UsageError where it is not TOML."""
    import tomllib

    try:
        values: Any = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        where = f"{path}:{line[1] if line else max(1, len(text.splitlines()))}"
        raise _unreadable(where, f"it is not TOML: {error}") from None
    except RecursionError:
        raise _unreadable(str(path), "it is nested too deeply") from None
    for key in table:
        values = values.get(key, {})
        if not isinstance(values, dict):
            raise _unreadable(str(path), f"{key} is not a table")
    return values


def find(text: str, keys: tuple[str, ...]) -> int | None:
    """The line, from 0, on which a key is set; None where that is not on a line of its own. A
    hyphen in a key may be an underscore."""
    wanted = tuple(map(_same, keys))
    for number, (table, key) in enumerate(outline(text.splitlines())):
        if table is not None and key and (*table, *key) == wanted:
            return number
    return None


def outline(lines: Iterable[str]) -> Iterator[tuple[tuple[str, ...] | None, tuple[str, ...]]]:
    """Of each line the table that it is in, its own where it is a header (None: a table among
    several), and the key that is set on it, or nothing. Of lines within a text or list that goes
    over several, it may be wrong."""
    table: tuple[str, ...] | None = ()
    for line in lines:
        key: tuple[str, ...] = ()
        if line.lstrip().startswith("["):
            header = re.fullmatch(_TABLE, line)
            table = _parts(header[1]) if header else None
        elif match := re.match(_KEY, line):
            key = _parts(match[1])
        yield table, key


def _expand(path: str) -> Path:
    return Path(os.path.expanduser(path))  # noqa: PTH111 -- Path.expanduser raises on `~nobody`


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(_same(part.strip().strip("\"'")) for part in dotted.split("."))


def _same(key: str) -> str:
    return key.replace("_", "-")


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        if not os.access(path.parent, os.X_OK):  # nobody can say whether there is one
            return None
        raise _unreadable(str(path), error.strerror or str(error)) from None


def _unreadable(where: str, why: str) -> UsageError:
    return UsageError(
        f"the settings in {where} cannot be read: {why}",
        hint="mend or move that file, or leave it out: adaptlib --no-config ...",
    )
