"""What all figures of a clustering share: colours, the legend, the title and the note."""

from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Int
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from adaptlib.clustering.mbc import Clustering
from adaptlib.figures import COLOURS, DPI, FAINT, INK

OUTLIER = "#9a9a9a"
LONGEST = 32  # characters of a name
LEGEND_ROWS, LEGEND_COLUMNS = 26, 3
MARGIN = 0.3  # inches around everything
# marker -> its size in points, so that all look equally large; they part what shares a colour
MARKERS = {"o": 7, "s": 6.5, "^": 8, "D": 6, "v": 8, "P": 8.5, "X": 8, "p": 8}


def colour(group: int) -> str:
    """Of the group of this number; -1 stands for outliers."""
    return COLOURS[group % len(COLOURS)] if group >= 0 else OUTLIER


def marker(group: int) -> str:
    if group < 0:
        return "x"
    return list(MARKERS)[(group + group // len(COLOURS)) % len(MARKERS)]


def groups(clustering: Clustering) -> Int[np.ndarray, " expert"]:
    """The number of each expert's group, in the order of `names`; -1 for outliers."""
    row = {name: i for i, name in enumerate(clustering.names)}
    found = np.full(len(row), -1)
    for i, names in enumerate(clustering.clusters.values()):
        found[[row[name] for name in names]] = i
    return found


def canvas(width: float, height: float) -> Figure:
    """An empty figure of this many inches that knows how large its texts are."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def widest(texts: Iterable[str], size: float, weight: str = "normal") -> float:
    """The inches that the longest of these texts takes."""
    figure = canvas(1.0, 1.0)
    found = [
        figure.text(0, 0, text, fontsize=size, fontweight=weight, parse_math=False)
        for text in texts
    ]
    return max((text.get_window_extent().width / DPI for text in found), default=0.0)


def title(clustering: Clustering) -> str:
    fit = "" if clustering.silhouette is None else f", silhouette {clustering.silhouette:.2f}"
    n, k = len(clustering.names), clustering.k
    outliers = len(clustering.outliers)
    apart = f", {outliers:,} outlier{'s' * (outliers != 1)}" if outliers else ""
    return (
        f"{n:,} expert{'s' * (n != 1)} in {k:,} group{'s' * (k != 1)} "
        f"by {clustering.method}{apart}{fit}"
    )


def frame(figure: Figure, clustering: Clustering, *notes: str) -> None:
    """The title above everything and the note below it."""
    width, height = figure.get_size_inches()
    left = MARGIN / width
    figure.text(left, 1 - MARGIN / height, title(clustering), fontsize=11, color=INK, va="center")
    note = "; ".join([*(note for note in notes if note), f"compared: {clustering.basis}"])
    figure.text(left, 0.22 / height, note, fontsize=8.5, color=FAINT, parse_math=False)


def legend(figure: Figure, clustering: Clustering, labels: Mapping[str, str]) -> float:
    """The groups with their marks, words and sizes, at the right; returns its width in inches.

    Words are left out where there are more groups than one column takes, and the smallest groups
    where there are more than three.
    """
    shown = list(clustering.clusters.items())[: LEGEND_ROWS * LEGEND_COLUMNS - 1]
    wordy = len(shown) <= LEGEND_ROWS
    handles = [
        _handle(i, f"{called(label, labels if wordy else {})}  ({len(names):,})")
        for i, (label, names) in enumerate(shown)
    ]
    if left := clustering.k - len(shown):
        handles.append(Line2D([], [], linestyle="none", label=f"{left} smaller ones"))
    if clustering.outliers:
        handles.append(_handle(-1, f"outliers  ({len(clustering.outliers):,})"))
    width, height = figure.get_size_inches()
    made = figure.legend(
        handles=handles,
        title="group  (experts)",
        loc="upper right",
        bbox_to_anchor=(1 - 0.08 / width, 1 - 0.42 / height),
        ncols=max(1, -(-len(handles) // LEGEND_ROWS)),
        frameon=False,
        fontsize=9,
        title_fontsize=9,
        labelcolor=INK,
        columnspacing=1.0,
        handletextpad=0.2,
        alignment="left",
    )
    for text in made.get_texts():
        text.set_parse_math(False)
    figure.canvas.draw()
    return made.get_window_extent().width / figure.dpi


def called(label: str, labels: Mapping[str, str]) -> str:
    """A group's number, and its words where it has any."""
    return f"{label}  {labels[label]}" if labels.get(label) else label


def shortened(name: str, longest: int = LONGEST) -> str:
    """Its two ends: the tail of a name tells experts apart as often as the head."""
    if len(name) <= longest:
        return name
    return f"{name[: longest // 2 - 1]}…{name[-(longest // 2) :]}"


def _handle(group: int, label: str) -> Line2D:
    return Line2D(
        [],
        [],
        linestyle="none",
        marker=marker(group),
        markersize=MARKERS.get(marker(group), 6),
        color=colour(group),
        markeredgecolor="white" if group >= 0 else OUTLIER,
        markeredgewidth=0.5 if group >= 0 else 1.2,
        label=label,
    )
