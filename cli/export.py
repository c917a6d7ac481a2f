"""adaptlib export: an expert as a directory that others load."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import out
from .options import JsonOption, LibraryOption, QuietOption
from .suggest import check_choice

if TYPE_CHECKING:
    from adaptlib.experts.library import Library

EXAMPLES = (
    "adaptlib export sql ./sql-lora",
    "adaptlib export sql ./sql --format adaptlib",
    "adaptlib export sql ./sql-model --merged-base",
)
DTYPES = ("bfloat16", "float16", "float32")


def export(
    name: Annotated[str, typer.Argument(help="A name, name:tag or digest.")],
    directory: Annotated[Path, typer.Argument(help="A directory that is new or empty.")],
    format: Annotated[  # noqa: A002
        Literal["peft", "adaptlib"], typer.Option(help="Whose layout to write.")
    ] = "peft",
    merged_base: Annotated[
        bool,
        typer.Option(
            "--merged-base", help="Write the base model with the expert in its weights, whole."
        ),
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="The base model, where it is not where the card says.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of a whole model's weights; what route computes in if not said."),
    ] = None,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write an expert where PEFT (or adaptlib) loads it from, or as a whole model."""
    from adaptlib.errors import ConflictError, UsageError
    from adaptlib.experts.library import Library

    check_choice("--dtype", dtype, DTYPES)
    if not merged_base and (model is not None or dtype is not None):
        option = "--model" if model is not None else "--dtype"
        raise UsageError(f"{option} is for whole models", hint=f"{option} ... --merged-base")
    opened = Library.open(library)
    packed = opened.packed(name)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConflictError(
            f"{directory} is there and not empty", hint="give a directory that is new or empty"
        )
    if merged_base:
        notes = _whole(opened, name, directory, model, dtype)
        written = "model"
    elif format == "peft":
        from adaptlib.experts.peft import write_peft

        notes, written = write_peft(packed, directory), "peft"
    else:
        from adaptlib.experts.codec import write_directory

        write_directory(packed, directory)
        notes, written = [], "adaptlib"
    if json:
        path = str(directory.resolve())
        out.document("export", name=name, path=path, format=written, notes=notes)
        return
    for text in notes:
        out.note(f"Note: {text}")
    if not quiet:
        out.line(f"Wrote  {directory}  ({written})")
        if written == "peft":
            out.note(f'  Next: PeftModel.from_pretrained(model, "{directory}")')
        elif written == "model":
            out.note(f'  Next: AutoModelForCausalLM.from_pretrained("{directory}")')


def _whole(
    opened: "Library", name: str, directory: Path, model: str | None, dtype: str | None
) -> list[str]:
    """Write the base model with the expert in it; notes for the reader."""
    from .selection import one_base

    base_id, revision = one_base(opened, [name])

    import torch

    from adaptlib.experts import base as bases
    from adaptlib.merging.bake import write_model

    base, tokenizer = bases.load(model or base_id, revision=None if model else revision)
    digest = opened.digest(name)
    about: dict[str, Any] = {"digest": digest}
    write_model(
        base,
        tokenizer,
        opened.stream(digest),
        directory,
        name=name,
        about=about,
        dtype=None if dtype is None else getattr(torch, dtype),
    )
    said = str(base.dtype).removeprefix("torch.")
    return [f"its weights are {said}; the licence of {base_id} holds for them"]
