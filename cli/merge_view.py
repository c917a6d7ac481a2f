"""What `merge` and `show` say of a merge, at 80 columns."""

import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import out

if TYPE_CHECKING:
    from adaptlib.experts.codec import Manifest
    from adaptlib.experts.recipe import Recipe
    from adaptlib.merging.estimate import Estimate
    from adaptlib.merging.merge import Merge

SHOWN = 12  # parents, of many


def meter(what: str, *, quiet: bool) -> Callable[[int, int, str], None]:
    """What to call after each module: a line on a terminal, nothing elsewhere."""
    last = 0.0

    def progress(done: int, count: int, module: str) -> None:
        nonlocal last
        if quiet or not sys.stderr.isatty():
            return
        if done < count and time.monotonic() - last < 0.1:
            return
        last = time.monotonic()
        text = f"{what}  {done:,} of {count:,} modules  {module}" if done < count else ""
        sys.stderr.write(f"\r{out.plain(text)[:78]:<78}\r")
        sys.stderr.flush()

    return progress


def recipe_lines(card: Mapping[str, Any]) -> list[str]:
    """The recipe in a merged expert's card: method, form, error, parents."""
    about = card["merge"]
    kept = about.get("kept") or {}
    options = "".join(f", {key} {_number(value)}" for key, value in about["options"].items())
    on = ", on factors" if kept.get("on") == "factors" else ""
    lines = [f"method   {about['method']}{options}{on}"]
    asked = [f"{key.replace('_', ' ')} {_number(kept[key])}" for key in ("rank", "keep_ratio")]
    asked = [text for text in asked if not text.endswith("None")]
    form = f" ({', '.join(asked)} was asked for)" if asked else ""
    lines.append(f"kept     {lost(about['error'])}{form}")
    if isinstance(data := about.get("data"), dict):
        lines.append(f"data     {data.get('rows')} rows of each task{_measured(about)}")
    parents = [
        f"{weight:>7.4g}  {out.short(parent['digest'])}  {parent['name']}"
        for parent, weight in zip(card["parents"], about["weights"], strict=False)
    ]
    more = [f"and {len(parents) - SHOWN} others"] if len(parents) > SHOWN else []
    for i, text in enumerate(parents[:SHOWN] + more):
        lines.append(f"{'' if i else 'parents':<8} {text}")
    return lines


def _measured(about: Mapping[str, Any]) -> str:
    """What was found on them, where that is a number."""
    found = about.get("measured")
    pairs = found.items() if isinstance(found, dict) else ()
    said = [f"{key} {_number(value)}" for key, value in pairs if isinstance(value, int | float)]
    return f": {', '.join(said)}" if said else ""


def is_merged(card: Mapping[str, Any]) -> bool:
    """Whether `recipe_lines` can say something of it: a card may come from anybody."""
    about, parents = card.get("merge"), card.get("parents")
    return (
        isinstance(about, dict)
        and {"method", "options", "weights", "error"} <= about.keys()
        and isinstance(about["options"], dict)
        and isinstance(about["error"], int | float)
        and isinstance(about["weights"], list)
        and all(isinstance(weight, int | float) for weight in about["weights"])
        and isinstance(about.get("kept") or {}, dict)
        and isinstance(parents, list)
        and all(
            isinstance(one, dict)
            and isinstance(one.get("name"), str)
            and isinstance(one.get("digest"), str)
            for one in parents
        )
    )


def lost(error: float) -> str:
    """How much of what a method arrived at is not in what was kept."""
    if not error:
        return "exact: nothing is lost by keeping it so"
    return f"{_percent(error)} of the norm is lost by keeping it so"


def _percent(error: float) -> str:
    return f"{error:.1%}" if error >= 0.001 else f"{error:.1e}"


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def say_weights(weights: Sequence[float], names: Sequence[str]) -> str:
    """`each times 0.5`, or each weight with its name."""
    if len(set(weights)) == 1:
        each = "each " if len(weights) > 1 else ""
        return "" if weights[0] == 1 else f", {each}times {weights[0]:.4g}"
    pairs = [f"{w:.4g} {name}" for w, name in zip(weights, names, strict=True)]
    more = f", and {len(pairs) - SHOWN} others" if len(pairs) > SHOWN else ""
    return f": {', '.join(pairs[:SHOWN])}{more}"


