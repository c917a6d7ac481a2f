"""adaptlib init: a new library."""

from pathlib import Path
from typing import Annotated

import typer

from . import out
from .options import JsonOption, LibraryOption, QuietOption

EXAMPLES = ("adaptlib init", "adaptlib init ~/experts", "adaptlib init --demo")


def init(
    path: Annotated[
        Path | None, typer.Argument(help="Where; .adaptlib/ here if not said.", show_default=False)
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Fill it with the bundled experts.")] = False,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a new library, or say that one is there."""
    import os

    from adaptlib.experts import Library
    from adaptlib.experts.location import DIRECTORY, VARIABLE

    where = path or library or Path(os.environ.get(VARIABLE) or Path.cwd() / DIRECTORY)
    where = Path(os.path.expanduser(where))  # noqa: PTH111 -- which raises on `~nobody`
    existed = (where / "FORMAT").is_file()
    opened = Library.open(where, create=True)
    added = []
    if demo:
        from adaptlib.demo import expert_directories

        added = [opened.add(directory) for directory in expert_directories()]
    if json:
        out.document("init", path=str(where.resolve()), experts=len(opened), new=not existed)
    elif quiet:
        out.line(str(where))
    else:
        out.line(f"{'Library' if existed else 'New library'} at {where}")
        if demo:
            new = sum(entry.new for entry in added)
            out.line(f"{new} of {len(added)} bundled experts added; it holds {len(opened)}")
            out.note("  Next: adaptlib list, adaptlib cluster, adaptlib route --prompt ...")
        else:
            out.note("  Next: adaptlib add SOURCE")
