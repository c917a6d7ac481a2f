"""The dendrogram: which experts are joined at which distance, in the colours of the groups."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import dendrogram

from adaptlib.clustering import plot_style as style
from adaptlib.clustering.mbc import Clustering
from adaptlib.clustering.plot_layout import sample
from adaptlib.clustering.similarity import Embedding
from adaptlib.errors import UsageError
from adaptlib.figures import FAINT, INK

WIDTH = 10.0  # inches
ROW = 0.19  # inches a leaf takes
LEAVES = 100  # above this the lower branches are one leaf each,
FEW = 60  # of which there are so many
MOST = 2000  # experts that a tree is made of, where the method has made none
MIXED = "#b5b5b5"  # a branch with experts of several groups or none


def draw_tree(clustering: Clustering, labels: Mapping[str, str]) -> Figure:
    """Average linkage on 1 - cos, cut to branches of one leaf each above 100 experts."""
    if len(clustering.names) < 2:
        raise UsageError("a tree is made of two experts or more; there is 1", hint="a map")
    groups, tree = style.groups(clustering), clustering.tree
    rows = np.arange(len(groups)) if tree is not None else sample(groups, MOST)
    if tree is None:
        tree = Embedding.of(tuple(clustering.names[i] for i in rows), clustering.unit[rows]).tree
    names, groups = [clustering.names[i] for i in rows], groups[rows]
    count = len(names) if len(names) <= LEAVES else FEW
    members = _members(tree)
    owners = [_owner(groups[held]) for held in members]
    shape = dendrogram(
        tree,
        p=count,
        truncate_mode="lastp" if count < len(names) else None,
        no_plot=True,
        link_color_func=lambda node: MIXED if owners[node] is None else style.colour(owners[node]),
    )
    leaves = [members[node] for node in shape["leaves"]]
    height = 1.35 + ROW * len(leaves)
    figure = style.canvas(WIDTH, max(height, 1.2 + 0.21 * min(clustering.k + 2, style.LEGEND_ROWS)))
    legend = style.legend(figure, clustering, labels)
    texts = [_text(held, names, groups, list(clustering.clusters), labels) for held in leaves]
    axes = _axes(figure, shape, texts, [_most(groups[held]) for held in leaves], legend)
    if clustering.method == "agglomerative" and 1 < clustering.k < len(names):
        _cut(axes, tree, clustering.k)
    part = f"{len(rows):,} of {len(clustering.names):,} experts, evenly from each group"
    cut = "a leaf is a branch: its groups (experts)" if count < len(names) else ""
    style.frame(
        figure,
        clustering,
        "joined by average linkage",
        part if len(rows) < len(clustering.names) else "",
        cut,
    )
    return figure


def _axes(figure: Figure, shape: dict, texts: list[str], owners: list[int], legend: float) -> Axes:
    """The branches, the root at the left, and the leaves' names at the right."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((style.MARGIN / width, 0.85 / height, 0.5, 1 - 1.35 / height))
    x = np.array(shape["dcoord"])
    y = np.array(shape["icoord"])
    lines = np.stack([x, y], axis=2)
    axes.add_collection(LineCollection(list(lines), colors=shape["color_list"], linewidths=1.4))
    top = max(float(x.max()), 1e-3)
    axes.set_xlim(top * 1.03, 0)
    axes.set_ylim(10 * len(texts), 0)
    axes.set_yticks([5 + 10 * i for i in range(len(texts))], texts)
    axes.yaxis.tick_right()
    axes.tick_params(axis="y", length=0, pad=9, labelsize=8, labelcolor=INK)
    axes.tick_params(axis="x", labelsize=8, colors=FAINT)
    axes.set_xlabel("distance, 1 - cosine", fontsize=8.5, color=FAINT)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#d0d0d0")
    for tick in axes.get_yticklabels():
        tick.set_parse_math(False)
    for i, owner in enumerate(owners):
        mark = style.marker(owner)
        axes.plot(
            [0],
            [5 + 10 * i],
            marker=mark,
            markersize=style.MARKERS.get(mark, 5) * 0.8,
            color=style.colour(owner),
            markeredgecolor="white" if owner >= 0 else style.OUTLIER,
            markeredgewidth=0.4 if owner >= 0 else 1.0,
            clip_on=False,
            zorder=4,
        )
    figure.canvas.draw()
    widest = max(t.get_window_extent().width for t in axes.get_yticklabels()) / figure.dpi
    room = width - legend - widest - 3 * style.MARGIN
    axes.set_position((style.MARGIN / width, 0.85 / height, room / width, 1 - 1.35 / height))
    return axes


def _cut(axes: Axes, tree: Float[np.ndarray, "merge 4"], k: int) -> None:
    """Where the tree is cut to `k` groups."""
    heights = np.sort(tree[:, 2])
    at = float(heights[-k] + heights[1 - k]) / 2
    axes.axvline(at, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)


def _members(tree: Float[np.ndarray, "merge 4"]) -> list[Int[np.ndarray, " some"]]:
    """The experts below each node, leaves first, as SciPy numbers nodes."""
    n = len(tree) + 1
    held = [np.array([i]) for i in range(n)]
    for left, right in tree[:, :2].astype(int):
        held.append(np.concatenate([held[left], held[right]]))
    return held


def _owner(groups: Int[np.ndarray, " some"]) -> int | None:
    """The group that all of these are in, None where there are several or outliers."""
    return int(groups[0]) if groups[0] >= 0 and (groups == groups[0]).all() else None


def _most(groups: Int[np.ndarray, " some"]) -> int:
    """The group that most of these are in, of equals the largest."""
    counts = Counter(groups.tolist())
    return max(counts, key=lambda group: (counts[group], group >= 0, -group))


def _text(
    held: Int[np.ndarray, " some"],
    names: list[str],
    groups: Int[np.ndarray, " expert"],
    order: list[str],
    labels: Mapping[str, str],
) -> str:
    """A leaf's name, or of which groups how many experts it stands for."""
    if len(held) == 1:
        return style.shortened(names[held[0]])
    counts = Counter(groups[held].tolist()).most_common()
    wordy = len(counts) == 1 and len(order) > style.LEGEND_ROWS  # else the legend has the words
    parts = [
        f"{'outliers' if group < 0 else style.called(order[group], labels if wordy else {})}"
        f"  ({count:,})"
        for group, count in counts[:2]
    ]
    rest = sum(count for _, count in counts[2:])
    return ", ".join([*parts, *([f"{rest:,} others"] if rest else [])])