def print_merged(
    verb: str,
    kept: tuple[str, str, "Manifest"],
    notes: Sequence[str],
    *,
    json: bool,
    quiet: bool,
) -> None:
    """What was merged and how it is kept: its name, digest and manifest."""
    name, digest, manifest = kept
    card = manifest.card
    about, parents = card["merge"], card["parents"]
    if json:
        out.document(
            "merge",
            name=name,
            digest=digest,
            method=about["method"],
            parents=parents,
            weights=about["weights"],
            options=about["options"],
            kind=manifest.kind,
            base=manifest.base,
            rank=manifest.rank,
            modules=len(manifest.modules),
            params=manifest.params,
            bytes=manifest.blob.size,
            error=about["error"],
            new=verb == "Merged",
            notes=notes,
        )
        return
    for note in notes:
        out.note(f"Note: {note}")
    if quiet:
        out.line(name)
        return
    out.line(f"{verb}  {name}  {out.short(digest)}")
    what = f"{about['method']} of {out.count(len(parents), 'expert')}"
    _filled(what + say_weights(about["weights"], [parent["name"] for parent in parents]))
    _filled(
        form(manifest.kind, manifest.rank, manifest.params, len(manifest.modules))
        + f", {out.size(manifest.blob.size)}"
    )
    _filled(lost(about["error"]))
    again = f"  Next: adaptlib show {name}, adaptlib route --experts {name} --prompt ..."
    out.note(again if len(again) < 80 else f"  Next: adaptlib show {name}")


def form(kind: str, rank: int | None, params: int, modules: int) -> str:
    of_rank = f", rank {rank}" if rank else ""
    return f"{kind}{of_rank}, {params:,} parameters in {out.count(modules, 'module')}"


def print_estimate(name: str, recipe: "Recipe", seen: "Estimate") -> None:
    """What a merge would come to."""
    options = "".join(f", {key} {_number(value)}" for key, value in recipe.options.items())
    tried = out.count(len(seen.tried), "module")
    error = "not known before" if seen.error is None else _percent(seen.error)
    memory = "not known here" if seen.memory is None else f"about {out.size(seen.memory)}"
    parents = list(recipe.parents)
    more = f" and {len(parents) - SHOWN} others" if len(parents) > SHOWN else ""
    lines = {
        "parents": f"{len(parents)}: {', '.join(parents[:SHOWN])}{more}",
        "method": recipe.method + options,
        "kept": f"{form(seen.kind, seen.rank, seen.params, seen.modules)}, {out.size(seen.bytes)}",
        "error": f"{error} in {tried}"
        if seen.error
        else "none: exact"
        if seen.error == 0
        else error,
        "memory": f"{memory} at most, torch included",
    }
    out.line(f"Would merge  {name}")
    for key, text in lines.items():
        _filled(f"{key:<8} {text}", indent=11)


def methods(merges: "Mapping[str, Merge]") -> list[dict[str, Any]]:
    """Each method as plain data."""
    return [
        {
            "name": name,
            "summary": merge.summary,
            "options": dict(merge.options),
            "data": merge.measure is not None,
        }
        for name, merge in merges.items()
    ]


def print_methods(rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        data = "  (learnt from data: --data)" if row["data"] else ""
        out.line(f"{row['name']}{data}")
        _filled(row["summary"], indent=2)
        if row["options"]:
            said = ", ".join(f"{key}={_number(value)}" for key, value in row["options"].items())
            _filled(f"--set {said}", indent=8)


def _filled(text: str, *, indent: int = 4) -> None:
    lines = textwrap.wrap(
        text,
        78,
        initial_indent="  ",
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,  # names have hyphens
    )
    out.line("\n".join(lines))
