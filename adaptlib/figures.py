"""Figures as files: the same figure is the same bytes, whatever the user's matplotlibrc says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from adaptlib.paths import check_path

# Six colours of Okabe and Ito, which every kind of colour vision tells apart, and two darker ones.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b3f95", "#4d4d4d")
INK, GROUND, FAINT = "#222222", "#fbfbfb", "#666666"
DPI = 130


def save_figure(draw: Callable[[], Figure], path: str | Path) -> Path:
    """Write the figure that `draw` makes as .svg or .png, by the suffix of `path`.

    Raises what `check_path` raises, before anything is drawn.
    """
    path = check_path(path)
    suffix = path.suffix.lower()
    metadata: dict[str, Any] = (
        {"Date": None, "Creator": "adaptlib"} if suffix == ".svg" else {"Software": None}
    )
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rc("svg", hashsalt="adaptlib", fonttype="none")
        draw().savefig(path, format=suffix[1:], dpi=DPI, metadata=metadata)
    return path
