"""What `cluster` prints, at 80 columns."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import out

if TYPE_CHECKING:
    from adaptlib.clustering.agreement import Measures
    from adaptlib.clustering.compare import Difference
    from adaptlib.clustering.duplicates import Duplicates

SHOWN, FEW = 24, 6  # experts of a cluster that are named, of up to MANY and of more; -q has all
MANY = 200
WORDS = 16  # characters of a line of a label
PLACE = 22  # characters of a cluster in a table
MOVES = 40  # experts that moved, and names in a sentence, likewise


def print_clusters(
    clusters: Mapping[str, Sequence[str]], outliers: Sequence[str], labels: Mapping[str, str]
) -> None:
    """A row for each cluster, with its words where there are any, and the outliers below."""
    shown = SHOWN if sum(map(len, clusters.values())) <= MANY else FEW
    heading = [("CLUSTER", "left"), ("SIZE", "right"), ("LABEL", "left"), ("EXPERTS", "fold")]
    rows = [
        [
            label,
            f"{len(names):,}",
            textwrap.fill(labels.get(label, ""), WORDS),
            _some(names, shown),
        ]
        for label, names in clusters.items()
    ]
    if not labels:
        heading.pop(2)
        rows = [[*row[:2], row[3]] for row in rows]
    if rows:
        out.table(heading, rows)
    if outliers:
        if rows:
            out.line()
        paragraph(f"{out.count(len(outliers), 'outlier')}, in no cluster: {_some(outliers, MOVES)}")


def print_footer(method: str, k: int, silhouette: float | None, basis: str) -> None:
    """How the clusters were made, and how well parted they are."""
    fit = f"{silhouette:.3f}" if silhouette is not None else "not defined"
    out.line(f"{method}, k = {k}, silhouette {fit}")
    out.line(f"features: {basis}")


def print_names(clusters: Mapping[str, Sequence[str]]) -> None:
    """A line for each cluster."""
    for names in clusters.values():
        out.line(" ".join(names))


def print_measures(measures: "Sequence[Measures]", cards: Mapping[str, Mapping[str, Any]]) -> None:
    """The clustering and its controls, one below the other."""
    categories = len({card.get("category") for card in cards.values()} - {None, ""})
    columns = ("silhouette", "stability", "ari", "nmi")
    if not categories:
        columns = columns[:2]
    out.line()
    out.table(
        [("METHOD", "left"), ("K", "right"), *((name.upper(), "right") for name in columns)],
        [
            [one.method, str(one.k), *(_number(getattr(one, name)) for name in columns)]
            for one in measures
        ],
    )
    out.line()
    agreement = f" ARI and NMI: agreement with the {categories} categories on the cards."
    paragraph(
        "STABILITY: whether the clusters stay where a fifth of the experts is left out."
        + agreement * bool(categories)
        + " The first row is read against the control `random`."
    )


def print_duplicates(found: "Sequence[Duplicates]", experts: int, threshold: float) -> None:
    """Groups of experts that are one expert."""
    rule = f"cosine {threshold:g} or more, norms within 5%"
    if not found:
        out.line(f"No near-duplicates among {out.count(experts, 'expert')} ({rule})")
        return
    rows = []
    for one in found:
        names = ", ".join(one.names)
        for same in one.copies:
            exact = "all" if len(same) == len(one.names) else ", ".join(same)
            names += f"\nexact copies: {exact}"
        rows.append([str(len(one.names)), f"{one.cosine:.4f}", names])
    out.table([("SIZE", "right"), ("COSINE", "right"), ("ONE EXPERT", "fold")], rows)
    spare = sum(len(one.names) - 1 for one in found)
    out.line()
    out.line(
        f"{out.count(experts, 'expert')}, of which {spare:,} {'are' if spare != 1 else 'is'} "
        "another one again"
    )
    out.line(f"({rule}; COSINE is the least to the first of them)")


def print_assigned(rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str], name: str) -> None:
    """Where each new expert went."""
    if not rows:
        out.line(f"All experts are in {name} already")
        return
    out.table(
        [("EXPERT", "cut"), ("COSINE", "right"), ("CLUSTER", "left")],
        [[row["name"], _number(row["cosine"]), called(row["cluster"], labels)] for row in rows],
    )
    out.line()
    out.line("COSINE: with the mean of the cluster's experts; near 0 is like none of them")


def print_difference(
    found: "Difference",
    names: tuple[str, str],
    labels: tuple[Mapping[str, str], Mapping[str, str]],
) -> None:
    """What became of each cluster, and who moved."""
    before, after = names
    agree = f"  ARI {found.ari:.3f}, NMI {found.nmi:.3f}" if found.ari is not None else ""
    out.line(f"{before} and {after}: {out.count(found.common, 'expert')} in both{agree}")
    if found.same and not found.changed:
        out.line("The same clusters")
        return
    if found.moved:
        out.line()
        out.table(
            [("MOVED", "cut"), (before.upper(), "left"), (after.upper(), "left")],
            [
                [move.name, _place(move.before, labels[0]), _place(move.after, labels[1])]
                for move in found.moved[:MOVES]
            ],
        )
        if len(found.moved) > MOVES:
            out.line(f"and {len(found.moved) - MOVES:,} more (--json names all)")
    out.line()
    for label, parts in found.split.items():
        paragraph(f"{called(label, labels[0])} was split into {_parts(parts, labels[1])}")
    for label, parts in found.merged.items():
        paragraph(f"{called(label, labels[1])} was merged from {_parts(parts, labels[0])}")
    sentences = {
        f"gone from {after}, clusters": [called(label, labels[0]) for label in found.gone],
        f"new in {after}, clusters": [called(label, labels[1]) for label in found.new],
        f"only in {before}": found.only_before,
        f"only in {after}": found.only_after,
        "another expert by this name now": found.changed,
    }
    for what, said in sentences.items():
        if said:
            paragraph(f"{what}: {_some(said, MOVES)}")


def paragraph(text: str) -> None:
    """Text over several lines where it must be."""
    out.line(textwrap.fill(text, 79, break_long_words=False, break_on_hyphens=False))


def called(label: str, labels: Mapping[str, str]) -> str:
    """A cluster's number, and its words where it has any."""
    return f"{label} ({labels[label]})" if labels.get(label) else label


def _place(label: str | None, labels: Mapping[str, str]) -> str:
    return "outlier" if label is None else out.cut(called(label, labels), PLACE)


def _parts(parts: Mapping[str, int], labels: Mapping[str, str]) -> str:
    return ", ".join(f"{called(label, labels)}: {count}" for label, count in parts.items())


def _some(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
