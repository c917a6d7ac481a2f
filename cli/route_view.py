"""What `route` prints: the shares of one router, or several routers side by side."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import out
from .route_run import Asked

if TYPE_CHECKING:
    from adaptlib.routing import Trace

SHOWN = 10  # experts with a line of their own
NAMED = 3  # experts of a router in a comparison
LONGEST = 24  # characters of a name there


def print_shares(asked: Asked, *, quiet: bool) -> None:
    """Names and bars of the experts with the most weight."""
    shares = asked.shares
    if quiet:
        for name in shares:
            out.line(name)
        return
    router = asked.fitted.router
    if not shares:
        out.line(f"{router.name}: no expert is chosen; the base answers alone")
        if asked.confidence is not None:
            out.line(f"  confidence {asked.confidence:.4g}, threshold {router.threshold:.4g}")
        return
    shown = dict(list(shares.items())[:SHOWN])
    width = min(40, max(len(name) for name in shown))
    top = max(shown.values())
    out.line(f"{router.name}, top {router.most}: each expert's share of the routing weight")
    for name, weight in shown.items():
        bar = out.bar(weight / top if top else 0.0, 80 - width - 12)
        out.line(f"  {out.cut(name, width):<{width}}  {weight:6.1%}  {bar}")
    if rest := len(shares) - len(shown):
        left = sum(list(shares.values())[SHOWN:])
        out.line(f"  {f'{rest} others':<{width}}  {left:6.1%}")


def details(trace: "Trace", tokenizer: Any, ids: Any) -> dict[str, Any]:
    """By token and by layer, who was chosen, as `--explain --json` has it."""
    from adaptlib.routing.explain import explain, pieces

    return explain(trace, pieces(tokenizer.decode, ids["input_ids"][0].tolist()))


def fields(asked: Sequence[Asked], *, compared: bool) -> dict[str, Any]:
    """What JSON says of the first router and, where they are `compared`, of all."""
    first = asked[0]
    said: dict[str, Any] = {
        "router": first.fitted.router.name,
        "top_k": first.fitted.router.most,
        "mix": first.fitted.router.mix,
        "scope": first.fitted.router.scope,
        "experts": named(first.shares),
    }
    if first.confidence is not None:
        said |= {"threshold": first.fitted.router.threshold, "confidence": first.confidence}
    if first.text is not None:
        said["text"] = first.text
    return said | {"compare": side_by_side(asked)} if compared else said


def named(shares: Mapping[str, float]) -> list[dict[str, Any]]:
    """Shares as JSON has them."""
    return [{"name": name, "weight": weight} for name, weight in shares.items()]


def side_by_side(asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """Routers side by side, as JSON has them. `overlap` is with the first: the routing weight that
    both give to the same experts; `entropy` is in bits, of the shares; `seconds` are those of one
    pass over the prompt, after `fit_seconds`."""
    from adaptlib.routing.explain import entropy, overlap

    rows = []
    for one in asked:
        row = {
            "router": one.fitted.words,
            "top_k": one.fitted.router.most,
            "experts": named(one.shares),
            "overlap": overlap(asked[0].shares, one.shares),
            "entropy": entropy(one.shares.values()),
            "seconds": round(one.seconds, 4),
            "fit_seconds": round(one.fitted.seconds, 4),
        }
        rows.append(row if one.text is None else row | {"text": one.text})
    return rows


def print_comparison(rows: Sequence[Mapping[str, Any]], *, quiet: bool) -> None:
    """`side_by_side` as a table, and the answers below it."""
    if quiet:
        for row in rows:
            out.line(" ".join([row["router"], *(e["name"] for e in row["experts"][:1])]))
        return
    out.table(
        [
            ("ROUTER", "left"),
            ("TOP", "right"),
            ("OVERLAP", "right"),
            ("BITS", "right"),
            ("TIME", "right"),
            ("MOST WEIGHT", "fold"),
        ],
        [
            [
                out.cut(row["router"], 20),
                str(row["top_k"]),
                f"{row['overlap']:.0%}",
                f"{row['entropy']:.1f}",
                _seconds(row["seconds"]),
                "\n".join(
                    f"{out.cut(e['name'], LONGEST)} {e['weight']:.0%}"
                    for e in row["experts"][:NAMED]
                )
                or "the base alone",
            ]
            for row in rows
        ],
    )
    out.line()
    out.line(f"OVERLAP: of the routing weight, with {rows[0]['router']}. BITS: entropy of the")
    out.line("shares. TIME: of one pass over the prompt.")
    if answers := [row for row in rows if "text" in row]:
        width = min(20, max(len(row["router"]) for row in answers))
        out.line()
        for row in answers:
            name = f"  {out.cut(row['router'], width):<{width}}  "
            out.line(name + row["text"].replace("\n", "\n" + " " * len(name)))


def _seconds(value: float) -> str:
    return f"{value:.3f}s" if value < 1 else f"{value:.1f}s"
