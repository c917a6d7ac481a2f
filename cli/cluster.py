"""adaptlib cluster: which experts do the same thing."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import cluster_view as view
from . import out
from .cluster_run import (
    METHODS,
    NOW,
    THRESHOLD,
    check,
    clustered,
    difference,
    fields_of,
    grown,
    how,
    labels_of,
    meter,
    unused,
)
from .options import (
    JsonOption,
    LibraryOption,
    PlainOption,
    QuietOption,
    check_formats,
    words,
)
from .selection import about, expand, one_base_of, select

if TYPE_CHECKING:
    from adaptlib.experts import Library

EXAMPLES = (
    "adaptlib cluster --k 10",
    "adaptlib cluster --k auto --measure --plot map.svg",
    "adaptlib cluster --method agglomerative --plot tree.svg --plot-kind tree",
    "adaptlib cluster --save tasks",
    "adaptlib cluster --assign tasks --save tasks",
    "adaptlib cluster --diff tasks now",
    "adaptlib cluster --duplicates",
)


def cluster(
    k: Annotated[
        str | None,
        typer.Option(
            "--k", help="How many clusters, or auto. 10 if not said, auto under 20 experts."
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help=f"{', '.join(METHODS)}; mbc if not said.")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="What is compared: factors (the paper's), sketches or gram (exact) of the "
            "updates; auto if not said."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PART", help="Compare only these layers or modules: 0,1,q_proj."),
    ] = None,
    experts: Annotated[
        list[str] | None,
        typer.Option(help="Only these: a,b or repeated, or cluster:NAME/LABEL of a saved one."),
    ] = None,
    only_base: Annotated[
        str | None, typer.Option("--base", metavar="ID", help="Only experts of this base model.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same clusters; 0 if not said.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Say how good they are, next to controls.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw them: .svg or .png.")] = None,
    plot_kind: Annotated[str, typer.Option(help="map, tree or heat.")] = "map",
    layout: Annotated[
        str | None, typer.Option(help="Of the map: mds, pca or tsne; mds if not said.")
    ] = None,
    save: Annotated[str | None, typer.Option(help="Keep it in the library by this name.")] = None,
    assign: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Put experts that a saved one lacks into its clusters."),
    ] = None,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="What became of saved clusters; B may be: now."),
    ] = None,
    duplicates: Annotated[
        bool, typer.Option("--duplicates", help="List experts that are one expert.")
    ] = False,
    threshold: Annotated[
        float | None,
        typer.Option(help=f"The cosine from which they are one; {THRESHOLD} if not said."),
    ] = None,
    plain: PlainOption = False,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Group experts by the similarity of their parameters (MBC), and work with the groups."""
    options = {"k": k, "method": method, "features": features, "seed": seed, "only": words(only)}
    given = {key: value for key, value in options.items() if value not in (None, [])}
    made = {"measure": measure, "plot": plot, "save": save}
    check(
        method=method,
        features=features,
        k=k,
        plot=plot,
        plot_kind=plot_kind,
        layout=layout,
        save=save,
        threshold=threshold,
        duplicates=duplicates,
    )
    check_formats(json=json, plain=plain)
    which: Any = {"experts": words(experts), "base": only_base}
    which |= {"json": json, "plain": plain, "quiet": quiet}
    if duplicates:
        _alone("--duplicates", {"diff": diff, "assign": assign} | given | made)
        _duplicates(_open(library), threshold or THRESHOLD, **which)
    elif diff is not None:
        _alone("--diff", {"assign": assign} | made | (given if diff[1] != NOW else {}))
        _diff(_open(library), diff, given, **which)
    elif assign is not None:
        _alone("--assign", given | {"measure": measure, "plot": plot})
        _assign(_open(library), assign, save, **which)
    else:
        notes = unused(given, layout=layout, kind=plot_kind)
        picture = None if plot is None else (plot, plot_kind, layout or "mds")
        _cluster(_open(library), given, notes, measure, picture, save, **which)


