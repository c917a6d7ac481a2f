"""adaptlib gc: give space back."""

import re
from datetime import timedelta
from typing import Annotated

import typer

from . import out
from .options import JsonOption, LibraryOption, QuietOption

EXAMPLES = (
    "adaptlib gc --dry-run",
    "adaptlib gc --grace 7d",
    "adaptlib gc --grace 0 --history 0",
)


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    grace: Annotated[str, typer.Option(help="Keep what was put since: 90m, 24h, 7d, 0.")] = "24h",
    history: Annotated[
        str, typer.Option(help="Keep what had a name since; never less than the grace.")
    ] = "14d",
    restore: Annotated[
        str | None, typer.Option(metavar="ID", help="Put back what that gc removed.")
    ] = None,
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="Go on where the library has no name left.")
    ] = False,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Move what no name and no pin leads to into the trash, where it stays for 7 days.

    What had a name in the last 14 days, and what was put in the last 24 hours, stays as well.
    Nothing is removed where anything that says what is needed cannot be read.
    Checkpoints of training runs that nobody went on with for 7 days are deleted, prototypes and
    sketches of experts without a name.
    """
    from adaptlib.experts.derived import forget_runs
    from adaptlib.experts.library import Library
    from adaptlib.experts.segments import PROTOTYPES, forget_rows
    from adaptlib.experts.sketches import SKETCHES

    opened = Library.open(library)
    if restore is not None:
        count = opened.restore(restore)
        if json:
            out.document("gc", restored=count, removed=[], bytes=0)
        elif not quiet:
            out.line(f"Restored  {out.count(count, 'object')}")
        return
    # Before, so that nothing can fail once something was removed.
    alive = {*opened.tags().values(), *opened.pins().values()}
    result = opened.gc(
        grace=_duration("--grace", grace),
        history=_duration("--history", history),
        dry_run=dry_run,
        allow_empty=allow_empty,
    )
    removed = [str(digest) for digest in result.removed]
    runs = run_bytes = rows = row_bytes = sketched = sketch_bytes = 0
    if opened.path:
        runs, run_bytes = forget_runs(opened.path, dry_run=dry_run)
        rows, row_bytes = forget_rows(opened.path, alive, PROTOTYPES, dry_run=dry_run)
        sketched, sketch_bytes = forget_rows(opened.path, alive, SKETCHES, dry_run=dry_run)
    if json:
        out.document(
            "gc",
            id=result.id,
            removed=removed,
            bytes=result.bytes,
            training_runs=runs,
            prototypes=rows,
            sketches=sketched,
            dry_run=dry_run,
        )
    elif not quiet:
        verb = "Would remove" if dry_run else "Removed"
        out.line(f"{verb}  {out.count(len(removed), 'object')}, {out.size(result.bytes)}")
        if runs:
            what = out.count(runs, "unfinished training run")
            out.line(f"{verb}  {what}, {out.size(run_bytes)}")
        if rows:
            what = out.count(rows, "expert") + "' prototypes"
            out.line(f"{verb}  {what}, {out.size(row_bytes)}")
        if sketched:
            what = f"sketches of {out.count(sketched, 'expert')}"
            out.line(f"{verb}  {what}, {out.size(sketch_bytes)}")
        if removed and not dry_run:
            out.note(f"  Undo within 7 days: adaptlib gc --restore {result.id}")


def _duration(option: str, text: str) -> timedelta:
    from adaptlib.errors import UsageError

    match = re.fullmatch(r"(\d+)([mhd]?)", text.strip())
    if not match or (not match[2] and int(match[1])):
        raise UsageError(f"{option} wants 90m, 24h, 7d or 0; got {text!r}")
    unit = {"m": "minutes", "h": "hours", "d": "days", "": "days"}[match[2]]
    try:
        time = timedelta(**{unit: int(match[1])})
    except (OverflowError, ValueError):  # more days, or digits, than Python counts
        time = timedelta.max
    if time > timedelta(days=36500):
        raise UsageError(f"{option} is a hundred years at most; got {text[:20]!r}")
    return time
