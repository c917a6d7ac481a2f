"""adaptlib add: keep an expert."""

from typing import Annotated

import typer

from . import out
from .options import JsonOption, LibraryOption, QuietOption

EXAMPLES = (
    "adaptlib add ./my-lora --name sql",
    "adaptlib add hf://org/repo@main --base ./llama",
    "adaptlib add runs/*/adapter",
)


def add(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="PEFT or adaptlib directories, hf://org/repo[@rev]."
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="Its name, or name:tag; else the directory's.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Its base model, where the source is wrong.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="What it was trained on.")] = None,
    description: Annotated[str | None, typer.Option(help="A sentence for its card.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Move a name that is taken.")] = False,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Keep experts, by content and under a name."""
    from adaptlib.errors import UsageError
    from adaptlib.experts import Library

    if name is not None and len(sources) > 1:
        raise UsageError(
            f"--name names one expert; {len(sources)} sources were given",
            hint="add them one by one, or leave --name out",
        )
    opened = Library.open(library)
    if len(sources) == 1:
        kept = [
            opened.add(
                sources[0], name, base=base, task=task, description=description, replace=replace
            )
        ]
    else:
        kept = opened.add_all(
            sources, base=base, task=task, description=description, replace=replace
        )
    entries = []
    for added in kept:
        manifest = added.manifest
        entries.append(
            {
                "name": added.name,
                "digest": added.digest,
                "kind": manifest.kind,
                "base": manifest.base,
                "rank": manifest.rank,
                "modules": len(manifest.modules),
                "params": manifest.params,
                "bytes": manifest.blob.size,
                "new": added.new,
                "notes": list(added.notes),
            }
        )
        if json:
            continue
        for text in added.notes:
            out.note(f"Note: {text}")
        if quiet:
            out.line(added.name)
            continue
        rank = f"rank {manifest.rank}" if manifest.rank else "sparse"
        verb = "Added" if added.new else "Already there"
        out.line(
            f"{verb}  {added.name}  {out.short(added.digest)}  "
            f"{out.size(manifest.blob.size)}  {rank}  {len(manifest.modules)} modules of "
            f"{manifest.base}"
        )
    if json:
        out.document("add", added=entries)
