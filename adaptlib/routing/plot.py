"""A picture of one routing: the tokens in the colours of their experts, and layers by experts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from adaptlib.figures import COLOURS, DPI, FAINT, GROUND, INK, save_figure

SHOWN = 12  # experts with a column of their own in the map
WIDTH = 10.0  # inches
ROW = 0.32  # inches a line of tokens or a layer takes


def plot_routing(
    path: str | Path, tokens: Sequence[Mapping[str, Any]], layers: Sequence[Mapping[str, Any]]
) -> Path:
    """Draw a routing as .svg or .png.

    `tokens` is `{"token", "expert", "weight"}` in order, `layers` is `{"layer", "experts":
    [{"name", "weight"}, ...]}` in order: what `route --explain --json` prints.
    """
    return save_figure(lambda: _draw(tokens, layers), path)


def _draw(tokens: Sequence[Mapping[str, Any]], layers: Sequence[Mapping[str, Any]]) -> Figure:
    totals: dict[str, float] = {}
    for layer in layers:
        for entry in layer["experts"]:
            totals[entry["name"]] = totals.get(entry["name"], 0.0) + entry["weight"]
    ranked = sorted(totals, key=lambda name: (-totals[name], name))[:SHOWN]
    colour: dict[str | None, str] = {
        name: COLOURS[i] for i, name in enumerate(ranked[: len(COLOURS)])
    }
    lines = _lines(tokens)
    heights = [ROW * len(lines) + 0.25, ROW * len(layers)]
    total = sum(heights) + 2.4
    figure = Figure(figsize=(WIDTH, total), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)

    strip = figure.add_axes((0.03, 1 - (0.45 + heights[0]) / total, 0.94, heights[0] / total))
    strip.set(xlim=(0, WIDTH * 0.94), ylim=(len(lines), 0))
    strip.axis("off")
    strip.set_title(
        "Each token in the colour of the expert with the most weight",
        loc="left",
        fontsize=11,
        color=INK,
    )
    for row, line in enumerate(lines):
        for x, text, expert in line:
            strip.text(
                x,
                row + 0.5,
                text,
                va="center",
                family="monospace",
                fontsize=9,
                color="white" if expert in colour else INK,
                parse_math=False,
                bbox={
                    "facecolor": colour.get(expert, "#dddddd"),
                    "edgecolor": "none",
                    "boxstyle": "square,pad=0.15",
                },
            )

    if not ranked:  # the base answered alone
        return figure
    grid = figure.add_axes((0.08, 1.5 / total, 0.84, heights[1] / total))
    weights = [
        [{e["name"]: e["weight"] for e in layer["experts"]}.get(name, 0.0) for name in ranked]
        for layer in layers
    ]
    image = grid.imshow(weights, aspect="auto", cmap="Blues", vmin=0.0)
    grid.set_title(
        "Share of the routing weight, by layer and expert", loc="left", fontsize=11, color=INK
    )
    grid.set_facecolor(GROUND)
    grid.set_yticks(range(len(layers)), [str(layer["layer"]) for layer in layers], fontsize=8)
    grid.set_ylabel("layer", fontsize=9, color=FAINT)
    grid.set_xticks(range(len(ranked)), ranked, rotation=35, ha="right", fontsize=8)
    for label, name in zip(grid.get_xticklabels(), ranked, strict=True):
        label.set_color(colour.get(name, INK))
        label.set_parse_math(False)
    peak = max((max(row) for row in weights if row), default=0.0)
    for y, row in enumerate(weights):
        for x, weight in enumerate(row):
            if weight >= 0.005:
                shade = "white" if weight > 0.6 * peak else INK
                grid.text(x, y, f"{weight:.0%}", ha="center", va="center", fontsize=7, color=shade)
    for spine in grid.spines.values():
        spine.set_color("#d0d0d0")
    figure.colorbar(image, cax=figure.add_axes((0.935, 1.5 / total, 0.012, heights[1] / total)))
    return figure


def _lines(
    tokens: Sequence[Mapping[str, Any]],
) -> list[list[tuple[float, str, str | None]]]:
    """Tokens set in lines: (x in inches, text, expert) for each."""
    cell, gap = 0.0765, 0.09  # inches: a monospaced character of 9 points, and between two boxes
    lines: list[list[tuple[float, str, str | None]]] = [[]]
    x = 0.0
    for token in tokens:
        text = token["token"].replace("\n", "⏎").replace("\t", "⇥")
        text = text.strip(" ") or "␣"
        width = cell * len(text) + gap
        if x + width > WIDTH * 0.93 and lines[-1]:
            lines.append([])
            x = 0.0
        lines[-1].append((x, text, token["expert"]))
        x += width
    return lines
