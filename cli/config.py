"""adaptlib config: settings, what they are and who says so."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from . import out
from .commands import COMMANDS, load
from .config_edit import with_setting, without_setting, write
from .environment import SECRET, VARIABLES
from .options import JsonOption, LibraryOption, PlainOption, QuietOption, check_formats
from .settings import (
    TOP,
    Said,
    check_option,
    check_tables,
    chosen_color,
    options,
    settable,
    unknown,
)
from .suggest import near

EXAMPLES = (
    "adaptlib config",
    "adaptlib config set library ~/experts",
    "adaptlib config set route.top-k 2 --project",
    "adaptlib config get route.top-k",
    "adaptlib config env",
)
ACTIONS = ("list", "get", "set", "unset", "path", "env")


def config(
    context: typer.Context,
    action: Annotated[str, typer.Argument(metavar="[ACTION]", help=", ".join(ACTIONS))] = "list",
    key: Annotated[
        str | None,
        typer.Argument(
            help="library, color, or an option such as route.top-k.", show_default=False
        ),
    ] = None,
    value: Annotated[
        str | None, typer.Argument(help="What it is to be.", show_default=False)
    ] = None,
    user: Annotated[
        bool, typer.Option("--user", help="Set it in the user's file, which is what is meant.")
    ] = False,
    project: Annotated[
        bool, typer.Option("--project", help="Set it in the project's file, made here if need be.")
    ] = False,
    plain: PlainOption = False,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List the settings with where each comes from, or get, set or unset one.

    path says which files there are, env which environment variables are read. A setting holds for
    every later call: library, color, and, by COMMAND.OPTION, what an option is where nobody says.
    """
    from adaptlib.errors import UsageError

    check_formats(json=json, plain=plain)
    if action not in ACTIONS:
        raise UsageError(
            f"there is no action {action!r}{near(action, ACTIONS)}",
            hint=f"adaptlib config {'|'.join(ACTIONS)}",
        )
    needs = {"get": 1, "unset": 1, "set": 2}.get(action, 0)
    if sum(word is not None for word in (key, value)) != needs:
        usage = {"get": "get KEY", "unset": "unset KEY", "set": "set KEY VALUE"}.get(action, action)
        raise UsageError(f"config {action} takes {needs} words", hint=f"adaptlib config {usage}")
    if user and project:
        raise UsageError("--user and --project are two files", hint="choose one of them")
    flag = context.find_root().params.get("color")
    form = {"json": json, "plain": plain, "quiet": quiet}
    if action == "list":
        _print_settings(_settings(library, flag), **form)
    elif action == "get":
        _get(_keys(str(key)), library, flag, **form)
    elif action == "path":
        _print_files(**form)
    elif action == "env":
        _print_variables(**form)
    else:
        _change(_keys(str(key)), value, project=project, json=json, quiet=quiet)


def _command(name: str) -> Any:
    """A command as typer makes it, with its options."""
    app = typer.Typer(add_completion=False)
    app.command(name)(load(name))
    return typer.main.get_command(app)


def _settings(library: Path | None, flag: str | None) -> list[Said]:
    """Every setting that holds here: those of adaptlib, and what files say of options."""
    from adaptlib.experts.location import library_path
    from adaptlib.experts.settings import settings_files

    files = settings_files()
    check_tables(files)
    where, why = library_path(library)
    found = [Said(("library",), str(where), why), chosen_color(files, flag)]
    for name in COMMANDS:
        if any(name in file.values for file in files):
            found += options(files, name, _command(name))
    return found


def _keys(text: str) -> tuple[str, ...]:
    """(library,) or (route, top-k). UsageError where there is no such setting."""
    from adaptlib.errors import UsageError

    name, dot, option = text.partition(".")
    name = name if name in COMMANDS else name.replace("_", "-")
    if not dot and name in TOP:
        return (name,)
    if name not in COMMANDS:
        raise unknown("adaptlib config", text, name, [*TOP, *COMMANDS])
    if not option:
        raise UsageError(
            f"{name} is a command, and has a setting for each option",
            hint=f"such as {name}.{next(iter(settable(name, _command(name))), 'OPTION')}",
        )
    known, option = settable(name, _command(name)), option.lstrip("-").replace("_", "-")
    if option not in known:
        raise unknown("adaptlib config", text, option, [*known])
    return (name, option)


def _get(
    keys: tuple[str, ...],
    library: Path | None,
    flag: str | None,
    *,
    json: bool,
    plain: bool,
    quiet: bool,
) -> None:
    found = next((said for said in _settings(library, flag) if said.keys == keys), None)
    if found is None:
        param = settable(keys[0], _command(keys[0]))[keys[1]]
        found = Said(keys, param.default, "default")
    if json or plain:
        _print_settings([found], json=json, plain=plain, quiet=quiet)
    elif found.value is not None:
        out.line(_shown(found.value))


