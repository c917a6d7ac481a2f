"""A line that cannot be meant, in words: what is wrong, what is there, and what to type next."""

import re
from typing import TYPE_CHECKING, Any

from .commands import ALIASES, COMMANDS
from .suggest import closest, near

if TYPE_CHECKING:
    import typer

FIRST = {"--color": "--color never", "--no-config": "--no-config"}
EVERYWHERE = ("--json", "--library", "--quiet", "-L", "-q")  # options of every command


def wrong(error: "typer.TyperException") -> tuple[str, str]:
    """(what is wrong, what to type next)."""
    message = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "adaptlib"
    command = ALIASES.get(path.rpartition(" ")[2], path.rpartition(" ")[2])
    hint = f"{path} --help"
    option = getattr(error, "option_name", None)
    if option is not None and type(error).__name__ == "NoSuchOption":
        if command not in COMMANDS and option in EVERYWHERE:
            return f"{option} comes after the command", f"adaptlib list {option}"
        if command in COMMANDS and option in FIRST:
            return f"{option} comes before the command", f"adaptlib {FIRST[option]} {command} ..."
        return f"No such option {option}{near(option, _options(context))}", hint
    if (choice := _choice(error)) is not None:
        return choice
    if command in COMMANDS and type(error).__name__ == "MissingParameter":
        from .commands import examples

        return message, f"{examples(command)[0]}  ({hint})"
    return message, hint


def _choice(error: Any) -> tuple[str, str] | None:
    """The same for a value that is none of those that its option knows."""
    param: Any = getattr(error, "param", None)
    given = re.search(r"'(.*)' is not one of", str(getattr(error, "message", "")))
    if param is None or given is None or not param.type_descriptor.choices:
        return None
    known = param.type_descriptor.choices
    name, value = param.opts[-1], given[1]
    return (
        f"{name} is one of {', '.join(known)}; got {value!r}{near(value, known)}",
        f"{name} {closest(value, known) or known[0]}",
    )


def _options(context: Any) -> list[str]:
    """The options that the command has."""
    if context is None:
        return []
    return [
        name
        for param in context.command.get_params(context)
        for name in (*param.opts, *param.secondary_opts)
        if name.startswith("-") and not getattr(param, "hidden", False)
    ]
