"""adaptlib pin and unpin: keep an expert whatever becomes of its names."""

from typing import Annotated

import typer

from . import out
from .options import JsonOption, LibraryOption, PlainOption, QuietOption, check_formats

EXAMPLES = {
    "pin": ("adaptlib pin sql", "adaptlib pin sql:v1 --label paper", "adaptlib pin"),
    "unpin": ("adaptlib unpin paper", "adaptlib unpin $(adaptlib pin -q)"),
}


def pin(
    name: Annotated[
        str | None,
        typer.Argument(help="A name, name:tag or digest; without one, list the pins."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="What to call the pin; else the digest's first 12 digits.")
    ] = None,
    plain: PlainOption = False,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Pin an expert: gc keeps it, though its names move on or are removed."""
    from adaptlib.errors import UsageError
    from adaptlib.experts.catalog import Catalog

    check_formats(json=json, plain=plain)
    if name is None:
        if label is not None:
            raise UsageError("--label names a pin; say what to pin", hint="adaptlib pin NAME")
        _list(Catalog.open(library).pins(), json=json, plain=plain, quiet=quiet)
        return
    from adaptlib.experts.library import Library

    opened = Library.open(library)
    known = set(opened.pins())
    made, digest = opened.pin(name, label)
    if json:
        entry = {"label": made, "digest": digest, "new": made not in known}
        out.document("pin", pins=[entry])
    elif plain:
        out.plain_table(("label", "digest"), [(made, digest)])
    elif quiet:
        out.line(made)
    else:
        verb = "Already pinned" if made in known else "Pinned"
        out.line(f"{verb}  {name}  {out.short(digest)}  as {made}")


def unpin(
    label: Annotated[str, typer.Argument(help="The pin's label, or the digest it holds.")],
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Take a pin away. The expert stays while a name leads to it."""
    from adaptlib.experts.library import Library

    digest = Library.open(library).unpin(label)
    if json:
        out.document("unpin", label=label, digest=digest)
    elif not quiet:
        out.line(f"Unpinned  {label}  {out.short(digest)}")


def _list(pins: dict[str, str], *, json: bool, plain: bool, quiet: bool) -> None:
    if json:
        entries = [{"label": one, "digest": digest, "new": False} for one, digest in pins.items()]
        out.document("pin", pins=entries)
    elif plain:
        out.plain_table(("label", "digest"), pins.items())
    elif quiet:
        for one in pins:
            out.line(one)
    elif pins:
        rows = [[one, out.short(digest)] for one, digest in pins.items()]
        out.table([("LABEL", "left"), ("DIGEST", "left")], rows)
    else:
        out.note("Nothing is pinned.\n  Next: adaptlib pin NAME")
