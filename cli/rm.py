"""adaptlib rm: forget a name."""

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from . import out
from .options import JsonOption, LibraryOption, QuietOption

if TYPE_CHECKING:
    from library_store import Digest

EXAMPLES = ("adaptlib rm sql", "adaptlib rm sql:v1", "adaptlib rm sql poems --dry-run")


def rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names, or name:tag.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Remove names. The experts stay until gc, so this can be undone.

    Says how much gc could take then: what no other name, pin, clustering or router needs.
    """
    from adaptlib.errors import CorruptError
    from adaptlib.experts.library import Library
    from adaptlib.experts.names import RECORDS, Move, move_refs, record_ref
    from adaptlib.experts.records import load_record
    from library_store import Ref

    opened = Library.open(library)
    names = list(dict.fromkeys(names))
    names = [name for name in names if ":" not in name or name.split(":")[0] not in names]
    saved = {name: name.split("/", 1) for name in names if name.split("/")[0] in RECORDS}
    going: dict[str, dict[Ref, Digest]] = {}
    for name in names:  # all of them are there, or nothing is removed
        if name in saved:
            with suppress(CorruptError):  # what is damaged can be removed, too
                load_record(opened.store, *saved[name])
            ref = record_ref(*saved[name])
            going[name] = {ref: opened.store.ref(ref)}
        else:
            going[name] = opened.removable(name)
    frees = opened.freed_by([ref for refs in going.values() for ref in refs])
    if not dry_run:
        moves = [Move(ref, old, None, "rm") for refs in going.values() for ref, old in refs.items()]
        move_refs(opened.store, moves)
    removed = [
        {"name": name, "digest": str(refs.get(Ref.parse(name)) or next(iter(refs.values())))}
        for name, refs in going.items()
    ]
    if json:
        out.document("rm", removed=removed, frees=frees, dry_run=dry_run)
        return
    for entry in removed:
        if quiet:
            out.line(entry["name"])
            continue
        verb = "Would remove" if dry_run else "Removed"
        out.line(f"{verb}  {entry['name']}  {out.short(entry['digest'])}")
        if entry["name"] not in saved and not dry_run:
            out.note(f"  Undo: adaptlib tag {out.short(entry['digest'])} {entry['name']}")
    if not quiet:
        out.note(
            f"  gc frees {out.size(frees)} of it after 14 days (now: adaptlib gc --grace 0 "
            "--history 0)"
            if frees
            else "  gc frees nothing of it: other names, pins or saved results need it"
        )
