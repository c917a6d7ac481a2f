"""adaptlib merge: several experts in, one expert out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import merge_view as view
from . import merge_words as spoken
from . import out
from .merge_run import Source, again, learns, made
from .options import JsonOption, LibraryOption, QuietOption, words
from .selection import CLUSTER, expand, one_base

if TYPE_CHECKING:
    from adaptlib.experts import Library
    from adaptlib.experts.recipe import Recipe

EXAMPLES = (
    "adaptlib merge sql poems --name both",
    "adaptlib merge sql poems --method cat --weight sql=0.7 --name both --dry-run",
    "adaptlib merge cluster:tasks/3 --method ties --set density=0.2 --rank 16 --name group",
    "adaptlib merge --recipe merge.yaml",
    "adaptlib merge --replay both",
    "adaptlib merge --methods",
)


def merge(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Names, digests or cluster:NAME/LABEL.", show_default=False),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="One of --methods; linear (the mean) if not said.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Its name, or name:tag; else made of theirs.")
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=W", help="An expert's weight; repeatable, may be negative."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Keep it as LoRA of this rank.")] = None,
    kind: Annotated[
        Literal["lora", "sparse"] | None,
        typer.Option(help="Keep it as; else as the experts are."),
    ] = None,
    keep_ratio: Annotated[
        float | None, typer.Option(help="Keep it as sparse, with this share of the entries.")
    ] = None,
    on: Annotated[
        Literal["updates", "factors"] | None,
        typer.Option(help="Merge ΔW, or A and B apart as PEFT does; updates if not said."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the method; repeatable."),
    ] = None,
    description: Annotated[str | None, typer.Option(help="For its card.")] = None,
    only_base: Annotated[
        str | None, typer.Option("--base", metavar="ID", help="Only experts of this base model.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A task file for each expert, or one: to learn from."),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="Rows of each task that are seen; 64 if not said.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base model for --data, if not where cards say.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="Take all from a file; options here go before it."),
    ] = None,
    save_recipe: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Write the recipe, experts by digest.")
    ] = None,
    replay: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Make a merged expert again and compare the digests."),
    ] = None,
    methods: Annotated[
        bool, typer.Option("--methods", help="List the methods and their options.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Move a name that is taken.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say size, memory and error; keep nothing.")
    ] = False,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Merge experts into one, and keep it in the library with its recipe.

    The experts stay as they are, as long as a name leads to them; gc takes the others, and then
    --replay says which one is gone.
    """
    if methods:
        _methods(json=json, quiet=quiet)
        return
    import msgspec

    from adaptlib.experts import Library
    from adaptlib.experts.names import expert_ref
    from adaptlib.experts.recipe import pin, recipe_of, write_recipe

    chosen = {
        "method": method,
        "name": name,
        "weights": spoken.weights(weight),
        "options": spoken.settings(set_),
        "rank": rank,
        "kind": kind,
        "keep_ratio": keep_ratio,
        "on": on,
        "description": description,
    }
    given = {key: value for key, value in chosen.items() if value is not None}
    spoken.check_rows(rows)
    seen = Source(data, rows, model)
    if name is not None:
        expert_ref(name)
    if save_recipe is not None:
        spoken.check_folder(save_recipe)
    if replay is not None:
        also = {"names": names, "recipe": recipe, "base": only_base, "dry_run": dry_run}
        spoken.check_alone(
            replay, [*({*given} - {"name"}), *(key for key, said in also.items() if said)]
        )
        opened = Library.open(library)
        again(opened, replay, name, seen, save_recipe, replace=replace, json=json, quiet=quiet)
        return
    asked = spoken.recipe(words(names), given, recipe)
    opened = Library.open(library)
    whole = pin(opened, _expanded(opened, asked), base=only_base)
    _check_manifests(opened, whole)
    target = whole.name or _name_for(asked)
    expert_ref(target)

    from adaptlib.merging.make import checked

    whole = checked(whole)
    notes = _notes(opened, whole)
    if dry_run:
        if save_recipe is not None:
            write_recipe(whole, save_recipe)
            notes.append(f"wrote {save_recipe}: adaptlib merge --recipe {save_recipe}")
        _preview(opened, whole, target, notes, json=json, quiet=quiet)
        return
    if not replace:
        _check_free(opened, whole, target)
    if data is not None and not learns(whole):
        notes.append(f"{whole.method} is not learnt from data; --data is not used")
    expert = made(opened, whole, seen, quiet=json or quiet)
    added = opened.add(expert, target, replace=replace)
    notes += added.notes
    if save_recipe is not None:
        done = recipe_of(added.name, added.manifest)
        write_recipe(msgspec.structs.replace(done, name=added.name), save_recipe)
        notes.append(f"wrote {save_recipe}: adaptlib merge --recipe {save_recipe}")
    verb = "Merged" if added.new else "Already there"
    kept = (added.name, added.digest, added.manifest)
    view.print_merged(verb, kept, notes, json=json, quiet=quiet)


