"""Clustering: which experts do the same thing, read from their parameters alone (MBC)."""

from typing import TYPE_CHECKING, Any

from adaptlib.clustering.features import Features, factor_features, sketch_features
from adaptlib.clustering.groups import CLUSTERINGS
from adaptlib.clustering.mbc import Clustering, cluster, mbc

if TYPE_CHECKING:
    from adaptlib.clustering.plot import plot_map as plot_map
from adaptlib.clustering.similarity import cosine_matrix

# Imported eagerly because the function `mbc` and its file share a name: a lazy attribute would be
# shadowed by the submodule. Only the plot waits, for matplotlib is slow to import and rarely used.

__all__ = [
    "CLUSTERINGS",
    "Clustering",
    "Features",
    "cluster",
    "cosine_matrix",
    "factor_features",
    "mbc",
    "plot_map",
    "sketch_features",
]


def __getattr__(name: str) -> Any:
    if name != "plot_map":
        raise AttributeError(f"module 'adaptlib.clustering' has no attribute {name!r}")
    from adaptlib.clustering.plot import plot_map

    return plot_map
