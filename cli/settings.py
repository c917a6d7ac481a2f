"""Settings from files as defaults of options.

    library = "~/experts"       the library
    color = "never"             auto, always or never

    [route]                     of each command, what its options are where nobody says
    top-k = 2

Strongest first: the option, the environment, the project's file, the user's file, the default.
"""

import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from adaptlib.errors import UsageError
from adaptlib.experts.settings import SettingsFile, settings_files, without_files

from . import out
from .commands import ALIASES, COMMANDS, load
from .suggest import near

if TYPE_CHECKING:
    import typer

TOP: Final = {"library": "a path", "color": "auto, always or never"}
UNREAD: Final = ("config", "doctor")  # they say themselves what is wrong with a file

# What no file may say: what programs that read the output rely on, what asks for consent, and what
# is of one run alone. Neither may it name a file to read or write, so that a project that somebody
# sends cannot.
NEVER: Final = (
    *("help", "json", "plain", "quiet", "fields", "filters", "limit", "all_tags", "library"),
    *("yes", "replace", "allow_empty", "repair", "restore", "demo", "merged_base"),
    *("assign", "diff", "dry_run", "label", "name", "prompt", "save", "description", "resume"),
)


class Said(NamedTuple):
    """A setting: `keys` is (library,) or (route, top-k)."""

    keys: tuple[str, ...]
    value: Any
    origin: str

    @property
    def key(self) -> str:
        return ".".join(self.keys)


def apply(context: "typer.Context", *, color: str | None, no_config: bool) -> None:
    """Let the settings hold for the command that is about to run."""
    if no_config:
        context.with_resource(without_files())
    invoked = str(context.invoked_subcommand)
    name = ALIASES.get(invoked, invoked)
    try:
        files = settings_files()
        check_tables(files)
        said = chosen_color(files, color)
    except UsageError:
        if name not in UNREAD:
            raise
        files, said = (), chosen_color((), color)
    context.with_resource(out.coloring(said.value))
    if name not in UNREAD and any(name in file.values for file in files):
        command = context.command.commands[invoked]  # type: ignore[attr-defined]
        params = settable(name, command)
        context.default_map = {
            invoked: {params[one.keys[1]].name: one.value for one in options(files, name, command)}
        }


def chosen_color(files: Sequence[SettingsFile], flag: str | None) -> Said:
    """Whether there are colours, and who says so; `out.colored` goes by the same order."""
    if os.environ.get("NO_COLOR"):
        return Said(("color",), "never", "NO_COLOR")
    if flag is not None:
        if flag not in out.COLORS:
            raise UsageError(
                f"--color is {flag!r}{near(flag, out.COLORS)}", hint=f"one of: {TOP['color']}"
            )
        return Said(("color",), flag, "--color")
    for file in files:
        value = file.word("color")
        if value is not None:
            if value not in out.COLORS:
                raise UsageError(
                    f"{file.where('color')}: color is {value!r}{near(value, out.COLORS)}",
                    hint=f"one of: {TOP['color']}",
                )
            return Said(("color",), value, file.where("color"))
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE"):
        if os.environ.get(name, "") not in ("", "0"):
            return Said(("color",), "always", name)
    return Said(("color",), "auto", "default")


def check_tables(files: Sequence[SettingsFile]) -> None:
    """UsageError where a file has a key that is neither a setting nor a command with a table."""
    for file in files:
        for key, value in file.values.items():
            if key in TOP:
                file.word(key)
                continue
            if key not in COMMANDS:
                raise unknown(file.where(key), key, key, [*TOP, *COMMANDS])
            if not isinstance(value, dict):
                raise UsageError(
                    f"{file.where(key)}: {key} is {value!r}, wanted a table of its options",
                    hint=f"[{'.'.join((*file.table, key))}] on a line, and options below it",
                )


def unknown(where: str, key: str, word: str, known: Sequence[str]) -> UsageError:
    """The error for a setting that there is not; `word` is the part of it that is wrong."""
    return UsageError(
        f"{where}: there is no setting {key!r}{near(word, known)}",
        hint=f"there are: {', '.join(known)}" if len(known) < 60 else "see all: adaptlib config",
    )


def settable(name: str, command: Any) -> dict[str, Any]:
    """The options of a command that a file may set, by their names without hyphens in front."""
    hints = typing.get_type_hints(load(name))
    found = {}
    for param in command.params:
        kinds = typing.get_args(hints.get(param.name)) or (hints.get(param.name),)
        if param.param_type_name != "option" or param.name in NEVER or Path in kinds:
            continue
        found[max(param.opts, key=len).lstrip("-")] = param
    return found


def options(files: Sequence[SettingsFile], name: str, command: Any) -> Iterator[Said]:
    """What the files say of a command's options. UsageError where that cannot be."""
    known = settable(name, command)
    seen: set[str] = set()
    for file in files:
        table: Mapping[str, Any] = file.values.get(name, {})
        for word, value in table.items():
            key = word.replace("_", "-")
            where = file.where(name, word)
            if key not in known:
                raise unknown(where, f"{name}.{word}", key, [*known])
            checked = check_option(where, f"{name}.{key}", known[key], value, command)
            if key not in seen:
                seen.add(key)
                yield Said((name, key), checked, where)


def check_option(where: str, key: str, param: Any, value: Any, command: Any) -> Any:
    """A value as the option takes it. UsageError where it does not."""
    if param.multiple:
        value = [value] if isinstance(value, str) else value
    fits = isinstance(value, bool) == bool(param.is_flag)
    if isinstance(value, dict) or isinstance(value, list) != bool(param.multiple) or not fits:
        wanted = "true or false" if param.is_flag else "a list" if param.multiple else "one value"
        raise UsageError(f"{where}: {key} is {value!r}, wanted {wanted}", hint=_see(key))
    import typer

    try:
        context = typer.Context(command)
        param.process_value(context, value if param.is_flag or param.multiple else str(value))
    except typer.TyperException as error:
        message = error.format_message().rstrip(".").partition(": ")[2] or str(error)
        raise UsageError(f"{where}: {key} is {value!r}: {message}", hint=_see(key)) from None
    return value


def _see(key: str) -> str:
    return f"what it takes: adaptlib {key.partition('.')[0]} --help"
