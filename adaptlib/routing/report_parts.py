"""The parts of a routing's page that need no script: escaped HTML from plain data.

`index` has the number that an expert goes by in the page's data, so that a click finds it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

MOVED = 8  # experts that are shown to take the weight of another
NAMED = 3  # experts of a router in a comparison


def prompt_of(document: Mapping[str, Any]) -> str:
    """The prompt; where it is not there, that which its tokens say."""
    return document.get("prompt") or "".join(token["token"] for token in document["tokens"])


def headline(document: Mapping[str, Any]) -> str:
    """The prompt in a line."""
    line = " ".join(prompt_of(document).split())
    return line if len(line) <= 60 else line[:59] + "…"


def figures(document: Mapping[str, Any]) -> str:
    """The numbers that describe the whole."""
    said: list[tuple[str, str, str]] = []
    if "router" in document:
        details = [f"top {document['top_k']}"] if "top_k" in document else []
        details += [f"mix {document['mix']}"] if "mix" in document else []
        said.append(("router", document["router"], ", ".join(details)))
    top = document["experts"][:1]
    said += [("top expert", e["name"], f"{_percent(e['weight'])} of the weight") for e in top]
    if not top:
        said.append(("top expert", "none", "the base answers alone"))
    if bits := document.get("entropy"):
        alike = f"as {2 ** bits['whole']:.0f} experts with equal weight"
        said.append(("entropy", f"{bits['whole']:.1f} bits", alike))
        said.append(("of one choice", f"{bits['choice']:.1f} bits", "a token at a module"))
    if document.get("agreement") is not None:
        said.append(("layers agree", _percent(document["agreement"]), "on a token's top expert"))
    if document.get("text") is not None:
        said.append(("answer", document["text"] or "(nothing)", ""))
    rows = [
        f"<div><dt>{escape(label)}</dt><dd><bdi>{escape(value)}</bdi>"
        f"<small>{escape(more)}</small></dd></div>"
        for label, value, more in said
    ]
    return f'<dl class="figures">{"".join(rows)}</dl>'


def without(changed: Mapping[str, Any] | None, index: Mapping[str, int]) -> str:
    """Who takes the weight of the top expert, and what comes next then."""
    if not changed:
        return ""
    gains = [entry for entry in changed["shares"] if entry["after"] > entry["before"]]
    rows = [
        [_chip(e["name"], index), _percent(e["before"]), _percent(e["after"])]
        for e in gains[:MOVED]
    ]
    if rest := gains[MOVED:]:
        before, after = (sum(entry[key] for entry in rest) for key in ("before", "after"))
        rows.append([f"{len(rest)} others", _percent(before), _percent(after)])
    said = f"<p>{_chip(changed['expert'], index)} had {_percent(changed['share'])} of the weight."
    said += (
        " Routed again without it, this is who has more:</p>"
        if rows
        else " Without it nobody has more: the base answers alone.</p>"
    )
    table = _table(["expert", "before", "after"], rows, "moves plain") if rows else ""
    if following := changed.get("next"):
        before, after, kl = (following[key] for key in ("before", "after", "kl"))
        said_kl = "" if kl is None else f" The distributions are {kl:.2g} bits apart (KL)."
        table += f"<p>Next token: {_likely(before)}, then {_likely(after)}.{said_kl}</p>"
    if "text" in changed:
        table += f"<p>Answer then: <bdi>{escape(changed['text'])}</bdi></p>"
    return f"<section><h2>Without the top expert</h2>{said}{table}</section>"


def _likely(token: Mapping[str, Any]) -> str:
    shown = escape(token["token"].replace("\n", "⏎"))
    return f'<span class="pair"><bdi>“{shown}”</bdi> {_percent(token["probability"])}</span>'


def compare(rows: Sequence[Mapping[str, Any]] | None, index: Mapping[str, int]) -> str:
    """Routers side by side."""
    if not rows:
        return ""
    texts = any("text" in row for row in rows)
    head = ["router", "top", "overlap", "bits", "pass (s)", *["answer"] * texts, "most weight"]
    body = [
        [
            f"<bdi>{escape(row['router'])}</bdi>",
            str(row["top_k"]),
            _percent(row["overlap"]),
            f"{row['entropy']:.1f}",
            f"{row['seconds']:.3f}",
            *[f"<bdi>{escape(row.get('text', ''))}</bdi>"] * texts,
            " ".join(
                f'<span class="pair">{_chip(e["name"], index)} {_percent(e["weight"])}</span>'
                for e in row["experts"][:NAMED]
            )
            or "the base alone",
        ]
        for row in rows
    ]
    return (
        '<section class="compare"><h2>Routers side by side '
        "<small>overlap is with the first</small></h2>"
        f'<div class="scroll">{_table(head, body, "plain")}</div></section>'
    )


def tables(document: Mapping[str, Any], shown: Sequence[str]) -> str:
    """All numbers; of the layers those of the experts `shown`, and of the others together."""
    experts = [[_text(e["name"]), _percent(e["weight"])] for e in document["experts"]]
    tokens = [
        [
            str(i + 1),
            _text(token["token"].replace("\n", "⏎")),
            _text(token["expert"] or "the base alone"),
            _percent(token["weight"]),
            f"{token.get('entropy', 0.0):.2f}",
        ]
        for i, token in enumerate(document["tokens"])
    ]
    layers = []
    for layer in document["layers"]:
        weights = {entry["name"]: entry["weight"] for entry in layer["experts"]}
        rest = sum(weights.values()) - sum(weights.get(name, 0.0) for name in shown)
        layers.append(
            [
                _text(str(layer["layer"])),
                *(_percent(weights.get(name, 0.0)) for name in shown),
                _percent(max(0.0, rest)),
                *(_percent(layer.get(key)) for key in ("agreement", "with_whole")),
                f"{layer.get('entropy', 0.0):.2f}",
            ]
        )
    of_layer = ["layer", *map(_text, shown), "others", "same", "as whole", "bits"]
    parts = [
        ("Experts", _table(["expert", "weight"], experts)),
        ("Tokens", _table(["", "token", "top expert", "weight", "bits"], tokens)),
        ("Layers", _table(of_layer, layers)),
    ]
    if drawn := document.get("map"):
        rows = [
            [_text(label), _text(", ".join(members))]
            for label, members in drawn["clusters"].items()
        ]
        parts.append(("Clusters", _table(["cluster", "experts"], rows)))
    return "".join(f'<h3>{h}</h3><div class="scroll">{table}</div>' for h, table in parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already; those that hold a number stand right."""
    number = re.compile(r"(&lt;)?\d[\d.,]*%?$|^$")
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=n' * bool(number.match(cell))}>{cell}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def _chip(name: str, index: Mapping[str, int]) -> str:
    """An expert that shows itself everywhere when it is clicked."""
    if name not in index:
        return f"<bdi>{escape(name)}</bdi>"
    return (
        f'<button type="button" class="chip" data-expert="{index[name]}" aria-pressed="false">'
        f"<bdi>{escape(name)}</bdi></button>"
    )


def _text(text: str) -> str:
    return f"<bdi>{escape(text)}</bdi>"


def _percent(share: float | None) -> str:
    if share is None:
        return ""
    return "&lt;0.1%" if 0 < share < 0.0005 else f"{share:.1%}"
