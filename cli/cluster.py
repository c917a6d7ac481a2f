"""adaptlib cluster: which experts do the same thing."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from . import out
from .options import JsonOption, LibraryOption, QuietOption, words
from .selection import one_base, select

EXAMPLES = (
    "adaptlib cluster --k 10",
    "adaptlib cluster --k auto --plot map.svg",
    "adaptlib cluster --save tasks",
)


def cluster(
    k: Annotated[
        str | None,
        typer.Option(
            "--k", help="How many clusters, or auto. 10 if not said, auto under 20 experts."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="mbc, or random as a control.")] = "mbc",
    experts: Annotated[
        list[str] | None, typer.Option(help="Only these, by name: a,b or repeated.")
    ] = None,
    only_base: Annotated[
        str | None, typer.Option("--base", metavar="ID", help="Only experts of this base model.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same clusters.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw a map: .svg or .png.")] = None,
    save: Annotated[str | None, typer.Option(help="Keep it in the library by this name.")] = None,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Group experts by the similarity of their parameters (MBC)."""
    from adaptlib.errors import UsageError
    from adaptlib.experts import Library
    from adaptlib.experts.records import check_record_name, save_record
    from adaptlib.paths import check_path

    if plot is not None:
        check_path(plot)
    opened = Library.open(library)
    names = select(opened, words(experts), only_base)
    one_base(opened, names)
    count = _count(k, len(names))
    if save is not None:
        check_record_name("clusterings", save)
    digests = {name: opened.digest(name) for name in names}

    from adaptlib import clustering

    if method not in clustering.CLUSTERINGS:
        known = ", ".join(clustering.CLUSTERINGS)
        raise UsageError(
            f"no clustering method {method!r}; there are: {known}", hint="--method mbc"
        )
    loaded = {name: opened[name] for name in names}
    result = clustering.cluster(loaded, method=method, k=count, seed=seed)
    if plot is not None:
        clustering.plot_map(result, plot)
    if save is not None:
        save_record(
            opened.store,
            "clusterings",
            save,
            {
                "schema": "adaptlib.clustering/1",
                "method": result.method,
                "k": result.k,
                "seed": seed,
                "features": result.features,
                "clusters": result.clusters,
                "experts": digests,
            },
        )
    if json:
        out.document(
            "cluster",
            method=result.method,
            k=result.k,
            clusters=result.clusters,
            silhouette=result.silhouette,
            features=result.features,
            seed=seed,
        )
        return
    if quiet:
        for members in result.clusters.values():
            out.line(" ".join(members))
        return
    out.table(
        [("CLUSTER", "left"), ("SIZE", "right"), ("EXPERTS", "fold")],
        [
            [label, str(len(members)), ", ".join(members)]
            for label, members in result.clusters.items()
        ],
    )
    silhouette = f"{result.silhouette:.3f}" if result.silhouette is not None else "not defined"
    out.line()
    out.line(f"{result.method}, k = {result.k}, silhouette {silhouette}")
    out.line(f"features: {result.basis}")
    if plot is not None:
        out.note(f"Drew {plot}")
    if save is not None:
        out.note(f"Saved  (adaptlib show clusterings/{save})")


def _count(k: str | None, experts: int) -> "int | Literal['auto']":
    from adaptlib.errors import UsageError

    if k is None:
        return 10 if experts >= 20 else "auto"
    if k == "auto":
        return "auto"
    if not k.isdecimal() or int(k) < 1:
        raise UsageError(
            f"--k wants a whole number from 1 to {experts}, or auto; got {k!r}", hint="--k auto"
        )
    return int(k)
