"""adaptlib bench: the comparisons of the papers, on this machine."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import out
from .options import JsonOption, LibraryOption, QuietOption, words
from .suggest import closest, unknown

EXAMPLES = (
    "adaptlib bench papers --data tasks/ --out bench",
    "adaptlib bench papers --data tasks/ --out bench --only arrow,uniform,mhr --seeds 1",
)


def bench(
    what: Annotated[str, typer.Argument(metavar="papers", help="Which comparisons: papers.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="The folder with a file a task.")],
    folder: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where everything is kept, to go on from.")
    ] = Path("bench"),
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.md", help="Write the table and the claims there, as Markdown."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only these methods: a,b or repeated.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Each method so often.")] = 3,
    workers: Annotated[
        int | None, typer.Option(help="Processes side by side; one a core if not said.")
    ] = None,
    base: Annotated[
        str, typer.Option(metavar="ID|DIR", help="The base model.")
    ] = "adaptlib/demo-base",
    rows: Annotated[int, typer.Option(help="Training rows a task.")] = 150,
    epochs: Annotated[int, typer.Option(help="Times each is seen.")] = 2,
    score_rows: Annotated[int, typer.Option(help="Test rows a task.")] = 50,
    shots: Annotated[int, typer.Option(help="Rows of a new task.")] = 32,
    shot_epochs: Annotated[int, typer.Option(help="Times each of these is seen.")] = 10,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train, route, merge and adapt by every method of the papers, with one budget for all.

    It takes about an hour and a half of two cores, and goes on where it was when the same command
    is given again. Experts and routers are kept in DIR/library, or in --library. What is compared
    is in the report; docs/results.md is one.
    """
    from adaptlib.errors import UsageError
    from adaptlib.papers.units import FEW_SHOT, HELD_IN, HELD_OUT, SYSTEMS, Budget

    if what != "papers":
        raise UsageError(f"bench knows papers; got {what!r}", hint="adaptlib bench papers")
    chosen = tuple(words(only))
    known = dict.fromkeys((*SYSTEMS, *FEW_SHOT))
    if strange := [name for name in chosen if name not in known]:
        meant = closest(strange[0], known) or "arrow,uniform"
        raise UsageError(unknown("method", strange[0], known), hint=f"--only {meant}")
    if min(rows, epochs, score_rows, shots, shot_epochs) < 1:
        raise UsageError("rows, epochs and shots are 1 or more", hint="leave them out")
    if report is not None and not report.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {report.parent}", hint="make it, or another --report")

    from adaptlib.papers.run import bench as run_all
    from adaptlib.papers.table import summary
    from adaptlib.training.space import cores

    def say(text: str) -> None:
        if not (quiet or json):
            out.note(text)

    found = run_all(
        folder,
        data,
        library=library,
        base=base,
        held_in=HELD_IN,
        held_out=HELD_OUT,
        seeds=seeds,
        workers=workers or cores(),
        budget=Budget(rows, epochs, score_rows, shots, shot_epochs),
        only=chosen,
        say=say,
    )
    made = summary(found)
    if report is not None:
        from adaptlib.papers.report import write

        write(report, made, Budget(rows, epochs, score_rows, shots, shot_epochs))
        say(f"Wrote {report}")
    if json:
        out.document("bench", **made)
    elif quiet:
        return
    else:
        _print(made)


def _print(made: dict[str, Any]) -> None:
    def cells(row: dict[str, Any]) -> list[str]:
        given = [row["held_in"], row["held_out"], row["agreement"], row["used"]]
        return [row["method"], *("" if v is None else f"{v:.3f}" for v in given)]

    columns = [("Method", "left"), ("Held in", "right"), ("Held out", "right")]
    columns += [("Own first", "right"), ("Experts used", "right")]
    out.table(columns, map(cells, made["methods"]))
