"""adaptlib show: one expert whole."""

import json as json_module
import re
import textwrap
from typing import Annotated, Any

import msgspec
import typer

from . import out
from .merge_view import is_merged, recipe_lines
from .options import JsonOption, LibraryOption, QuietOption

SHOWN = 2000  # characters of a card's field; --json has it whole
EXAMPLES = ("adaptlib show sql", "adaptlib show sql --json")


def show(
    name: Annotated[
        str, typer.Argument(help="A name, name:tag or digest; clusterings/NAME, routers/NAME.")
    ],
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show an expert: its card, base model and modules."""
    from adaptlib.experts.library import Library
    from adaptlib.experts.names import RECORDS
    from adaptlib.experts.records import load_record

    opened = Library.open(library)
    kind, _, saved = name.partition("/")
    if kind in RECORDS and saved:
        _show_record(load_record(opened.store, kind, saved), name, json=json)
        return
    digest, manifest = opened.digest(name), opened.manifest(name)
    names = [ref for ref, held in opened.tags().items() if held == digest]
    if json:
        fields = msgspec.to_builtins(manifest)
        out.document("show", name=name, names=names, digest=digest, manifest=fields)
        return
    if quiet:
        out.line(digest)
        return
    card = dict(manifest.card)
    pin = card.pop("base", {})
    out.line(f"{', '.join(names) or name}")
    out.line(f"  digest   {digest}")
    rank = f", rank {manifest.rank}" if manifest.rank else ""
    out.line(
        f"  kind     {manifest.kind}{rank}, {manifest.params:,} parameters, "
        f"{out.size(manifest.blob.size)}"
    )
    pinned = out.short(pin["digest"]) if pin.get("digest") else "not checked yet"
    revision = f" @ {pin['revision'][:12]}" if pin.get("revision") else ""
    out.line(f"  base     {manifest.base}{revision} ({pinned})")
    if manifest.gates:
        trained = card.pop("gate", None)
        steps = f", trained in {trained['steps']} steps" if _has_steps(trained) else ""
        out.line(f"  gate     at {out.count(manifest.gates, 'module')}, for phatgoose{steps}")
    merged = recipe_lines(card) if is_merged(card) else []
    for text in merged:
        out.line(f"  {text}")
    for key, value in card.items():
        for text in [] if merged and key in ("merge", "parents") else _lines(key, value):
            out.line(textwrap.fill(text, 78, initial_indent="  ", subsequent_indent=" " * 11))
    out.line()
    out.table(
        [
            ("MODULES", "fold"),
            ("COUNT", "right"),
            ("SHAPE", "left"),
            ("RANK", "right"),
            ("SCALE", "right"),
        ],
        _groups(manifest.modules),
    )


def _show_record(document: dict[str, Any], name: str, *, json: bool) -> None:
    """A saved clustering or router: what it was made from, and its groups or experts."""
    if json:
        out.document("show", name=name, record=document)
        return
    if "router" in document:
        options = {"router": document["router"], **document.get("options", {})}
        what = ", ".join(f"{k} {v}" for k, v in options.items() if isinstance(v, str | int | float))
        out.line(f"{name}: {what}, {out.count(len(document['experts']), 'expert')}")
        for expert, digest in document["experts"].items():
            out.line(f"  {out.short(digest)}  {expert}")
        return
    from .cluster_view import paragraph, print_clusters

    what = ", ".join(
        f"{key} {document[key]}" for key in ("method", "k", "seed", "features") if key in document
    )
    why = f" ({document['why']})" if document.get("why") else ""
    fit = document.get("silhouette")
    fit = f", silhouette {fit:.3f}" if fit is not None else ""
    paragraph(f"{name}: {what}{why}, {out.count(len(document['experts']), 'expert')}{fit}")
    print_clusters(
        document.get("clusters", {}), document.get("outliers", []), document.get("labels", {})
    )


def _has_steps(trained: Any) -> bool:
    """Whether a card's word about a gate is what training writes."""
    return isinstance(trained, dict) and isinstance(trained.get("steps"), int)


def _lines(key: str, value: Any) -> list[str]:
    """A card's field as a line or, for a small table of values, a few."""
    if key == "peft":
        return ["peft     imported from a PEFT adapter; its config is kept (--json shows it)"]
    if isinstance(value, dict):
        parts = [f"{k} {v}" for k, v in value.items() if not isinstance(v, dict | list)]
        return [f"{key[:SHOWN]:<8} {out.cut(', '.join(parts), SHOWN)}"] if parts else []
    text = value if isinstance(value, str) else json_module.dumps(value)
    return [f"{key[:SHOWN]:<8} {out.cut(text, SHOWN)}"] if value is not None else []


def _groups(modules: dict[str, Any]) -> list[list[str]]:
    """Modules that differ in the layer's number only, as one row."""
    groups: dict[tuple[str, ...], int] = {}
    for name, module in modules.items():
        what = (
            re.sub(r"\.\d+\.", ".*.", name),
            f"{module.shape[0]} x {module.shape[1]}",
            str(module.rank or (f"{module.block}x{module.block}" if module.block != 1 else "")),
            f"{module.scale:g}" if module.scale is not None else "",
        )
        groups[what] = groups.get(what, 0) + 1
    return [[what[0], str(count), *what[1:]] for what, count in groups.items()]
