"""adaptlib tag: one more name for an expert."""

from typing import Annotated

import typer

from . import out
from .options import JsonOption, LibraryOption, QuietOption

EXAMPLES = ("adaptlib tag sql sql:v1", "adaptlib tag sql sql:best --replace")


def tag(
    name: Annotated[str, typer.Argument(help="A name, name:tag or digest.")],
    new: Annotated[str, typer.Argument(help="The name or name:tag to add.")],
    replace: Annotated[bool, typer.Option("--replace", help="Move a tag that is taken.")] = False,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Give an expert one more name or tag."""
    from adaptlib.experts.library import Library

    digest = Library.open(library).tag(name, new, replace=replace)
    if json:
        out.document("tag", name=name, new=new, digest=digest)
    elif not quiet:
        out.line(f"Tagged  {new}  {out.short(digest)}")
