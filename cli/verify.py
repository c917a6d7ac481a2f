"""adaptlib verify: is everything still what it was."""

from typing import Annotated

import typer

from . import out
from .options import JsonOption, LibraryOption, QuietOption

EXAMPLES = ("adaptlib verify", "adaptlib verify --deep --json")


def verify(
    deep: Annotated[
        bool, typer.Option("--deep", help="Also parse every expert and look for NaN.")
    ] = False,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Re-hash every object and follow every name. Exit code 4 on any problem."""
    from adaptlib.experts.library import Library

    report = Library.open(library).verify(deep=deep)
    problems = [
        {
            "kind": problem.kind,
            "digest": str(problem.digest) if problem.digest else None,
            "experts": [str(ref) for ref in problem.refs],
            "detail": problem.detail,
            "hint": problem.hint,
        }
        for problem in report.problems
    ]
    if json:
        out.document("verify", checked=report.checked, problems=problems)
    else:
        for problem in problems:
            digest = out.short(problem["digest"]) if problem["digest"] else ""
            out.line(f"{problem['kind']}  {digest}  {problem['detail']}")
            if problem["experts"]:
                out.line(f"  used by: {', '.join(problem['experts'])}")
            if problem["hint"]:
                out.line(f"  Next: {problem['hint']}")
        if not quiet:
            checked = out.count(report.checked, "object")
            out.line(f"{checked} checked, {out.count(len(problems), 'problem')}")
    if problems:
        raise typer.Exit(4)
