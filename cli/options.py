"""The options that every command has."""

from pathlib import Path
from typing import Annotated

import typer

LibraryOption = Annotated[
    Path | None,
    typer.Option(
        "--library",
        "-L",
        metavar="PATH",
        help="The library; else ADAPTLIB_LIBRARY, the nearest .adaptlib/ upwards, or your own.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document, never prompt.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print names or nothing.")]
PlainOption = Annotated[
    bool,
    typer.Option("--plain", help="Tab-separated values with one header line, for programs."),
]


def check_formats(*, json: bool, plain: bool) -> None:
    """UsageError where two forms of output are asked for."""
    if json and plain:
        from adaptlib.errors import UsageError

        raise UsageError("--json and --plain are two forms of output", hint="choose one of them")


def words(values: list[str] | None) -> list[str]:
    """Options that take several: `a,b`, `a, b` and repetition are all the same."""
    return [word for value in values or [] for word in value.replace(",", " ").split()]
