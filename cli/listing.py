"""adaptlib list: what is in the library."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import out
from .filters import (
    CLUSTER,
    FIELDS,
    GRAMMAR,
    Filter,
    Row,
    choose,
    parse_field,
    parse_filter,
    parse_sort,
)
from .options import JsonOption, LibraryOption, PlainOption, QuietOption, check_formats, words

if TYPE_CHECKING:
    from adaptlib.experts.catalog import Catalog

EXAMPLES = (
    "adaptlib list",
    'adaptlib list --filter "rank>=16" --filter "task~poem" --sort bytes:desc',
    'adaptlib ls -q --filter "added>30d"',
    "adaptlib list --fields name,rank,bytes,added --plain",
    "adaptlib list --json",
)
KEYS = ("name", "digest", "kind", "base", "task", "rank", "modules", "params", "bytes")
KEPT = ("kind", "base", "task", "description", "rank", "modules", "params", "bytes")  # by the index
COLUMNS = ("name", "kind", "rank", "bytes", "digest", "base")
HOW = {  # how `out.table` treats a column; the others are shown whole, at the left
    **dict.fromkeys(("rank", "modules", "params", "bytes", "added"), "right"),
    **dict.fromkeys(("base", "task", "description", "cluster"), "cut"),
}
HEADINGS = {"bytes": "SIZE"}
LONGEST = 40  # characters of a name


def list_experts(
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            metavar="CONDITION",
            help=f"Only those for which it holds; of several, all must. {GRAMMAR}.",
        ),
    ] = None,
    sort: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD[:desc]", help="Sort by these fields, the first above all."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="The first so many.")] = None,
    all_tags: Annotated[
        bool, typer.Option("--all-tags", "-a", help="Every tag of every name.")
    ] = False,
    fields: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD,...", help="These columns, or keys of --json, in this order."),
    ] = None,
    no_truncate: Annotated[
        bool, typer.Option("--no-truncate", help="Cut nothing, however wide.")
    ] = False,
    plain: PlainOption = False,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List the experts."""
    from adaptlib.experts.catalog import Catalog

    check_formats(json=json, plain=plain)
    conditions = [parse_filter(text) for text in filters or ()]
    keys = parse_sort(words(sort))
    columns = [parse_field(word, "--fields") for word in words(fields)]
    shown = columns or (KEYS if json or plain else [*COLUMNS])
    asked = {*(one.field for one in conditions), *(key.field for key in keys)}
    asked |= set() if quiet else {*shown, *(() if json or plain else ("bytes",))}
    catalog = Catalog.open(library)
    rows = _rows(catalog, asked, all_tags=all_tags)
    if "cluster" in asked:
        _check_clusters(catalog, conditions)
    chosen = choose(rows, conditions, keys, limit, now=datetime.now(UTC))
    if json:
        experts = [{key: _data(row[key]) for key in shown} for row in chosen]
        out.document("list-fields" if columns else "list", experts=experts)
    elif quiet:
        for row in chosen:
            out.line(row["name"])
    elif plain:
        out.plain_table(shown, [[_text(row[key]) for key in shown] for row in chosen])
    elif not rows:
        out.note("The library is empty.\n  Next: adaptlib add SOURCE, or adaptlib init --demo")
    elif not chosen:
        out.note(f"None of {out.count(len(rows), 'expert')} is like that")
    else:
        _print(chosen, shown, whole=no_truncate)
        of = f" of {len(rows):,}" if len(chosen) < len(rows) else ""
        total = out.size(sum(row["bytes"] for row in chosen))
        out.note(f"{out.count(len(chosen), 'expert')}{of}, {total}")


