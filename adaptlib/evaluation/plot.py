"""An evaluation as a figure: routers with intervals, between the base and the oracle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from adaptlib.figures import COLOURS, DPI, FAINT, GROUND, INK, save_figure

LINES = {"base": COLOURS[7], "oracle": COLOURS[2]}
LONGEST = 32  # characters of a router's name


def draw(path: str | Path, document: Mapping[str, Any]) -> Path:
    """Draw the document of an evaluation (`compare`) as .svg or .png: for each metric a panel, with
    a router a line, its mean over tasks with the interval, and each task as a small dot."""
    return save_figure(lambda: _draw(document), path)


def _draw(document: Mapping[str, Any]) -> Figure:
    metrics = list(dict.fromkeys(row["metric"] for row in document["routers"]))
    count = len({row["router"] for row in document["routers"]})
    size = (1.5 + 6.0 * len(metrics), 1.5 + 0.42 * count)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for axes, metric in zip(
        figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True
    ):
        _panel(axes, document, metric)
    return figure


def _panel(axes: Axes, document: Mapping[str, Any], metric: str) -> None:
    rows = [row for row in document["routers"] if row["metric"] == metric]
    rows.sort(key=lambda row: row["value"], reverse=metric == "loss")
    for y, row in enumerate(rows):
        colour = LINES.get(row["router"], COLOURS[0])
        tasks = [
            result["value"]
            for result in document["results"]
            if (result["router"], result["metric"]) == (row["router"], metric)
        ]
        axes.plot(
            tasks, [y - 0.22] * len(tasks), "o", color=colour, alpha=0.35, markersize=3.5, mew=0
        )
        axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=2, alpha=0.8)
        axes.plot([row["value"]], [y], "o", color=colour, markersize=7, zorder=3)
        axes.annotate(
            f"{row['value']:.3f}", (row["value"], y), (0, 7), textcoords="offset points",
            ha="center", fontsize=8, color=INK,
        )  # fmt: skip
        if row["router"] in LINES:
            axes.axvline(row["value"], color=colour, linewidth=0.8, linestyle=(0, (4, 3)))
    names = [row["router"] for row in rows]
    cut = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in names]
    axes.set_yticks(range(len(rows)), cut, parse_math=False)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    if metric != "loss":
        axes.set_xlim(-0.03, 1.03)
    axes.set_facecolor(GROUND)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#d0d0d0")
    axes.tick_params(colors=FAINT, labelsize=9, length=0)
    tasks = max(row["tasks"] for row in rows)
    axes.set_title(
        f"{metric.replace('_', ' ')}, mean over {tasks} task{'s' * (tasks != 1)}, 95% interval",
        loc="left", fontsize=10, color=INK,
    )  # fmt: skip
    axes.set_xlabel("small dots are tasks", color=FAINT, fontsize=8)