def _methods(*, json: bool, quiet: bool) -> None:
    from adaptlib.merging import MERGES

    rows = view.methods(MERGES)
    if json:
        out.document("merge-methods", methods=rows)
    elif quiet:
        for row in rows:
            out.line(row["name"])
    else:
        view.print_methods(rows)


def _expanded(opened: "Library", recipe: "Recipe") -> "Recipe":
    """The recipe with the members of a cluster in its place."""
    import msgspec

    members: list[Any] = []
    for one in recipe.experts:
        members += expand(opened, [one]) if isinstance(one, str) else [one]
    return msgspec.structs.replace(recipe, experts=tuple(members))


def _check_manifests(opened: "Library", recipe: "Recipe") -> None:
    """What can be refused before any tensor is looked at: several base models, a rank that no
    module can hold."""
    from adaptlib.errors import UsageError

    held = {
        name if name in opened and opened.digest(name) == digest else digest: digest
        for name, digest in recipe.parents.items()
    }
    one_base(opened, list(held))
    sparse = recipe.keep_ratio is not None or recipe.kind == "sparse"
    if recipe.rank is not None and sparse:
        raise UsageError(
            "a rank is of a LoRA, a keep ratio of a sparse result", hint="--rank or --keep-ratio"
        )
    most = max(
        min(module.shape)
        for digest in held.values()
        for module in opened.manifest(digest).modules.values()
    )
    if recipe.rank is not None and recipe.rank > most:
        raise UsageError(
            f"--rank {recipe.rank} is above what any module can hold, {most}", hint=f"--rank {most}"
        )


def _name_for(recipe: "Recipe") -> str:
    """A name for who gives none: of the experts, or of their number."""
    from adaptlib.experts.recipe import Parent
    from adaptlib.experts.sources import slug

    said = [one.name if isinstance(one, Parent) else one for one in recipe.experts]
    said = [one.removeprefix(CLUSTER) for one in said]
    what = "-".join(said) if len(said) <= 3 else f"{len(said)}-experts"
    return slug(f"{what}-{recipe.method}".replace("/", "-").replace(":", "-"))


def _check_free(opened: "Library", recipe: "Recipe", target: str) -> None:
    """ConflictError, before anything is merged, where the name is another expert's."""
    from adaptlib.errors import AdaptlibError, ConflictError
    from adaptlib.experts.recipe import recipe_of

    if target not in opened.tags() and f"{target}:latest" not in opened.tags():
        return
    try:
        before = recipe_of(target, opened.manifest(target))
    except AdaptlibError:
        before = None
    if before is None or (before.experts, before.method) != (recipe.experts, recipe.method):
        raise ConflictError(
            f"the name {target} is taken by another expert, {out.short(opened.digest(target))}",
            hint="--replace, or --name OTHER",
        )


def _notes(opened: "Library", recipe: "Recipe") -> list[str]:
    """What is allowed and may not be meant."""
    parents = recipe.parents
    notes: list[str] = []
    if len(parents) == 1:
        notes.append("one expert is merged with nothing: this is it, weighted and kept anew")
    by_digest: dict[str, list[str]] = {}
    for name, digest in parents.items():
        by_digest.setdefault(digest, []).append(name)
    notes += [
        f"{' and '.join(names)} are one expert, which so counts {len(names)} times"
        for names in by_digest.values()
        if len(names) > 1
    ]
    modules = [set(opened.manifest(digest).modules) for digest in by_digest]
    if len(modules) > 1 and not set.intersection(*modules):
        notes.append("no module is adapted by all of them; who lacks one counts as zero there")
    given = recipe.weights or {}
    if given.keys() >= parents.keys() and not any(given.values()):
        notes.append("all weights are zero, so nothing of any of them is left")
    return notes


def _preview(
    opened: "Library",
    recipe: "Recipe",
    target: str,
    notes: list[str],
    *,
    json: bool,
    quiet: bool,
) -> None:
    from dataclasses import asdict

    from adaptlib.merging.estimate import estimate

    meter = view.meter("Trying", quiet=json or quiet)
    seen = estimate(opened, recipe, progress=meter)
    if json:
        parents = [{"name": name, "digest": digest} for name, digest in recipe.parents.items()]
        out.document(
            "merge-plan",
            name=target,
            method=recipe.method,
            parents=parents,
            **asdict(seen),
            notes=notes,
        )
        return
    for note in notes:
        out.note(f"Note: {note}")
    if not quiet:
        view.print_estimate(target, recipe, seen)
