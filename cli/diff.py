"""adaptlib diff: what two experts have in common."""

from typing import Annotated, Any

import typer

from . import out
from .options import JsonOption, LibraryOption, PlainOption, QuietOption, check_formats

EXAMPLES = ("adaptlib diff sql:v1 sql:v2", "adaptlib diff poems stories --json")


def diff(
    a: Annotated[str, typer.Argument(help="An expert.")],
    b: Annotated[str, typer.Argument(help="Another.")],
    plain: PlainOption = False,
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare two experts by module: size of each update and the cosine between them."""
    from adaptlib.experts.library import Library

    check_formats(json=json, plain=plain)
    opened = Library.open(library)
    same = opened.digest(a) == opened.digest(b)
    first, second = opened.manifest(a), opened.manifest(b)
    fields = {
        key: (getattr(first, key), getattr(second, key))
        for key in ("kind", "base", "rank", "params")
        if getattr(first, key) != getattr(second, key)
    }
    cards = sorted(
        key
        for key in first.card.keys() | second.card.keys()
        if first.card.get(key) != second.card.get(key)
    )
    modules, cosine = ([], 1.0) if same else _modules(opened[a], opened[b])
    if json:
        out.document(
            "diff",
            a=a,
            b=b,
            same=same,
            cosine=cosine,
            fields={key: list(pair) for key, pair in fields.items()},
            card=cards,
            modules=modules,
        )
        return
    if plain:
        columns = ("module", "status", "norm_a", "norm_b", "cosine")
        out.plain_table(columns, [[entry[key] for key in columns] for entry in modules])
        return
    if same:
        out.line(f"{a} and {b} are one expert: {out.short(opened.digest(a))}")
        return
    out.line(f"{a} and {b}: cosine of all updates {cosine:+.3f}")
    for key, (left, right) in fields.items():
        out.line(f"  {key}: {left} | {right}")
    if cards:
        out.line(f"  card: {', '.join(cards)} differ")
    if quiet:
        return
    out.table(
        [("MODULE", "fold"), ("NORM A", "right"), ("NORM B", "right"), ("COSINE", "right")],
        [
            [
                entry["module"],
                f"{entry['norm_a']:.3f}" if entry["norm_a"] is not None else "-",
                f"{entry['norm_b']:.3f}" if entry["norm_b"] is not None else "-",
                f"{entry['cosine']:+.3f}" if entry["cosine"] is not None else entry["status"],
            ]
            for entry in modules
        ],
    )


def _modules(first: Any, second: Any) -> tuple[list[dict[str, Any]], float]:
    rows: list[dict[str, Any]] = []
    product = size_a = size_b = 0.0
    for module in sorted(first.deltas.keys() | second.deltas.keys()):
        a, b = first.deltas.get(module), second.deltas.get(module)
        row: dict[str, Any] = {
            "module": module,
            "status": "both" if a and b else ("only in A" if a else "only in B"),
            "norm_a": a.norm() if a else None,
            "norm_b": b.norm() if b else None,
            "cosine": None,
        }
        size_a += (row["norm_a"] or 0.0) ** 2
        size_b += (row["norm_b"] or 0.0) ** 2
        if a and b and a.shape == b.shape:
            inner = a.inner(b)
            product += inner
            norms = row["norm_a"] * row["norm_b"]
            row["cosine"] = inner / norms if norms else 0.0
        elif a and b:
            row["status"] = "other shape"
        rows.append(row)
    norms = (size_a * size_b) ** 0.5
    return rows, product / norms if norms else 0.0
