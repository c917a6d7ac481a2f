"""adaptlib schema: what --json prints, as JSON Schemas."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from . import out
from .options import JsonOption, LibraryOption, QuietOption

EXAMPLES = (
    "adaptlib schema",
    "adaptlib schema list",
    "adaptlib schema -q",
)
FOLDER = Path(__file__).with_name("schemas")


def schema(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Of the document, such as list, or adaptlib.list/1; all if not said.",
            show_default=False,
        ),
    ] = None,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List the documents that --json prints, or print the JSON Schema of one (draft 2020-12).

    A document's key `schema` names it: `adaptlib.list/1` is what `adaptlib list --json` prints, and
    `adaptlib.error/1` what any command writes on stderr where it fails.
    """
    import json as json_module

    files = {file.stem: file for file in sorted(FOLDER.glob("*.json"))}
    if name is not None:
        sys.stdout.write(_file(name, files).read_text(encoding="utf-8"))
        return
    if quiet:
        for known in files:
            out.line(known)
        return
    found = {known: json_module.loads(file.read_bytes()) for known, file in files.items()}
    if json:
        rows = [{"name": n, "description": body["description"]} for n, body in found.items()]
        out.document("schema", schemas=rows)
        return
    out.table(
        [("NAME", "left"), ("WHAT", "fold")],
        [[known, body["description"]] for known, body in found.items()],
    )


def _file(name: str, files: dict[str, Path]) -> Path:
    from adaptlib.errors import NotFoundError

    from .suggest import near

    known = name.removeprefix("adaptlib.").removesuffix("/1")
    if known in files:
        return files[known]
    raise NotFoundError(
        f"no schema {name!r}{near(known, files)}; there are: {', '.join(files)}",
        hint="what each is: adaptlib schema",
    )