def _cluster(
    opened: "Library",
    given: Mapping[str, Any],
    notes: list[str],
    measure: bool,
    picture: tuple[Path, str, str] | None,
    save: str | None,
    *,
    experts: list[str],
    base: str | None,
    json: bool,
    plain: bool,
    quiet: bool,
) -> None:
    names = select(opened, experts, base)
    known = about(opened, names)
    one_base_of(known)
    found = clustered(opened, names, how(given, len(names)), quiet=json or plain or quiet)
    labels = labels_of(found.clusters, known)
    fields = fields_of(found, labels)
    cards = {name: one.card for name, one in known.items()}
    if measure:
        from adaptlib.clustering.agreement import measures

        fields["measures"] = measures(found, cards)
    if picture is not None:
        from adaptlib.clustering.plot import plot

        plot(found, picture[0], kind=picture[1], layout=picture[2], labels=labels)
        notes.append(f"Drew {picture[0]}")
    if save is not None:
        from adaptlib.clustering import save_clustering

        digests = {name: one.digest for name, one in known.items()}
        save_clustering(opened, save, found, digests=digests, labels=labels)
        notes.append(f"Saved  (adaptlib show clusterings/{save})")
    if json:
        out.document("cluster", **fields)
        return
    if plain:
        held = [(one, label) for label, group in found.clusters.items() for one in group]
        out.plain_table(("name", "cluster"), [*held, *((one, None) for one in found.outliers)])
        return
    if quiet:
        view.print_names(found.clusters)
        return
    view.print_clusters(found.clusters, found.outliers, labels)
    out.line()
    view.print_footer(found.method, found.k, found.silhouette, found.basis)
    if measure:
        view.print_measures(fields["measures"], cards)
    for note in notes:
        out.note(note)


def _assign(
    opened: "Library",
    name: str,
    save: str | None,
    *,
    experts: list[str],
    base: str | None,
    json: bool,
    plain: bool,
    quiet: bool,
) -> None:
    """Put experts that the saved clustering lacks into its nearest clusters."""
    grown_, labels = grown(opened, name, expand(opened, experts), base)
    rows = [
        {"name": one, "cluster": to.label, "cosine": to.cosine}
        for one, to in sorted(grown_.assigned.items())
    ]
    if save is not None:
        from adaptlib.clustering import save_clustering

        save_clustering(opened, save, grown_.clustering, digests=grown_.digests, labels=labels)
    if json:
        out.document("cluster", **fields_of(grown_.clustering, labels), assigned=rows)
        return
    if plain:
        columns = ("name", "cluster", "cosine")
        out.plain_table(columns, [[row[key] for key in columns] for row in rows])
        return
    if quiet:
        for row in rows:
            out.line(f"{row['name']} {row['cluster']}")
        return
    view.print_assigned(rows, labels, name)
    if save is not None:
        out.note(f"Saved  (adaptlib show clusterings/{save})")
    elif rows:
        out.note(f"Not kept  (--save {name} keeps them there)")


def _diff(
    opened: "Library",
    which: tuple[str, str],
    given: Mapping[str, Any],
    *,
    experts: list[str],
    base: str | None,
    json: bool,
    plain: bool,
    quiet: bool,
) -> None:
    """What became of the clusters of one saved clustering in another, or now."""
    found, labels = difference(
        opened, which, given, expand(opened, experts), base, quiet=json or plain or quiet
    )
    if json:
        import msgspec

        fields = msgspec.to_builtins(found)
        out.document("cluster-diff", before=which[0], after=which[1], same=found.same, **fields)
    elif plain:
        moves = [(move.name, move.before, move.after) for move in found.moved]
        out.plain_table(("name", "before", "after"), moves)
    elif quiet:
        for move in found.moved:
            out.line(move.name)
    else:
        view.print_difference(found, which, labels)


def _duplicates(
    opened: "Library",
    threshold: float,
    *,
    experts: list[str],
    base: str | None,
    json: bool,
    plain: bool,
    quiet: bool,
) -> None:
    """Experts that are one expert, by their updates; also one expert by two names."""
    names = select(opened, experts, base, once=False)
    known = about(opened, names)
    one_base_of(known)

    from adaptlib.clustering.duplicates import near_duplicates
    from adaptlib.experts.sketches import sketches

    table = sketches(opened, names, progress=meter("Sketches", quiet=json or plain or quiet))
    found = near_duplicates(
        table.names,
        table.rows,
        scales=table.scales,
        digests={name: one.weights for name, one in known.items()},
        threshold=threshold,
    )
    if json:
        out.document(
            "cluster-duplicates",
            threshold=threshold,
            experts=len(names),
            duplicates=[
                {"names": one.names, "cosine": one.cosine, "copies": one.copies} for one in found
            ],
        )
    elif plain:
        pairs = [(number, name) for number, one in enumerate(found, 1) for name in one.names]
        out.plain_table(("group", "name"), pairs)
    elif quiet:
        for one in found:
            out.line(" ".join(one.names))
    else:
        view.print_duplicates(found, len(names), threshold)


def _alone(option: str, others: Mapping[str, Any]) -> None:
    """UsageError where an option that does something else is given with others."""
    from adaptlib.errors import UsageError

    also = [f"--{name}" for name, value in others.items() if value]
    if also:
        raise UsageError(f"{option} goes without {' and '.join(also)}", hint=f"leave out {also[0]}")


def _open(library: Path | None) -> "Library":
    from adaptlib.experts import Library

    return Library.open(library)
