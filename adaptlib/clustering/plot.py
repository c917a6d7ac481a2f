"""Pictures of a clustering: a map of the experts, a tree or a heat map, coloured by group."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adaptlib.clustering import plot_style as style
from adaptlib.clustering.mbc import Clustering
from adaptlib.clustering.plot_heat import draw_heat
from adaptlib.clustering.plot_layout import TSNE_MOST, place, sample
from adaptlib.clustering.plot_layout import plane as plane
from adaptlib.clustering.plot_names import write_names
from adaptlib.clustering.plot_tree import draw_tree
from adaptlib.errors import UsageError
from adaptlib.figures import GROUND, INK, save_figure

SIZE = (10.0, 7.0)  # inches
NAMED = 150  # experts up to which each has its name on the map; above, only groups have
PICTURES = ("map", "tree", "heat")


def plot(
    clustering: Clustering,
    path: str | Path,
    *,
    kind: str = "map",
    layout: str = "mds",
    labels: Mapping[str, str] | None = None,
) -> Path:
    """Draw a clustering as SVG or PNG: `map`, `tree` or `heat`.

    `map` is `plot_map`. `tree` is the dendrogram of average linkage on 1 - cos, in the colours of
    the groups; of many experts the lower branches are one leaf each. `heat` shows the cosine of
    each two experts, in the order of the groups. `labels` are words for groups, such as
    `suggest_labels` gives. The same clustering gives the same bytes. Raises what `plot_map` does.
    """
    if kind not in PICTURES:
        raise UsageError(
            f"no picture is called {kind!r}; there are {', '.join(PICTURES)}", hint="map"
        )
    if kind == "map":
        return plot_map(clustering, path, layout=layout, labels=labels)
    draw = draw_tree if kind == "tree" else draw_heat
    return save_figure(lambda: draw(clustering, labels or {}), path)


def plot_map(
    clustering: Clustering,
    path: str | Path,
    *,
    layout: str = "mds",
    labels: Mapping[str, str] | None = None,
) -> Path:
    """Draw the experts on a plane, the alike ones close together, coloured by group; SVG or PNG.

    `layout` is `mds`, `pca` or `tsne`, see `plot_layout.place`; `labels` are words for groups. The
    same clustering gives the same bytes. A name for which there is no room is left out, and the
    number of those is written below; above 150 experts only groups have names. Raises UsageError
    for another layout and unless `path` ends in .svg or .png, and NotFoundError where its directory
    is not there.
    """
    return save_figure(lambda: _draw(clustering, layout, labels or {}), path)


def _draw(clustering: Clustering, layout: str, labels: Mapping[str, str]) -> Figure:
    figure = style.canvas(*SIZE)
    legend = style.legend(figure, clustering, labels)
    groups = style.groups(clustering)
    rows = sample(groups, TSNE_MOST if layout == "tsne" else len(groups))
    points, meaning = place(clustering.unit[rows], layout)
    groups = groups[rows]
    axes = _axes(figure, points, SIZE[0] - legend - 2 * style.MARGIN)
    size = float(np.clip((60 / len(points)) ** 0.35, 0.3, 1))
    for group in [*range(clustering.k), -1]:
        held = points[groups == group]
        mark = style.marker(group)
        axes.plot(
            *held.T,
            linestyle="none",
            marker=mark,
            markersize=style.MARKERS.get(mark, 5) * size,
            color=style.colour(group),
            markeredgecolor="white" if group >= 0 else style.OUTLIER,
            markeredgewidth=0.5 * size if group >= 0 else 1.0,
            alpha=1.0 if len(points) <= 1000 else 0.7,
            zorder=3 if group >= 0 else 2.5,
        )
    figure.canvas.draw()
    part = f"{len(rows):,} of {len(clustering.names):,} experts, evenly from each group"
    notes = [meaning, part if len(rows) < len(clustering.names) else ""]
    if len(points) <= NAMED:
        names = [clustering.names[i] for i in rows]
        left_out = write_names(axes, points, names, [style.colour(g) for g in groups.tolist()])
        notes.append(f"no room for {left_out} of {len(points)} names" if left_out else "")
    else:
        _name_groups(axes, points, groups, list(clustering.clusters), labels)
    style.frame(figure, clustering, *notes)
    return figure


def _axes(figure: Figure, points: Float[np.ndarray, "expert 2"], width: float) -> Axes:
    """A square inch for a square inch: one scale for both axes, so that distances can be read in
    every direction."""
    height = SIZE[1] - 1.05
    axes = figure.add_axes(
        (style.MARGIN / SIZE[0], 0.5 / SIZE[1], width / SIZE[0], height / SIZE[1])
    )
    middle = (points.max(axis=0) + points.min(axis=0)) / 2
    half = np.ptp(points, axis=0) / 2
    stretch = width / height
    reach = max(float(half[1]), float(half[0]) / stretch, 0.05) * 1.15
    axes.set_xlim(middle[0] - reach * stretch, middle[0] + reach * stretch)
    axes.set_ylim(middle[1] - reach, middle[1] + reach)
    axes.set(xticks=[], yticks=[], facecolor=GROUND)
    for spine in axes.spines.values():
        spine.set_color("#d0d0d0")
    return axes


def _name_groups(
    axes: Axes,
    points: Float[np.ndarray, "expert 2"],
    groups: Int[np.ndarray, " expert"],
    names: list[str],
    labels: Mapping[str, str],
) -> None:
    """The name of each group above it, larger ones first, where it meets no other."""
    few = len(names) <= style.LEGEND_ROWS
    frame, taken = axes.bbox.padded(-4), []
    for group, label in enumerate(names):
        held = points[groups == group]
        at = (float(np.median(held[:, 0])), float(np.quantile(held[:, 1], 0.9)))
        text = axes.text(
            *at,
            style.called(label, labels),
            fontsize=8.5 if few else 7.5,
            fontweight="bold" if few else "normal",
            color=INK,
            ha="center",
            va="bottom",
            zorder=5,
            # Not an outline: SVG would have the letters as shapes, and no text to find.
            bbox={"facecolor": GROUND, "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
            parse_math=False,
        )
        for words in (style.called(label, labels), label):  # at last the number alone
            text.set_text(words)
            box = text.get_window_extent()
            over = max(box.x1 - frame.x1, 0) + min(box.x0 - frame.x0, 0)
            x, y = axes.transData.transform(at)
            text.set_x(float(axes.transData.inverted().transform((x - over, y))[0]))
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
        else:
            text.remove()
