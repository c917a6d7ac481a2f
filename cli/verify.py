"""adaptlib verify: is everything still what it was, and what to do where it is not."""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import out
from .options import JsonOption, LibraryOption, PlainOption, QuietOption, check_formats

if TYPE_CHECKING:
    from library_store import Problem

EXAMPLES = ("adaptlib verify", "adaptlib verify --quick", "adaptlib verify --repair")


def verify(
    deep: Annotated[
        bool, typer.Option("--deep", help="Also parse every expert and look for NaN.")
    ] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Hash manifests alone; of weights, look at their size."),
    ] = False,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Move what is damaged to quarantine/; put intact copies back."
        ),
    ] = False,
    plain: PlainOption = False,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Re-hash every object and follow every name. Exit code 4 on any problem.

    Each problem comes with the experts that it spoils and the command to type next. With --repair,
    exit code 4 only where something is left to be done; nothing is ever deleted.
    """
    from adaptlib.errors import UsageError
    from adaptlib.experts.library import Library

    if quick and (deep or repair):
        other = "--deep" if deep else "--repair"
        raise UsageError(f"--quick does not read weights; {other} has to", hint="leave one out")
    check_formats(json=json, plain=plain)
    opened = Library.open(library)
    moved: list[str] = []
    back: list[str] = []
    mended: list[str] = []
    if repair:
        done = opened.repair(deep=deep)
        report, mended = done.report, list(done.mended)
        moved, back = [str(d) for d in done.quarantined], [str(d) for d in done.repaired]
    else:
        report = opened.verify(deep=deep, quick=quick)
    problems = [_shown(problem, library) for problem in report.problems]
    if json:
        lists = {"quarantined": moved, "repaired": back, "mended": mended}
        out.document("verify", checked=report.checked, problems=problems, **lists)
    elif plain:
        columns = ("kind", "digest", "experts", "detail", "hint")
        rows = [one | {"experts": ",".join(one["experts"])} for one in problems]
        out.plain_table(columns, [[row[key] for key in columns] for row in rows])
    else:
        for digest in moved:
            out.line(f"Moved to quarantine/  {out.short(digest)}")
        for digest in back:
            out.line(f"Put back  {out.short(digest)}, of which the trash had an intact copy")
        for said in mended:
            out.line(f"Mended  {said}")
        _print(problems)
        if not quiet:
            checked = out.count(report.checked, "object")
            left = " left" if repair else ""
            out.line(f"{checked} checked, {out.count(len(problems), 'problem')}{left}")
    if problems:
        raise typer.Exit(4)


def _shown(problem: "Problem", library: Path | None) -> dict[str, Any]:
    hint = problem.hint
    if library is not None:  # what is typed next must be about the same library
        hint = re.sub(r"adaptlib ([a-z]+)", rf"adaptlib \1 -L {_escaped(library)}", hint)
    return {
        "kind": problem.kind,
        "digest": str(problem.digest) if problem.digest else None,
        "experts": [str(ref) for ref in problem.refs],
        "detail": problem.detail,
        "hint": hint,
    }


def _escaped(path: Path) -> str:
    return shlex.quote(str(path)).replace("\\", r"\\")


def _print(problems: list[dict[str, Any]]) -> None:
    for problem in problems:
        digest = out.short(problem["digest"]) if problem["digest"] else ""
        out.line(f"{problem['kind']}  {digest}  {problem['detail']}")
        if problem["experts"]:
            out.line(f"  used by: {', '.join(problem['experts'])}")
        out.line(f"  Next: {problem['hint']}")
