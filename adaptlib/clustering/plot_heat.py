"""The heat map: the cosine of each two experts, in the order of the groups."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import leaves_list

from adaptlib.clustering import plot_style as style
from adaptlib.clustering.mbc import Clustering
from adaptlib.clustering.plot_layout import sample
from adaptlib.clustering.similarity import Embedding
from adaptlib.figures import FAINT, INK

WIDTH, SQUARE = 10.0, 6.8  # inches
NAMED = 64  # experts up to which each has its name
MOST = 1000  # experts shown: more are finer than the picture
TOP, BAR, BOTTOM = 0.55, 0.55, 0.5  # inches above, for the scale, and for the note
STRIPE = 0.07  # inches
WORDS = 8.5  # points
# Unlike is white, alike dark blue, opposed orange: told apart by every kind of colour vision.
COLOURS = LinearSegmentedColormap.from_list(
    "cosine",
    [(0, "#d55e00"), (0.5, "#ffffff"), (0.66, "#8fc1de"), (0.85, "#0072b2"), (1, "#00263d")],
)


def draw_heat(clustering: Clustering, labels: Mapping[str, str]) -> Figure:
    """The alike groups side by side, and the alike experts in each; outliers last."""
    groups = style.groups(clustering)
    rows = sample(groups, MOST)
    rows = rows[_order(clustering.unit[rows], groups[rows])]
    groups = groups[rows]
    cosine = np.clip(clustering.unit[rows] @ clustering.unit[rows].T, -1.0, 1.0)
    names = [style.shortened(clustering.names[i]) for i in rows] if len(rows) <= NAMED else []
    words = _words(groups, clustering, labels)
    size = float(np.clip(SQUARE * 72 / len(rows) * 0.75, 6, 8.5))
    left = style.MARGIN + STRIPE + 0.08 + (style.widest(names, size) + 0.1 if names else 0)
    right = style.MARGIN + 0.15 + style.widest(words.values(), WORDS, "bold")
    square = min(SQUARE, WIDTH - left - right)
    height = TOP + square + BAR + BOTTOM
    figure = style.canvas(WIDTH, height)
    axes = figure.add_axes((left / WIDTH, (BOTTOM + BAR) / height, square / WIDTH, square / height))
    most = _most(cosine)
    image = axes.imshow(cosine, cmap=COLOURS, vmin=-most, vmax=most, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color("#d0d0d0")
    if names:
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0, pad=10, labelsize=size, labelcolor=INK)
        for tick in axes.get_yticklabels():
            tick.set_parse_math(False)
    left_out = _mark_groups(axes, groups, words, inch=square / len(rows))
    bar = figure.add_axes((left / WIDTH, (BOTTOM + 0.3) / height, 2.4 / WIDTH, 0.1 / height))
    scale = figure.colorbar(
        image, cax=bar, orientation="horizontal", extend="both", ticks=MaxNLocator(5)
    )
    scale.outline.set_visible(False)
    bar.tick_params(labelsize=8, colors=FAINT, length=2)
    bar.text(1.08, 0.5, "cosine", va="center", fontsize=8, color=FAINT, transform=bar.transAxes)
    style.frame(
        figure,
        clustering,
        f"{len(rows):,} of {len(clustering.names):,} experts, evenly from each group"
        if len(rows) < len(clustering.names)
        else "",
        f"no room for the names of {left_out} groups" if left_out else "",
    )
    return figure


def _most(cosine: Float[np.ndarray, "expert expert"]) -> float:
    """The cosine that is darkest: that of the most alike but for a fiftieth, since a scale up to
    the diagonal's 1 would leave all else white."""
    apart = np.abs(cosine[~np.eye(len(cosine), dtype=bool)])
    if not len(apart):
        return 1.0
    return float(np.clip(np.ceil(np.quantile(apart, 0.98) * 20) / 20, 0.1, 1.0))


def _order(
    unit: Float[np.ndarray, "expert component"], groups: Int[np.ndarray, " expert"]
) -> Int[np.ndarray, " expert"]:
    """Alike groups side by side and alike experts in each, as the leaves of a tree; outliers
    last."""
    rows = [np.flatnonzero(groups == group) for group in np.unique(groups[groups >= 0])]
    middle = np.array([unit[held].mean(axis=0) for held in rows]).reshape(len(rows), unit.shape[1])
    lengths = np.linalg.norm(middle, axis=1, keepdims=True)
    leaves = _leaves(middle / np.where(lengths == 0, 1.0, lengths))
    found = [rows[i] for i in leaves] + [np.flatnonzero(groups < 0)]
    return np.concatenate([held[_leaves(unit[held])] for held in found])


def _leaves(unit: Float[np.ndarray, "row component"]) -> Int[np.ndarray, " row"]:
    if len(unit) < 3:
        return np.arange(len(unit))
    return leaves_list(Embedding.of(("",) * len(unit), unit).tree).astype(np.int64)


def _words(
    groups: Int[np.ndarray, " expert"], clustering: Clustering, labels: Mapping[str, str]
) -> dict[int, str]:
    """What each group is called, with the number of its experts."""
    found = {
        i: f"{style.called(label, labels)}  ({len(names):,})"
        for i, (label, names) in enumerate(clustering.clusters.items())
    }
    return found | ({-1: f"outliers  ({len(clustering.outliers)})"} if (groups < 0).any() else {})


def _mark_groups(
    axes: Axes, groups: Int[np.ndarray, " expert"], words: Mapping[int, str], *, inch: float
) -> int:
    """A frame and a stripe of its colour for each group, and its name at the right; returns how
    many names have no room. `inch` is the size of one expert."""
    n = len(groups)
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]]).tolist()
    stripe = STRIPE / inch
    left_out, last = 0, -np.inf
    for start, end in zip(starts, [*starts[1:], n], strict=True):
        group, size = int(groups[start]), end - start
        tint = style.colour(group)
        corner = (start - 0.5, start - 0.5)
        axes.add_patch(
            Rectangle(corner, size, size, fill=False, edgecolor=tint, linewidth=1.2, clip_on=False)
        )
        corner = (-0.5 - 1.6 * stripe, start - 0.5)
        axes.add_patch(
            Rectangle(corner, stripe, size, facecolor=tint, edgecolor="none", clip_on=False)
        )
        middle = (start + end - 1) / 2
        if (middle - last) * inch < 0.15:
            left_out += 1
            continue
        last = middle
        axes.text(
            n - 0.5 + 0.1 / inch,
            middle,
            words[group],
            va="center",
            fontsize=WORDS,
            fontweight="bold",
            color=tint,
            parse_math=False,
        )
    return left_out
