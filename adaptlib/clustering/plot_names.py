"""Names beside points, none over another."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from adaptlib.clustering.plot_style import shortened
from adaptlib.figures import DPI, GROUND, INK

GAP = 4  # pixels between names
ANGLES = np.deg2rad([0, 180, 90, 270, 45, 135, 315, 225, 22, 158, 338, 202, 68, 112, 292, 248])
RADII = (7, 13, 20, 28, 37, 47, 58, 70, 84, 100, 120, 145, 175, 210, 250)  # points (1/72 inch)


def write_names(
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
            shortened(names[i]),
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
