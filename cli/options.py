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


def words(values: list[str] | None) -> list[str]:
    """Options that take several: `a,b`, `a, b` and repetition are all the same."""
    return [word for value in values or [] for word in value.replace(",", " ").split()]