def _change(
    keys: tuple[str, ...], value: str | None, *, project: bool, json: bool, quiet: bool
) -> None:
    from adaptlib.errors import NotFoundError
    from adaptlib.experts.settings import PROJECT, SettingsFile, load, project_file, user_file

    scope = "project" if project else "user"
    file = project_file() if project else load(user_file(), "user")
    if file is None:
        path = Path.cwd() / PROJECT if project else user_file()
        file = SettingsFile(scope, path, (), "", {})
    if value is None:
        if not any(key in _held(file, keys[:-1]) for key in (keys[-1], keys[-1].replace("-", "_"))):
            raise NotFoundError(
                f"{file.path} does not set {'.'.join(keys)}", hint="see who does: adaptlib config"
            )
        write(file.path, without_setting(file, keys))
        meant = None
    else:
        meant = _meant(keys, value, file.path)
        write(file.path, with_setting(file, keys, meant))
    if json:
        out.document("config-set", path=str(file.path), key=".".join(keys), value=meant)
    elif not quiet:
        text = f"{'.'.join(keys)} = {_shown(meant)}" if value is not None else ".".join(keys)
        out.line(f"{'Set' if value is not None else 'Unset'}  {text}  in {file.path}")
        _note_who_wins(keys, str(file.path))


def _held(file: Any, keys: tuple[str, ...]) -> Any:
    values = file.values
    for key in keys:
        values = values.get(key, {})
    return values


def _meant(keys: tuple[str, ...], text: str, path: Path) -> Any:
    """What a word on the command line says, as a file has it."""
    from adaptlib.errors import UsageError

    if keys == ("library",):
        chosen = Path(text)
        outside = not chosen.is_absolute() and not text.startswith("~")
        return str(chosen.absolute()) if outside and Path.cwd() != path.parent else text
    if keys == ("color",):
        if text not in out.COLORS:
            raise UsageError(
                f"color is {text!r}{near(text, out.COLORS)}", hint=f"one of: {TOP['color']}"
            )
        return text
    command = _command(keys[0])
    param = settable(keys[0], command)[keys[1]]
    value: Any = text
    if param.is_flag:
        words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        value = words.get(text.lower(), text)
    elif param.multiple:
        value = text.replace(",", " ").split()
    elif isinstance(number := _number(text), int | float):
        value = number
    return check_option("adaptlib config", ".".join(keys), param, value, command)


def _number(text: str) -> int | float | str:
    """A number as it is, where writing it gives the same text; else the text."""
    for kind in (int, float):
        try:
            if str(kind(text)) == text:
                return kind(text)
        except ValueError:
            continue
    return text


def _note_who_wins(keys: tuple[str, ...], path: str) -> None:
    for said in _settings(None, None):
        if said.keys == keys and not said.origin.startswith(path) and said.origin != "default":
            out.note(f"  But {said.origin} goes before it, and says {_shown(said.value)}")


def _print_settings(settings: Sequence[Said], *, json: bool, plain: bool, quiet: bool) -> None:
    if json:
        found = [{"key": one.key, "value": one.value, "origin": one.origin} for one in settings]
        out.document("config", settings=found)
    elif quiet:
        for one in settings:
            out.line(one.key)
    elif plain:
        rows = [(one.key, _shown(one.value), one.origin) for one in settings]
        out.plain_table(("setting", "value", "origin"), rows)
    else:
        rows = [(one.key, _shown(one.value), one.origin) for one in settings]
        out.table([("SETTING", "left"), ("VALUE", "fold"), ("FROM", "fold")], rows)


def _print_files(*, json: bool, plain: bool, quiet: bool) -> None:
    from adaptlib.experts.settings import project_file, user_file

    found = project_file()
    files = [("project", found.path, True)] if found else []
    files.append(("user", user_file(), user_file().is_file()))
    if json:
        rows = [{"scope": scope, "path": str(path), "exists": is_} for scope, path, is_ in files]
        out.document("config-path", files=rows)
    elif plain:
        out.plain_table(("scope", "path", "exists"), files)
    else:
        for scope, path, is_ in files:
            note = "" if is_ else "  (not there)"
            out.line(str(path) if quiet else f"{scope:<8} {path}{note}")


def _print_variables(*, json: bool, plain: bool, quiet: bool) -> None:
    rows = [
        (name, "(set)" if name in SECRET and value else value, meaning)
        for name, meaning in VARIABLES.items()
        for value in [os.environ.get(name)]
    ]
    if json:
        found = [{"name": name, "value": value, "meaning": said} for name, value, said in rows]
        out.document("config-env", variables=found)
    elif quiet:
        for name, *_ in rows:
            out.line(name)
    elif plain:
        out.plain_table(("name", "value", "meaning"), rows)
    else:
        columns = [("VARIABLE", "left"), ("NOW", "fold"), ("WHAT IT SAYS", "fold")]
        out.table(columns, [(name, value or "", said) for name, value, said in rows])


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)
