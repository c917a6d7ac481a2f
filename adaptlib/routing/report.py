"""One routing as a page for a browser: a single file that asks the network for nothing."""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from adaptlib.errors import NotFoundError, UsageError
from adaptlib.figures import COLOURS
from adaptlib.routing import report_parts as parts

SHOWN = 12  # experts with a column of their own; the others are one column
COLOURED = COLOURS[:7]  # the grey one is for the others


def write_report(path: str | Path, document: Mapping[str, Any]) -> Path:
    """Write a routing as one self-contained .html file to explore: tokens, layers by experts, the
    map of the clusters, what changes without the top expert, and routers side by side.

    `document` is what `route --explain --json` prints: `tokens` and `layers` (`explain`) and
    `experts` ([{"name", "weight"}]) must be there; `router`, `top_k`, `mix`, `text`, `agreement`,
    `entropy`, `without` and `compare` are shown where they are. So are `prompt`; `choices`, by
    layer and token (`explain.choices`); and `map`, {"clusters": {label: [name]}, "positions":
    {name: [x, y]}, "basis": what was compared}.

    Names and tokens may be hostile: they reach the page as data and escaped text only, and the
    page's policy allows no script but its own and no request. UsageError unless `path` ends in
    .html, and NotFoundError where its directory is not there.
    """
    path = check_report(path)
    page = files("adaptlib.routing")
    style, script = (
        page.joinpath(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
    )
    data = _data(document)
    index = {name: i for i, name in enumerate(data["names"])}
    filled = {
        "policy": f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'",
        "title": escape(f"{document.get('router', 'routing')}: {parts.headline(document)}"),
        "style": style,
        "script": script,
        "prompt": escape(parts.prompt_of(document)),
        "figures": parts.figures(document),
        "without": parts.without(document.get("without"), index),
        "compare": parts.compare(document.get("compare"), index),
        "tables": parts.tables(document, data["names"][:SHOWN]),
        "data": _json(data),
    }
    text = page.joinpath("report.html").read_text(encoding="utf-8")
    # In one pass, so that no text is ever taken for a place.
    text = re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], text)
    path.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    return path


def check_report(path: str | Path) -> Path:
    """The path of a report; the errors of `write_report`."""
    path = Path(path)
    if path.suffix.lower() != ".html":
        raise UsageError(
            f"a report is an .html file; got {str(path)!r}",
            hint=f"write to {(path.stem or 'report') + '.html'}",
        )
    if not path.parent.is_dir():
        raise NotFoundError(
            f"the directory {str(path.parent)!r} of the report is not there",
            hint=f"mkdir -p {path.parent}",
        )
    return path


def _data(document: Mapping[str, Any]) -> dict[str, Any]:
    """What the script works on: experts are numbers, by falling share, -1 is the base alone."""
    layers, tokens = document["layers"], document["tokens"]
    share = {entry["name"]: entry["weight"] for entry in document["experts"]}
    drawn = document.get("map")
    chosen = document.get("choices")
    known = dict.fromkeys(share)
    known |= dict.fromkeys(entry["name"] for layer in layers for entry in layer["experts"])
    known |= dict.fromkeys(token["expert"] for token in tokens if token["expert"] is not None)
    if drawn:
        known |= dict.fromkeys(drawn["positions"])
    names = sorted(known, key=lambda name: -share.get(name, 0.0))
    index = {name: i for i, name in enumerate(names)}
    return {
        "names": names,
        "shares": [_round(share.get(name, 0.0)) for name in names],
        "shown": SHOWN,
        "colours": COLOURED,
        "inks": [_ink(colour) for colour in COLOURED],
        "tokens": [
            {
                "token": token["token"],
                "expert": index.get(token["expert"], -1),
                "weight": _round(token["weight"]),
                "entropy": _round(token.get("entropy", 0.0)),
                "experts": [
                    [index[entry["name"]], _round(entry["weight"])]
                    for entry in token.get("experts", ())
                    if entry["name"] in index
                ],
            }
            for token in tokens
        ],
        "layers": [
            {
                "layer": str(layer["layer"]),
                "weights": _row(layer["experts"], index),
                "entropy": _round(layer.get("entropy", 0.0)),
                "agreement": _round(layer.get("agreement")),
            }
            for layer in layers
        ],
        "choice_layers": [str(layer) for layer in chosen["layers"]] if chosen else None,
        "choices": [
            [[[index.get(chosen["names"][i], -1), w] for i, w in token] for token in layer]
            for layer in chosen["choices"]
        ]
        if chosen
        else None,
        "map": {
            "clusters": [
                [label, [index[name] for name in members if name in index]]
                for label, members in drawn["clusters"].items()
            ],
            "positions": [drawn["positions"].get(name) for name in names],
            "basis": drawn.get("basis", ""),
        }
        if drawn
        else None,
    }


def _row(experts: Iterable[Mapping[str, Any]], index: Mapping[str, int]) -> list[Any]:
    row: list[Any] = [0] * len(index)
    for entry in experts:
        row[index[entry["name"]]] = _round(entry["weight"])
    return row


def _json(data: Any) -> str:
    """JSON that is safe inside a script element: ASCII, without `<`, `>` and `&`; a number that is
    not finite is null."""
    data = json.loads(json.dumps(data), parse_constant=lambda _: None)
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _ink(colour: str) -> str:
    """Black or white, whichever is read better on a colour (WCAG's contrast)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if 1.05 / (light + 0.05) > (light + 0.05) / 0.05 else "#000000"


def _round(value: float | None) -> float | None:
    return value if value is None else round(value, 5)
