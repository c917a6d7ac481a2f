"""One routing as a picture in the terminal: a token strip, a map of layers by experts, and what
changes without the top expert."""

from collections.abc import Mapping, Sequence
from typing import Any

from . import out

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
SHADES = " ░▒▓█"
ASCII_SHADES = " .:+#"
MOVED = 5  # experts that are shown to take the weight of another
LONGEST = 40  # characters of a name


def print_explanation(details: Mapping[str, Any]) -> None:
    """Print the strip and the map. Colours name the experts in the key below the strip; without
    colour, the same key gives each a letter."""
    layers = details["layers"]
    totals: dict[str, float] = {}
    for layer in layers:
        for entry in layer["experts"]:
            totals[entry["name"]] = totals.get(entry["name"], 0.0) + entry["weight"] / len(layers)
    ranked = sorted(totals, key=lambda name: (-totals[name], name))[: len(COLOURS)]
    _print_tokens(details["tokens"], ranked)
    _print_figures(details)
    _print_layers(layers, ranked)


def _print_tokens(tokens: Sequence[Mapping[str, Any]], ranked: Sequence[str]) -> None:
    from rich.text import Text

    style = dict(zip(ranked, COLOURS, strict=False))
    console = out.console()
    console.print()
    console.print(Text("Tokens, by the expert with the most weight over all layers", style="bold"))
    strip, marks = Text(), Text()
    for token in tokens:
        name = token["expert"]
        piece = out.plain(_lines(token["token"]))
        strip.append(piece, style=f"reverse {style.get(name, 'dim')}")
        marks.append(f"{piece}[{_letter(ranked, name)}]")
    console.print(strip if console.color_system else marks)
    for name in ranked:
        text = Text(f"  {_letter(ranked, name)} ", style="bold")
        console.print(text.append(out.plain(name), style=f"reverse {style[name]}"))
    if any(token["expert"] not in style for token in tokens):
        alone = any(token["expert"] is None for token in tokens)
        console.print(Text(f"  - another{', or the base alone' * alone}", style="dim"))


def _print_figures(details: Mapping[str, Any]) -> None:
    """Entropy and agreement in words."""
    tokens, bits = details["tokens"], details["entropy"]
    out.line()
    alike = out.count(round(2 ** bits["whole"]), "expert")
    out.line(f"Entropy {bits['whole']:.1f} bits, that of {alike} with equal weight;")
    out.line(f"of a token {bits['token']:.1f}, of a choice at one module {bits['choice']:.1f}")
    held = [token for token in tokens if token["expert"] is not None]
    if len(held) > 1:
        sure, unsure = (f(held, key=lambda token: token["entropy"]) for f in (min, max))
        if unsure["entropy"] - sure["entropy"] > 0.05:
            out.line(
                f"Surest at {_quoted(out.cut(sure['token'], 15))} ({sure['entropy']:.1f} bits), "
                f"least sure at {_quoted(out.cut(unsure['token'], 15))} ({unsure['entropy']:.1f})"
            )
    if details["agreement"] is not None:
        share = f"{details['agreement']:.0%}"
        out.line(f"Two layers have the same top expert for {share} of the tokens, on average")


def _print_layers(layers: Sequence[Mapping[str, Any]], ranked: Sequence[str]) -> None:
    from rich.text import Text

    console = out.console()
    console.print()
    console.print(Text("Share of the routing weight, by layer", style="bold"))
    shades = SHADES if out.unicode() else ASCII_SHADES
    peak = max((e["weight"] for layer in layers for e in layer["experts"]), default=1.0)
    labels = [out.cut(out.plain(str(layer["layer"])), 12) for layer in layers]
    width = max(5, *map(len, labels))
    head = " ".join(f"{_letter(ranked, name):^4}" for name in ranked)
    head = f"  {'layer':<{width}}  {head}  same  bits  most weight"
    console.print(Text(head, style="bold"), no_wrap=True, crop=True)
    room = 80 - len(head) + len("most weight")
    for label, layer in zip(labels, layers, strict=True):
        weights = {entry["name"]: entry["weight"] for entry in layer["experts"]}
        row = Text(f"  {label:<{width}}  ")
        for name, colour in zip(ranked, COLOURS, strict=False):
            weight = weights.get(name, 0.0)
            shade = shades[min(len(shades) - 1, round(weight / peak * (len(shades) - 1)))]
            row.append(shade * 4 + " ", style=colour)
        same = "" if layer["agreement"] is None else f"{layer['agreement']:.0%}"
        row.append(f" {same:>4}  {layer['entropy']:>4.1f}  ")
        for top in layer["experts"][:1]:
            row.append(f"{out.plain(out.cut(top['name'], room - 5))} {top['weight']:.0%}")
        console.print(row, no_wrap=True, crop=True)
    console.print(
        Text("  same: tokens with the same top expert in another layer, on average", style="dim")
    )


def print_without(changed: Mapping[str, Any] | None, answered: str | None) -> None:
    """Print who takes the weight of the top expert, and what the model says then."""
    from rich.text import Text

    if changed is None:
        return
    console = out.console()
    console.print()
    name, share = out.plain(out.cut(changed["expert"], LONGEST)), changed["share"]
    console.print(Text(f"Without {name} ({share:.1%})", style="bold"))
    gains = [entry for entry in changed["shares"] if entry["after"] > entry["before"]]
    shown = gains[:MOVED]
    width = min(LONGEST, max((len(entry["name"]) for entry in shown), default=0))
    most = max((entry["after"] - entry["before"] for entry in shown), default=1.0)
    for entry in shown:
        gain = entry["after"] - entry["before"]
        bar = out.bar(gain / most, 80 - width - 33)
        name = f"{out.cut(entry['name'], width):<{width}}"
        out.line(f"  {name}  {entry['before']:6.1%} -> {entry['after']:6.1%}  {gain:+6.1%}  {bar}")
    if rest := len(gains) - len(shown):
        gain = sum(entry["after"] - entry["before"] for entry in gains[MOVED:])
        out.line(f"  {f'{rest} others':<{width}}  {'':16}  {gain:+6.1%}")
    if not any(entry["after"] for entry in changed["shares"]):
        out.line("  the base answers alone")
    before, after, kl = (changed["next"][key] for key in ("before", "after", "kl"))
    if before["token"] == after["token"]:
        said = f"still {_likely(before)}, then {after['probability'] or 0:.0%}"
    else:
        said = f"{_likely(before)}, then {_likely(after)}"
    out.line(f"  next token {said}")
    if kl is not None:
        out.line(f"  its distribution moves by {kl:.2g} bits (KL)")
    if "text" in changed:
        same = " (the same)" if changed["text"] == answered else ""
        out.line(f"  answer {_quoted(changed['text'])}{same}")


def _likely(token: Mapping[str, Any]) -> str:
    return f"{_quoted(out.cut(token['token'], 24))} {token['probability'] or 0:.0%}"


def _quoted(text: str) -> str:
    """With its spaces and line breaks to be seen."""
    return f'"{_lines(text)}"'


def _lines(text: str) -> str:
    return text.replace("\n", "\u23ce" if out.unicode() else "\\n")


def _letter(ranked: Sequence[str], name: str | None) -> str:
    return chr(ord("a") + ranked.index(name)) if name in ranked else "-"
