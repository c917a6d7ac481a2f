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
    from adaptlib.experts.names import RECORDS
    from adaptlib.experts.records import load_record, remove_record

    opened = Library.open(library)
    names = list(dict.fromkeys(names))
    names = [name for name in names if ":" not in name or name.split(":")[0] not in names]
    saved = {name: name.split("/", 1) for name in names if name.split("/")[0] in RECORDS}
    for name in names:  # all of them are there, or nothing is removed
        if name in saved:
            load_record(opened.store, *saved[name])
        else:
            opened.removable(name)
    digests = {
        name: remove_record(opened.store, *saved[name]) if name in saved else opened.remove(name)
        for name in names
    }
    removed = [{"name": name, "digest": digest} for name, digest in digests.items()]
    if json:
        out.document("rm", removed=removed)
    elif not quiet:
        for entry in removed:
            out.line(f"Removed  {entry['name']}  {out.short(entry['digest'])}")
            if entry["name"] not in saved:
                out.note(f"  Undo: adaptlib tag {out.short(entry['digest'])} {entry['name']}")
