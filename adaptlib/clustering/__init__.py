"""Clustering: which experts do the same thing, read from their parameters alone (MBC)."""

from typing import TYPE_CHECKING, Any

from adaptlib.clustering.assign import Assigned, assign
from adaptlib.clustering.choose import best_k, candidates, silhouette, stability
from adaptlib.clustering.features import Features, factor_features, sketch_features
from adaptlib.clustering.gram import gram_matrix
from adaptlib.clustering.groups import CLUSTERINGS, CONTROLS, COUNTING
from adaptlib.clustering.kept import cluster_library, library_features
from adaptlib.clustering.mbc import Clustering, cluster, mbc
from adaptlib.clustering.saved import assign_kept, load_clustering, save_clustering
from adaptlib.clustering.similarity import Embedding, cosine_matrix

if TYPE_CHECKING:
    from adaptlib.clustering.plot import plot_map as plot_map

# Imported eagerly because the function `mbc` and its file share a name: a lazy attribute would be
# shadowed by the submodule. Only the plot waits, for matplotlib is slow to import and rarely used.

__all__ = [
    "CLUSTERINGS",
    "CONTROLS",
    "COUNTING",
    "Assigned",
    "Clustering",
    "Embedding",
    "Features",
    "assign",
    "assign_kept",
    "best_k",
    "candidates",
    "cluster",
    "cluster_library",
    "cosine_matrix",
    "factor_features",
    "gram_matrix",
    "library_features",
    "load_clustering",
    "mbc",
    "plot_map",
    "save_clustering",
    "silhouette",
    "sketch_features",
    "stability",
]


def __getattr__(name: str) -> Any:
    if name != "plot_map":
        raise AttributeError(f"module 'adaptlib.clustering' has no attribute {name!r}")
    from adaptlib.clustering.plot import plot_map

    return plot_map
