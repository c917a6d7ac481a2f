"""A map of the experts, coloured by group."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from sklearn.manifold import smacof

from adaptlib.clustering.mbc import Clustering
from adaptlib.figures import COLOURS, DPI, GROUND, INK, save_figure

SIZE = (10.0, 7.0)  # inches
LONGEST = 32  # characters of a name
# marker -> its size in points, so that all look equally large; they part what shares a colour
MARKERS = {"o": 7, "s": 6.5, "^": 8, "D": 6, "v": 8, "P": 8.5, "X": 8, "p": 8}
GAP = 4  # pixels between names
LEGEND_ROWS = 26
ANGLES = np.deg2rad([0, 180, 90, 270, 45, 135, 315, 225, 22, 158, 338, 202, 68, 112, 292, 248])
RADII = (7, 13, 20, 28, 37, 47, 58, 70, 84, 100, 120, 145, 175, 210, 250)  # points (1/72 inch)


def plot_map(clustering: Clustering, path: str | Path) -> Path:
    """Draw the experts on a plane, the alike ones close together, coloured by group; SVG or PNG.

    Distances on the map follow sqrt(2 - 2 cos) as far as a plane allows (metric scaling by SMACOF,
    from the principal axes). The same clustering gives the same bytes. A name for which there is no
    room is left out, and the number of those is written below. Raises UsageError unless `path` ends
    in .svg or .png, and NotFoundError where its directory is not there.
    """
    return save_figure(lambda: _draw(clustering), path)


def plane(
    similarity: Float[np.ndarray, "expert expert"],
) -> Float[np.ndarray, "expert 2"]:
    """Points whose distances follow sqrt(2 - 2 cos), by SMACOF (de Leeuw 1977), scikit-learn's.

    It starts from the two principal axes. Those alone would put several of many equally unlike
    groups on one spot; a random start would draw another map each time.
    """
    wanted = np.sqrt(np.clip(2 - 2 * similarity, 0, None))
    np.fill_diagonal(wanted, 0)
    centre = np.eye(len(wanted)) - 1 / len(wanted)
    values, vectors = np.linalg.eigh(-0.5 * centre @ wanted**2 @ centre)
    axes = vectors[:, ::-1][:, :2] * np.sqrt(np.clip(values[::-1][:2], 0, None))
    points = np.zeros((len(wanted), 2))
    points[:, : axes.shape[1]] = axes
    if points.any():
        found: Any = smacof(wanted, init=points, n_init=1, max_iter=500)
        points = found[0]
    largest = np.abs(points).argmax(axis=0)
    return points * np.where(points[largest, [0, 1]] < 0, -1.0, 1.0)


def _draw(clustering: Clustering) -> Figure:
    figure = Figure(figsize=SIZE, dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    columns = -(-len(clustering.clusters) // LEGEND_ROWS)
    axes = figure.add_axes((0.03, 0.075, 0.95 - 0.115 * columns, 0.865))
    points = plane(clustering.similarity)
    middle = (points.max(axis=0) + points.min(axis=0)) / 2
    # One scale for both axes, so that distances can be read in every direction.
    reach = max(float(np.ptp(points, axis=0).max()) / 2, 0.05) * 1.25
    width, height = axes.bbox.width, axes.bbox.height
    stretch = width / height
    axes.set_xlim(middle[0] - reach * stretch, middle[0] + reach * stretch)
    axes.set_ylim(middle[1] - reach, middle[1] + reach)
    axes.set(xticks=[], yticks=[], facecolor=GROUND)
    for spine in axes.spines.values():
        spine.set_color("#d0d0d0")
    row_of = {name: i for i, name in enumerate(clustering.names)}
    colour_of = [""] * len(points)
    for i, (label, names) in enumerate(clustering.clusters.items()):
        rows = [row_of[name] for name in names]
        colour = COLOURS[i % len(COLOURS)]
        marker = list(MARKERS)[(i + i // len(COLOURS)) % len(MARKERS)]
        for row in rows:
            colour_of[row] = colour
        axes.plot(
            *points[rows].T,
            linestyle="none",
            marker=marker,
            markersize=MARKERS[marker],
            color=colour,
            markeredgecolor="white",
            markeredgewidth=0.5,
            label=f"{label}  ({len(names)})",
            zorder=3,
        )
    figure.legend(
        *axes.get_legend_handles_labels(),
        title="group  (experts)",
        loc="upper right",
        bbox_to_anchor=(0.992, 0.95),
        ncols=columns,
        frameon=False,
        fontsize=9,
        title_fontsize=9,
        labelcolor=INK,
        columnspacing=1.0,
        handletextpad=0.2,
    )
    canvas.draw()
    left_out = _label(axes, points, clustering.names, colour_of)
    fit = "" if clustering.silhouette is None else f", silhouette {clustering.silhouette:.2f}"
    title = (
        f"{len(points)} expert{'s' * (len(points) != 1)} in {clustering.k} "
        f"group{'s' * (clustering.k != 1)} by {clustering.method}{fit}"
    )
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    note = f"close together = alike; compared: {clustering.basis}"
    if left_out:
        note += f"; no room for {left_out} of {len(points)} names"
    figure.text(0.03, 0.035, note, fontsize=8.5, color="#666666", parse_math=False)
    return figure


def _label(
    axes: Axes,
    points: Float[np.ndarray, "expert 2"],
    names: Sequence[str],
    colours: Sequence[str],
) -> int:
    """Write each name at the nearest free spot around its point; returns how many found none.

    Crowded points choose first: they have the fewest spots. A name away from its point is tied to
    it by a thin line.
    """
    scale = DPI / 72
    places = axes.transData.transform(points)
    frame = axes.bbox.padded(-3)
    gaps = np.linalg.norm(places[:, None] - places[None], axis=2)
    crowding = (gaps < 90 * scale).sum(axis=1)
    dots = [Bbox.from_extents(*(p - 4.5 * scale), *(p + 4.5 * scale)) for p in places]
    taken: list[Bbox] = []
    left_out = 0
    for i in sorted(range(len(names)), key=lambda i: (-crowding[i], names[i])):
        text = axes.text(
            0,
            0,
            _shortened(names[i]),
            fontsize=8,
            color=INK,
            zorder=5,
            bbox={"facecolor": GROUND, "edgecolor": "none", "pad": 0},  # lines pass behind names
            parse_math=False,
        )
        size = text.get_window_extent()
        spot = _spot(places[i], (size.width + GAP, size.height), scale, frame, [*dots, *taken])
        if spot is None:
            text.remove()
            left_out += 1
            continue
        box, radius = spot
        taken.append(box)
        text.set(ha="left", va="bottom")
        x, y = axes.transData.inverted().transform((box.x0 + GAP / 2, box.y0))
        text.set_position((float(x), float(y)))
        if radius > RADII[0]:
            end = np.clip(places[i], (box.x0, box.y0), (box.x1, box.y1))
            line = axes.transData.inverted().transform([places[i], end])
            axes.plot(*line.T, color=colours[i], linewidth=0.6, alpha=0.6, zorder=2)
    return left_out


def _shortened(name: str) -> str:
    """Its two ends: the tail of a name tells experts apart as often as the head."""
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST // 2 - 1]}…{name[-(LONGEST // 2) :]}"


def _spot(
    point: Float[np.ndarray, " 2"],
    size: tuple[float, float],
    scale: float,
    frame: Bbox,
    taken: Sequence[Bbox],
) -> tuple[Bbox, int] | None:
    """The nearest box of this size (pixels) around a point that is in the frame and meets no other,
    with its radius in points."""
    width, height = size
    corners = np.array([(b.x0, b.y0, b.x1, b.y1) for b in taken])
    for radius in RADII:
        for angle in ANGLES:
            x, y = point + radius * scale * np.array([np.cos(angle), np.sin(angle)])
            # The side of the box that faces the point is what the radius is measured to.
            x0 = x - width * (1 - np.cos(angle)) / 2
            y0 = y - height * (1 - np.sin(angle)) / 2
            box = Bbox.from_extents(x0, y0, x0 + width, y0 + height)
            inside = frame.x0 <= x0 and x0 + width <= frame.x1
            inside = inside and frame.y0 <= y0 and y0 + height <= frame.y1
            meets = (
                (corners[:, 0] < x0 + width)
                & (corners[:, 2] > x0)
                & (corners[:, 1] < y0 + height)
                & (corners[:, 3] > y0)
            )
            if inside and not meets.any():
                return box, radius
    return None
