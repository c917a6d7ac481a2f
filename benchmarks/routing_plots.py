"""Plots of benchmarks/routing.py: cost against experts and against tokens, both axes logarithmic."""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from adaptlib.figures import COLOURS, DPI, FAINT, GROUND, INK, save_figure

OURS, THEIRS, LEAST, WIDE = COLOURS[0], COLOURS[1], COLOURS[7], COLOURS[2]


def slope(values: Mapping[int, float], least: int = 1) -> str:
    """Least squares of log value over log key, for keys from `least`; `-` for fewer than two."""
    points = [(math.log(k), math.log(v)) for k, v in values.items() if k >= least]
    if len(points) < 2:
        return "-"
    xs, ys = zip(*points, strict=True)
    return f"{statistics.linear_regression(xs, ys).slope:.2f}"


def plot_experts(
    figures: Mapping[str, Any], floors: Mapping[str, Mapping[int, float]], path: Path
) -> Path:
    """Prefill and decode side by side: adaptlib, PEFT, the base, the floor."""

    def draw() -> Figure:
        figure, panels = _figure(2)
        for axes, (what, title) in zip(
            panels, (("prefill", "Prefill"), ("decode", "One token more")), strict=True
        ):
            rows = figures[what]
            base = 1e3 * statistics.median(rows["base"]["seconds"])
            axes.axhline(base, color=FAINT, linewidth=1.2, linestyle="--")
            axes.annotate("base", (1, base), (0, -11), textcoords="offset points", color=FAINT)
            ours = _series(rows, "adaptlib", " experts")
            _line(axes, ours, f"adaptlib, slope {_from(ours, 64)}", OURS)
            many = _series(rows, "adaptlib", " rank 1")
            if many:
                _line(axes, many, "adaptlib, experts of rank 1", WIDE)
            theirs = _series(rows, "PEFT Arrow", " experts")
            if theirs:
                _line(axes, theirs, f"PEFT Arrow, slope {_from(theirs, 1)}", THEIRS)
            least = {count: [1e3 * value] * 3 for count, value in floors[what].items()}
            _line(axes, least, "floor", LEAST, style=":")
            _axes(axes, title, "experts")
        return figure

    return save_figure(draw, path)


def plot_tokens(figures: Mapping[str, Any], path: Path) -> Path:
    """A prefill against its tokens."""

    def draw() -> Figure:
        figure, (axes,) = _figure(1)
        colours = {"base": FAINT}
        colours |= dict(zip(figures["tokens"], [FAINT, OURS, WIDE, COLOURS[3]], strict=False))
        for name, row in figures["tokens"].items():
            points = {int(tok): _quartiles(seconds) for tok, seconds in row.items()}
            colour = THEIRS if name.startswith("PEFT") else colours[name]
            style = "--" if name == "base" else "-"
            _line(axes, points, f"{name}, slope {_from(points, 16)}", colour, style=style)
        _axes(axes, "Prefill", "tokens")
        return figure

    return save_figure(draw, path)


def _series(rows: Mapping[str, Any], start: str, end: str) -> dict[int, list[float]]:
    """Quartiles in ms by number of experts."""
    return {
        row["experts"]: _quartiles(row["seconds"])
        for name, row in rows.items()
        if name.startswith(start) and name.endswith(end)
    }


def _quartiles(seconds: list[float]) -> list[float]:
    if len(seconds) < 2:
        return [1e3 * seconds[0]] * 3
    return [1e3 * value for value in statistics.quantiles(seconds, n=4, method="inclusive")]


def _from(points: Mapping[int, list[float]], least: int) -> str:
    value = slope({key: middle for key, (_, middle, _) in points.items()}, least)
    return value + (f" from {least}" if least > 1 else "")


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.2 * panels, 4.0), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, panels, i + 1) for i in range(panels)]


def _line(
    axes: Axes, points: Mapping[int, list[float]], label: str, colour: str, style: str = "-"
) -> None:
    """Medians, with the quartiles as a band."""
    xs = sorted(points)
    low, middle, high = zip(*(points[x] for x in xs), strict=True)
    marker = "" if style == ":" else "o"
    axes.plot(xs, middle, style, marker=marker, markersize=4, color=colour, label=label)
    axes.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)


def _axes(axes: Axes, title: str, counted: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set(xscale="log", yscale="log", facecolor=GROUND)
    axes.set_xlabel(counted, fontsize=9, color=FAINT)
    axes.set_ylabel("ms", fontsize=9, color=FAINT)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_locator(NullLocator())
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    for spine in axes.spines.values():
        spine.set_color("#d0d0d0")
