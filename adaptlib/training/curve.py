"""The loss curve of a training run, as a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from adaptlib.figures import COLOURS, DPI, FAINT, GROUND, INK, save_figure

MEMORY = 0.02  # of all steps: how far back the smoothed line looks


def plot_curve(path: str | Path, points: Sequence[Mapping[str, Any]], *, title: str = "") -> Path:
    """Draw a run's losses by step as .svg or .png.

    A point is `{"step", "loss"}`, with `valid_loss` too where an epoch ends: the lines of
    `train --log`. Losses are in nats per answer token.
    """
    return save_figure(lambda: _draw(points, title), path)


def _draw(points: Sequence[Mapping[str, Any]], title: str) -> Figure:
    figure = Figure(figsize=(8.0, 4.5), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor(GROUND)
    steps = np.array([point["step"] for point in points], dtype=float)
    losses = np.array([point["loss"] for point in points], dtype=float)
    axes.plot(steps, losses, color=COLOURS[5], linewidth=0.8, alpha=0.6, label="train, each step")
    axes.plot(steps, smoothed(losses), color=COLOURS[0], linewidth=1.8, label="train, smoothed")
    ends = [(p["step"], p["valid_loss"]) for p in points if p.get("valid_loss") is not None]
    if ends:
        best = min(loss for _, loss in ends)
        axes.plot(
            *zip(*ends, strict=True),
            color=COLOURS[1],
            linewidth=1.2,
            marker="o",
            markersize=5,
            label=f"valid, each epoch (best {best:.3f})",
        )
    axes.set_xlabel("step", color=FAINT)
    axes.set_ylabel("loss (nats per answer token)", color=FAINT)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color("#d0d0d0")
    axes.tick_params(colors=FAINT, labelsize=9)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    if title:
        axes.set_title(title, loc="left", fontsize=11, color=INK, parse_math=False)
    return figure


def smoothed(losses: Float[np.ndarray, " step"]) -> Float[np.ndarray, " step"]:
    """An exponential moving average without a bias to its start (as Adam's moments have it)."""
    keep = 1 - 1 / max(1.0, MEMORY * len(losses))
    mean, weight, out = 0.0, 0.0, np.empty_like(losses)
    for i, loss in enumerate(losses):
        mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
        out[i] = mean / weight
    return out
