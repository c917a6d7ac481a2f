"""adaptlib mv: another name."""

from typing import Annotated

import typer

from . import out
from .options import JsonOption, LibraryOption, QuietOption

EXAMPLES = ("adaptlib mv sql text-to-sql", "adaptlib mv sql:v1 sql:old")


def mv(
    old: Annotated[str, typer.Argument(help="Its name.")],
    new: Annotated[str, typer.Argument(help="Its new name.")],
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Rename an expert; its digest stays."""
    from adaptlib.experts.library import Library

    digest = Library.open(library).rename(old, new)
    if json:
        out.document("mv", old=old, new=new, digest=digest)
    elif not quiet:
        out.line(f"Renamed  {old} -> {new}  {out.short(digest)}")
