"""Help as a manual page: what a command does, its arguments and options in groups, exit codes,
files, examples that can be pasted, and what to look at next. No line is wider than the terminal.
"""

import shlex
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

from .commands import ALIASES, COMMANDS
from .pages import CODES, GROUPS, PAGES, PANELS, VARIABLES, panel
from .spare import spare
from .suggest import near

Rows = Sequence[tuple[str, str]]
COMMON = ("library", "json", "quiet", "help")  # options of every command, shown last
WIDEST, NARROWEST = 80, 30
WORDS = {"int": "N", "float": "X", "path": "PATH"}


def width() -> int:
    """The columns that help fills: those of the terminal, up to 80, since longer lines are hard to
    read."""
    return max(NARROWEST, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))


class Command(TyperCommand):
    """One command, with its page."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spare(self.get_params(ctx))
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.width = width() - 1
        name = ALIASES.get(str(self.name), str(self.name))
        page = PAGES[name]
        params = self.get_params(ctx)
        formatter.write_usage(ctx.command_path, _usage(params))
        self.format_help_text(ctx, formatter)
        for heading, rows in _sections(name, params, ctx):
            _definitions(formatter, heading, rows)
        meanings = {0: CODES[0], 2: CODES[2].partition(":")[0]} | page.exits
        codes = [(str(code), meaning) for code, meaning in sorted(meanings.items())]
        _definitions(formatter, "Exit codes (all: adaptlib --help)", codes)
        if page.files:
            _text(formatter, "Files", page.files)
        formatter.write_paragraph()
        formatter.write("Examples:\n")
        for line in self.examples():
            formatter.write(_folded(line, formatter.width) + "\n")
        if page.see:
            _text(formatter, "See also", ", ".join(f"adaptlib {one}" for one in page.see))

    def examples(self) -> Sequence[str]:
        from .commands import examples

        return examples(ALIASES.get(str(self.name), str(self.name)))


class Commands(TyperGroup):
    """All commands, in groups. Its help imports none of them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spare(self.get_params(ctx))
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        formatter.width = width() - 1
        formatter.write_usage(ctx.command_path, "COMMAND [ARGUMENTS] [OPTIONS]")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        first = max(map(len, COMMANDS))
        for group in GROUPS:
            names = [name for name in COMMANDS if PAGES[name].group == group]
            rows = [(name, PAGES[name].summary) for name in names]
            _definitions(formatter, group, rows, first=first)
        _definitions(formatter, "Options", [_record(p, ctx) for p in self.get_params(ctx)])
        codes = [(str(code), meaning) for code, meaning in CODES.items()]
        _definitions(formatter, "Exit codes", codes)
        _definitions(formatter, "Environment", list(VARIABLES.items()))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = [*COMMANDS, *ALIASES, "help"]
        if args[0] not in self.commands and not args[0].startswith("-"):
            there = near(args[0], known) or f"; there are: {', '.join(COMMANDS)}"
            ctx.fail(f"No such command {args[0]!r}{there}")
        return super().resolve_command(ctx, args)


def _usage(params: Iterable[Any]) -> str:
    """`NAME [DIRECTORY] [OPTIONS]`, with the options that must be there."""
    said = [_value(one) if one.required else f"[{_value(one)}]" for one in params if _argument(one)]
    must = [f"{one.opts[0]} {_value(one)}" for one in params if one.required and not _argument(one)]
    return " ".join([*said, *must, "[OPTIONS]"])


def _sections(command: str, params: Iterable[Any], ctx: Any) -> list[tuple[str, Rows]]:
    """Arguments, then options by their groups, then the options of every command."""
    found: dict[str, list[tuple[str, str]]] = {"Arguments": []}
    found |= {heading: [] for heading in PANELS.get(command, {})}
    common: list[tuple[str, str]] = []
    for param in params:
        if param.hidden:
            continue
        record = _record(param, ctx)
        if _argument(param):
            found["Arguments"].append(record)
        elif param.name in COMMON:
            common.append(record)
        else:
            found.setdefault(panel(command, param.name), []).append(record)
    found["Options of every command"] = common
    return [(heading, rows) for heading, rows in found.items() if rows]


def _argument(param: Any) -> bool:
    return param.param_type_name == "argument"


def _record(param: Any, ctx: Any) -> tuple[str, str]:
    """A parameter as it is typed, and its help with the default."""
    _, said = param.get_help_record(ctx)
    said = said.replace("; required]", "]").replace("[required]", "").strip()
    if _argument(param):
        return _value(param), said
    short = sorted(param.opts, key=len)
    names = ", ".join(short) + "".join(f" / {one}" for one in param.secondary_opts)
    return (names if param.is_flag else f"{names} {_value(param)}"), said


def _value(param: Any) -> str:
    """What stands for a value: its metavar, its choices, or a word for its type."""
    many = "..." if _argument(param) and param.nargs == -1 else ""
    if param.metavar is not None:
        return param.metavar if param.metavar.endswith("...") else param.metavar + many
    if _argument(param):
        return str(param.name).upper().rstrip("S" if many else "") + many
    descriptor = param.type_descriptor
    if descriptor.is_choice:
        return "|".join(map(str, descriptor.choices))
    return WORDS.get(param.display_type(None).strip("<>"), "TEXT")


def _definitions(formatter: Any, heading: str, rows: Rows, *, first: int = 0) -> None:
    """A heading, and in each row a word and what it means; below the word where that is long or the
    terminal narrow."""
    formatter.write_paragraph()
    formatter.write(f"{heading}:\n")
    most = min(28, formatter.width // 3)
    column = max((len(word) for word, _ in rows if len(word) <= most), default=0)
    column = max(column, min(first, most))
    for word, said in rows:
        lines = textwrap.wrap(said, formatter.width - column - 4, break_on_hyphens=False)
        if len(word) > column:
            formatter.write(textwrap.fill(word, formatter.width, initial_indent="  ",
                                          subsequent_indent="    ") + "\n")  # fmt: skip
        elif lines:
            formatter.write(f"  {word:<{column}}  {lines.pop(0)}\n")
        for line in lines:
            formatter.write(f"{'':{column + 4}}{line}\n")


def _text(formatter: Any, heading: str, text: str) -> None:
    formatter.write_paragraph()
    formatter.write(f"{heading}:\n")
    lines = textwrap.wrap(
        text,
        formatter.width,
        initial_indent="  ",
        subsequent_indent="  ",
        break_on_hyphens=False,
    )
    formatter.write("\n".join(lines) + "\n")


def _folded(line: str, columns: int) -> str:
    """A command that can be pasted, in several lines where it is long."""
    lines, now = [], " "
    for word in _words(line):
        if len(now) + 1 + len(word) > columns - 2 and now.strip():
            lines.append(now + " \\")
            now = "     " + word
        else:
            now += f" {word}"
    return "\n".join([*lines, now])


def _words(line: str) -> list[str]:
    """The words of a command as they are written, quotes included."""
    lexer = shlex.shlex(line, posix=False, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    return [*lexer]
