"""One routing as a picture in the terminal: a token strip, and a map of layers by experts."""

from typing import Any

from . import out

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
SHADES = " ░▒▓█"
ASCII_SHADES = " .:+#"


def print_explanation(details: dict[str, Any]) -> None:
    """Print the strip and the map. Colours name the experts in the key below the strip; without
    colour, the same key gives each a letter."""
    from rich.text import Text

    tokens, layers = details["tokens"], details["layers"]
    totals: dict[str, float] = {}
    for layer in layers:
        for entry in layer["experts"]:
            totals[entry["name"]] = totals.get(entry["name"], 0.0) + entry["weight"] / len(layers)
    ranked = sorted(totals, key=lambda name: (-totals[name], name))[: len(COLOURS)]
    style = {name: COLOURS[i] for i, name in enumerate(ranked)}
    letter = {name: chr(ord("a") + i) for i, name in enumerate(ranked)}
    console = out.console()
    console.print()
    console.print(Text("Tokens, by the expert with the most weight over all layers", style="bold"))
    strip, marks = Text(), Text()
    plain = not console.color_system
    for token in tokens:
        name = token["expert"]
        piece = token["token"].replace("\n", "\u23ce" if out.unicode() else "\\n")
        piece = out.plain(piece)
        strip.append(piece, style=f"reverse {style.get(name, 'dim')}")
        marks.append(f"{piece}[{letter.get(name, '-')}]")
    console.print(marks if plain else strip)
    for name in ranked:
        console.print(
            Text(f"  {letter[name]} ", style="bold").append(name, style=f"reverse {style[name]}")
        )
    console.print(Text("  - another", style="dim"))
    console.print()
    console.print(Text("Share of the routing weight, by layer", style="bold"))
    shades = SHADES if out.unicode() else ASCII_SHADES
    peak = max((e["weight"] for layer in layers for e in layer["experts"]), default=1.0)
    width = max(len(str(layer["layer"])) for layer in layers)
    head = "  ".join(f"{letter[name]:^4}" for name in ranked)
    console.print(Text(f"  {'layer':<{max(width, 5)}}  {head}", style="bold"))
    for layer in layers:
        weights = {entry["name"]: entry["weight"] for entry in layer["experts"]}
        row = Text(f"  {layer['layer']!s:<{max(width, 5)}}  ")
        for name in ranked:
            weight = weights.get(name, 0.0)
            shade = shades[min(len(shades) - 1, round(weight / peak * (len(shades) - 1)))]
            row.append(shade * 4 + "  ", style=style[name])
        top = layer["experts"][0] if layer["experts"] else None
        if top:
            row.append(f"{top['name']} {top['weight']:.0%}")
        console.print(row)