def _rows(catalog: "Catalog", asked: set[str], *, all_tags: bool) -> list[dict[str, Any]]:
    """A row for each expert, with what was asked for: the rest may be slow to find out."""
    names = catalog.tags() if all_tags else catalog.names()
    rows: list[dict[str, Any]] = []
    for shown, digest in names.items():
        name, _, tag = shown.partition(":")
        rows.append({"name": shown, "tag": tag or "latest", "digest": digest})
    kept = [key for key in KEPT if key in asked]
    if kept:
        values = (
            attrgetter(*kept) if len(kept) > 1 else lambda summary: (getattr(summary, kept[0]),)
        )
        summaries = catalog.summarised(names).values()
        for row, (_, summary) in zip(rows, summaries, strict=True):
            row.update(zip(kept, values(summary), strict=True))
    if "cluster" in asked:
        clusters = _clusters(catalog)
        for row in rows:
            row["cluster"] = clusters.get(row["digest"], ())
    if "added" in asked:
        logs: dict[str, dict[str, datetime]] = {}
        for row in rows:
            name = row["name"].partition(":")[0]
            if name not in logs:
                logs[name] = {entry.ref.tag: entry.time for entry in catalog.store.log(name)}
            row["added"] = logs[name].get(row["tag"])
    return rows


def _clusters(catalog: "Catalog") -> dict[str, tuple[str, ...]]:
    """The clusters of all saved clusterings that an expert is in, by its digest."""
    from adaptlib.experts.records import load_record

    found: dict[str, tuple[str, ...]] = {}
    for saved in _saved(catalog):
        record = load_record(catalog.store, "clusterings", saved)
        for label, names in record.get("clusters", {}).items():
            for name in names:
                digest = record["experts"].get(name)
                found[digest] = (*found.get(digest, ()), f"{saved}:{label}")
    return found


def _saved(catalog: "Catalog") -> list[str]:
    """The names of the saved clusterings."""
    listed, _ = catalog.store.listing()
    return [name.split("/", 1)[1] for name, _ in listed if name.startswith("clusterings/")]


def _check_clusters(catalog: "Catalog", conditions: Sequence[Filter]) -> None:
    """UsageError where a filter's cluster is none, or could be one of several."""
    from adaptlib.errors import UsageError

    wanted = [one.value for one in conditions if FIELDS[one.field] == CLUSTER and one.value]
    if not wanted:
        return
    saved = _saved(catalog)
    if not saved:
        raise UsageError("no clustering is saved", hint="make one: adaptlib cluster --save NAME")
    for value in wanted:
        name, colon, _ = value.rpartition(":")
        if not colon and len(saved) > 1:
            raise UsageError(
                f"cluster={value} could be of {' or '.join(saved)}",
                hint=f"cluster={saved[0]}:{value}",
            )
        if colon and name not in saved:
            raise UsageError(
                f"no clustering is named {name!r}; there are: {', '.join(saved)}",
                hint=f"cluster={saved[0]}:LABEL",
            )


def _data(value: Any) -> Any:
    """A value for JSON."""
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    return list(value) if isinstance(value, tuple) else value


def _text(value: Any) -> Any:
    """A value for --plain."""
    return ",".join(value) if isinstance(value, tuple) else _data(value)


def _print(rows: Sequence[Row], columns: Sequence[str], *, whole: bool) -> None:
    labels = {one.rpartition(":")[0] for row in rows for one in row.get("cluster", ())}
    shown = {key: _shown(key, whole=whole, alone=len(labels) < 2) for key in columns}
    cells = [
        ["" if value in (None, ()) else show(value) for value in map(itemgetter(key), rows)]
        for key, show in shown.items()
    ]
    out.table(
        [
            (HEADINGS.get(key, key.upper()), "left" if whole and how == "cut" else how)
            for key in shown
            for how in [HOW.get(key, "left")]
        ],
        list(zip(*cells, strict=True)),
    )


def _shown(key: str, *, whole: bool, alone: bool) -> Callable[[Any], str]:
    """How a field is shown to people. `alone`: of one clustering, whose name says nothing."""
    now = datetime.now(UTC)
    ways: dict[str, Callable[[Any], str]] = {
        "bytes": out.size,
        "added": lambda value: out.ago(now - value),
        "cluster": lambda value: ", ".join(
            one.rpartition(":")[2] if alone else one for one in value
        ),
        **dict.fromkeys(("rank", "modules", "params"), "{:,}".format),
    }
    if not whole:
        ways["name"] = lambda value: out.cut(value, LONGEST)
        ways["digest"] = lambda value: value.removeprefix("sha256:")[:7]
    return ways.get(key, str)
