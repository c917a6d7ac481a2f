"""The entry point: commands by name, errors as sentences and exit codes.

0 ok   1 failed   2 usage   3 not found   4 corrupt   5 conflict or locked   6 remote
7 refused as unsafe or unsupported   130 interrupted   141 a broken pipe   143 terminated
"""

import gc
import os
import sys
import warnings
from typing import TYPE_CHECKING, Annotated

from .commands import ALIASES, asked, load

if TYPE_CHECKING:
    import typer


def application(*names: str) -> "typer.Typer":
    """The command line with these commands; the help of all is there without them."""
    import typer

    from .help import Command, Commands

    app = typer.Typer(
        name="adaptlib",
        cls=Commands,
        add_completion=False,
        help="Train, keep, group, merge and route the adapters of a language model.",
        epilog="Start with: adaptlib init --demo, then adaptlib list, cluster and route. "
        "Of one command: adaptlib help COMMAND.",
        invoke_without_command=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(
        context: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
        color: Annotated[
            str | None,
            typer.Option(metavar="auto|always|never", help="Colours; on a terminal if not said."),
        ] = None,
        no_config: Annotated[
            bool, typer.Option("--no-config", help="Leave out the files of settings.")
        ] = False,
    ) -> None:
        """Train, keep, group, merge and route the adapters of a language model."""
        if version:
            _version()
        elif context.invoked_subcommand is None:
            sys.stderr.write(context.get_help() + "\n")
            raise typer.Exit(2)
        else:
            from .settings import apply

            apply(context, color=color, no_config=no_config)

    for name in names:
        app.command(name, cls=Command)(load(name))
    for alias, name in ALIASES.items():
        if name in names:
            app.command(alias, hidden=True, cls=Command)(load(name))
    return app


def run() -> None:
    """Run the command line; the process ends here."""
    from .streams import guarded

    # A list of ten thousand is a million small objects, none of them garbage: looking for it over
    # and over takes a sixth of the time.
    gc.set_threshold(100_000, 50, 50)
    sys.exit(guarded(lambda: invoke(sys.argv[1:])))


def invoke(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    if arguments == ["--version"]:
        return _version()
    if arguments[:1] == ["__complete"]:
        from .complete import respond

        return respond(arguments[1:])
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    from adaptlib.errors import AdaptlibWarning

    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("always", AdaptlibWarning)  # it is for the reader, whatever -W says
        return _invoke(arguments)


def _version() -> int:
    from adaptlib import __version__

    print(f"adaptlib {__version__}")
    return 0


def _invoke(arguments: list[str]) -> int:
    import typer

    from .streams import broken, stopped

    try:
        name = asked(arguments)
        app = application(name) if name else application()
        command = typer.main.get_command(app)
        # Not its `main`, which makes exit codes of its own from signals and broken pipes.
        code = 0
        try:
            with command.make_context("adaptlib", [*arguments]) as context:
                command.invoke(context)
        except typer.Exit as done:
            code = done.exit_code
        sys.stdout.flush()
        return code
    except typer.TyperException as error:
        return _usage(error, arguments)
    except (KeyboardInterrupt, typer.Abort) as error:
        return stopped(error)
    except (BrokenPipeError, SystemExit):  # typer and rich exit where a pipe is broken
        return broken()
    except Exception as error:  # the one place that turns errors into words
        if os.environ.get("ADAPTLIB_DEBUG"):
            raise
        return _failure(error, arguments)


def _usage(error: "typer.TyperException", arguments: list[str]) -> int:
    from .usage import wrong

    _say(2, *wrong(error), arguments)
    return 2


def _failure(error: Exception, arguments: list[str]) -> int:
    from adaptlib.errors import AdaptlibError
    from library_store import (
        AmbiguousDigest,
        GcAborted,
        InvalidName,
        ObjectCorrupt,
        ObjectNotFound,
        RefConflict,
        RefCorrupt,
        RefNotFound,
        StoreError,
        StoreExists,
        StoreLocked,
        UnknownFormat,
    )

    hint = getattr(error, "hint", None)
    if isinstance(error, AdaptlibError):
        code = error.exit_code
    elif isinstance(error, StoreError):
        by_type = {
            AmbiguousDigest: 2,
            InvalidName: 2,
            ObjectNotFound: 4,  # a ref or manifest names it, so the library is damaged
            RefNotFound: 3,
            ObjectCorrupt: 4,
            RefCorrupt: 4,
            UnknownFormat: 4,
            RefConflict: 5,
            StoreExists: 5,
            StoreLocked: 5,
        }
        code = by_type.get(type(error), 1)
        found_damage = isinstance(error, GcAborted) and isinstance(
            error.__cause__, AdaptlibError | StoreError
        )
        code = 4 if found_damage else code
        if code == 4 and not isinstance(error, UnknownFormat):
            hint = "adaptlib verify --repair"
    elif isinstance(error, OSError):
        code, hint = 1, hint or "the library is as it was; adaptlib doctor looks at disk and rights"
    else:
        code, hint = 1, "this is a bug in adaptlib; ADAPTLIB_DEBUG=1 shows where"
    _say(code, str(error) or type(error).__name__, hint, arguments)
    return code


def _say(code: int, message: str, hint: str | None, arguments: list[str]) -> None:
    from . import out

    if "--json" in arguments:
        import msgspec

        said = [text and out.plain(text) for text in (message, hint)]
        body = {"code": code, "message": said[0], "hint": said[1]}
        text = msgspec.json.encode({"schema": "adaptlib.error/1", "error": body}).decode()
    else:
        text = f"Error: {message}" + (f"\n  Next: {hint}" if hint else "")
        text = out.plain(text)
    sys.stderr.write(text + "\n")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    """adaptlib's own warnings as a sentence; other libraries' only for those who debug."""
    from adaptlib.errors import AdaptlibWarning

    from . import out

    if issubclass(category, AdaptlibWarning):
        out.note(f"Warning: {message}")
    elif os.environ.get("ADAPTLIB_DEBUG"):
        sys.stderr.write(f"{filename}:{lineno}: {category.__name__}: {message}\n")
