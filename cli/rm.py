"""adaptlib rm: forget a name."""

from typing import Annotated

import typer

from . import out
from .options import JsonOption, LibraryOption, QuietOption

EXAMPLES = ("adaptlib rm sql", "adaptlib rm sql:v1")


def rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names, or name:tag.")],
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Remove names. The experts stay until gc, so this can be undone."""
    from adaptlib.experts.library import Library

    opened = Library.open(library)
    names = list(dict.fromkeys(names))
    names = [name for name in names if ":" not in name or name.split(":")[0] not in names]
    for name in names:
        opened.removable(name)  # all of them are there, or nothing is removed
    removed = [{"name": name, "digest": opened.remove(name)} for name in names]
    if json:
        out.document("rm", removed=removed)
    elif not quiet:
        for entry in removed:
            out.line(f"Removed  {entry['name']}  {out.short(entry['digest'])}")
            out.note(f"  Undo: adaptlib tag {out.short(entry['digest'])} {entry['name']}")
