"""adaptlib export: an expert as a directory that others load."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from . import out
from .options import JsonOption, LibraryOption, QuietOption

EXAMPLES = ("adaptlib export sql ./sql-lora", "adaptlib export sql ./sql --format adaptlib")


def export(
    name: Annotated[str, typer.Argument(help="A name, name:tag or digest.")],
    directory: Annotated[Path, typer.Argument(help="A directory that is new or empty.")],
    format: Annotated[  # noqa: A002
        Literal["peft", "adaptlib"], typer.Option(help="Whose layout to write.")
    ] = "peft",
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write an expert where PEFT (or adaptlib) loads it from."""
    from adaptlib.errors import ConflictError
    from adaptlib.experts.library import Library

    packed = Library.open(library).packed(name)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConflictError(
            f"{directory} is there and not empty", hint="give a directory that is new or empty"
        )
    if format == "peft":
        from adaptlib.experts.peft import write_peft

        notes = write_peft(packed, directory)
    else:
        from adaptlib.experts.codec import write_directory

        write_directory(packed, directory)
        notes = []
    if json:
        out.document("export", name=name, path=str(directory.resolve()), format=format, notes=notes)
        return
    for text in notes:
        out.note(f"Note: {text}")
    if not quiet:
        out.line(f"Wrote  {directory}  ({format})")
        if format == "peft":
            out.note(f'  Next: PeftModel.from_pretrained(model, "{directory}")')
