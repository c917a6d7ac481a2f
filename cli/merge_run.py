"""What `merge` does once its words are read: the data, the merge itself, a replay."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import merge_view as view
from . import out
from .selection import one_base

if TYPE_CHECKING:
    from adaptlib.experts import Expert, Library
    from adaptlib.experts.recipe import Recipe, Rows
    from adaptlib.merging import Data
    from adaptlib.training import Task

ROWS = 64  # of a task


class Source(NamedTuple):
    """Where a merge with data finds it: task files, rows of each, and the base model."""

    data: Path | None
    rows: int | None
    model: str | None


def learns(recipe: "Recipe") -> bool:
    """Whether its method looks at data."""
    from adaptlib.merging.make import find_merge

    return find_merge(recipe.method).measure is not None


def made(opened: "Library", recipe: "Recipe", source: Source, *, quiet: bool) -> "Expert":
    """The expert of a recipe, with a line on the terminal while it is made."""
    import msgspec

    from adaptlib.errors import UsageError
    from adaptlib.merging.make import make

    found = None
    if learns(recipe):
        if source.data is None:
            raise UsageError(
                f"{recipe.method} is learnt from data: a folder with a task file for each "
                "expert, or the file of one new task",
                hint="--data DIR",
            )
        found, rows = _data(opened, recipe, source)
        recipe = msgspec.structs.replace(recipe, data=rows)
    return make(opened, recipe, data=found, progress=view.meter("Merging", quiet=quiet))


def _data(opened: "Library", recipe: "Recipe", source: Source) -> "tuple[Data, Rows]":
    """The model and the rows that a merge with data looks at, and what the recipe says of these.
    UsageError where the recipe knows of others."""
    from adaptlib.errors import UsageError
    from adaptlib.experts.recipe import Rows

    before = recipe.data
    count = source.rows or (before.rows if before else ROWS)
    assert source.data is not None
    files = _files(opened, recipe, source.data)

    from adaptlib.evaluation.merge_data import merge_data
    from adaptlib.experts import base as bases
    from adaptlib.training import read_task

    tasks = {name: read_task(path) for name, path in files.items()}
    rows = Rows(_digest(tasks, count), count)
    if before is not None and rows != before:
        raise UsageError(
            f"{source.data} holds other rows than it was merged with: {count} of "
            f"{out.short(rows.tasks)}, want {before.rows} of {out.short(before.tasks)}"
        )
    base, revision = one_base(opened, list(recipe.parents.values()))
    model, tokenizer = bases.load(source.model or base, revision=None if source.model else revision)
    return merge_data(model, tokenizer, tasks, rows=count), rows


def _files(opened: "Library", recipe: "Recipe", where: Path) -> dict[str, Path]:
    """The task file of each expert, called like its card's task or like itself; or the one file."""
    from adaptlib.errors import NotFoundError

    if where.is_file():
        return {where.stem: where}
    if not where.is_dir():
        raise NotFoundError(f"no folder or file {where} with tasks", hint="--data DIR")
    files = {path.stem: path for path in sorted(where.iterdir()) if path.is_file()}
    found: dict[str, Path] = {}
    for name, digest in recipe.parents.items():
        asked = [opened.manifest(digest).card.get("task"), name.partition(":")[0]]
        stem = next((str(one) for one in asked if one is not None and str(one) in files), None)
        if stem is None:
            raise NotFoundError(
                f"no file in {where} is called like the task of {name}",
                hint=f"{where}/{asked[0] or asked[1]}.jsonl",
            )
        found[name] = files[stem]
    return found


def _digest(tasks: "Mapping[str, Task]", count: int) -> str:
    """Of the rows that are looked at and what the model is told before each, whatever the form of
    the files and their other rows."""
    import msgspec

    from library_store import Digest

    said = [
        [name, task.instruction, [repr(row) for row in task.split("train")[:count]]]
        for name, task in tasks.items()
    ]
    return str(Digest.of(msgspec.json.encode(said)))


def again(
    opened: "Library",
    name: str,
    other: str | None,
    source: Source,
    save_recipe: Path | None,
    *,
    replace: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Make a merged expert again from the recipe in its card, and compare the digests. The same
    expert gets the name `other` too, where there is one; another is an error and is not kept. With
    `save_recipe`, the recipe is written there first."""
    from adaptlib.errors import AdaptlibError
    from adaptlib.experts.recipe import recipe_of, write_recipe

    manifest = opened.manifest(name)
    digest = opened.digest(name)
    recipe = recipe_of(name, manifest)
    notes = ["the same digest"]
    if save_recipe is not None:
        write_recipe(recipe, save_recipe)
        notes.append(f"wrote {save_recipe}: adaptlib merge --recipe {save_recipe}")

    from adaptlib.merging.make import difference, digest_of

    expert = made(opened, recipe, source, quiet=json or quiet)
    found = digest_of(expert, manifest)
    if found != digest:
        raise AdaptlibError(
            f"{name} is {out.short(digest)}; made again it is {out.short(found)}: "
            f"{difference(expert, opened.stream(digest))}",
            hint="another version of adaptlib or torch, or another processor, rounds differently; "
            f"adaptlib show {digest[7:19]} --json has the recipe",
        )
    if other is not None:
        opened.tag(digest, other, replace=replace)
    view.print_merged(
        "Made again",
        (other or name, digest, manifest),
        notes,
        json=json,
        quiet=quiet,
    )
