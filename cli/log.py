"""adaptlib log: the history of a name."""

from typing import Annotated

import typer

from . import out
from .options import JsonOption, LibraryOption, PlainOption, QuietOption, check_formats

EXAMPLES = ("adaptlib log sql", "adaptlib log sql --plain")


def log(
    name: Annotated[str, typer.Argument(help="A name, there or removed.")],
    plain: PlainOption = False,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show who moved a name, when, from what to what. Newest first."""
    from adaptlib.experts.library import Library

    check_formats(json=json, plain=plain)
    opened = Library.open(library)
    entries = opened.log(name)[::-1]
    if not entries:
        opened.digest(name)  # raises, with the nearest names
    if json:
        out.document(
            "log",
            name=name,
            entries=[
                {
                    "ref": str(entry.ref),
                    "when": entry.when,
                    "old": str(entry.old) if entry.old else None,
                    "new": str(entry.new) if entry.new else None,
                    "reason": entry.reason,
                }
                for entry in entries
            ],
        )
    elif plain:
        out.plain_table(
            ("when", "ref", "old", "new", "reason"),
            [(one.when, one.ref, one.old, one.new, one.reason) for one in entries],
        )
    elif quiet:
        for entry in entries:
            out.line(str(entry.new or ""))
    else:
        out.table(
            [("WHEN", "left"), ("REF", "left"), ("FROM", "left"), ("TO", "left"), ("WHY", "fold")],
            [
                [
                    entry.when[:19],
                    str(entry.ref),
                    entry.old.short if entry.old else "-",
                    entry.new.short if entry.new else "-",
                    entry.reason,
                ]
                for entry in entries
            ],
        )
