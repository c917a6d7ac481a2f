"""A saved clustering that grows: new experts in its clusters, without grouping again."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from adaptlib.clustering.assign import Assigned, assign, place
from adaptlib.clustering.choose import silhouette
from adaptlib.clustering.kept import library_features
from adaptlib.clustering.mbc import Clustering
from adaptlib.clustering.saved import KIND, Members, load_clustering
from adaptlib.clustering.similarity import Embedding
from adaptlib.experts.library import Library
from adaptlib.experts.records import load_record


class Grown(NamedTuple):
    """A clustering with new experts in it, where each of them went, and the digest of each expert
    as `save_clustering` takes them."""

    clustering: Clustering
    assigned: dict[str, Assigned]
    digests: dict[str, str]


def grow(library: Library, name: str, experts: Sequence[str] | None = None) -> Grown:
    """A clustering kept in a library with more of its experts: those named, or all that it lacks.

    Each joins its nearest cluster, see `assign`; nobody else moves, and labels stay. An expert that
    goes by the name of a member takes its place. Nothing is saved. Errors are those of `assign`.
    """
    old = load_clustering(library, name)
    digests: dict[str, str] = dict(load_record(library.store, KIND, name)["experts"])
    if experts is None:
        known = set(digests.values())
        experts = [one for one, digest in library.names().items() if digest not in known]
    else:
        experts = [one for one in experts if digests.get(one) != library.digest(one)]
    if not experts:
        return Grown(old, {}, digests)
    if old.features == "sketches":
        others, members = library_features(library, experts, "sketches"), None
    else:
        others = {one: library[one] for one in experts}
        members = Members(library, dict(digests))
    assigned = assign(old, others, members=members)
    names, rows = place(old, others, members)
    digests |= {one: library.digest(one) for one in experts}
    return Grown(_with(old, assigned, dict(zip(names, rows, strict=True))), assigned, digests)


def _with(
    old: Clustering, assigned: dict[str, Assigned], rows: dict[str, np.ndarray]
) -> Clustering:
    """The clustering with these rows in the clusters that they were assigned to."""
    clusters = {
        label: sorted(
            {one for one in held if one not in assigned}
            | {one for one, to in assigned.items() if to.label == label}
        )
        for label, held in old.clusters.items()
    }
    clusters = {label: held for label, held in clusters.items() if held}
    outliers = tuple(one for one in old.outliers if one not in assigned)
    unit = dict(zip(old.names, old.unit, strict=True)) | rows
    names = tuple(sorted(unit))
    weights = old.weights
    if old.features != "sketches" and weights is not None:
        # What places a row by its products with the members: with new ones it has no product.
        by_name = dict(zip(old.names, weights, strict=True))
        none = np.zeros(weights.shape[1])
        weights = np.stack([none if one in rows else by_name[one] for one in names])
    embedding = Embedding.of(names, np.stack([unit[one] for one in names]))
    place_of = {one: i for i, held in enumerate(clusters.values()) for one in held}
    return replace(
        old,
        k=len(clusters),
        clusters=clusters,
        outliers=outliers,
        silhouette=silhouette(embedding, np.array([place_of.get(one, -1) for one in names])),
        names=names,
        unit=embedding.unit,
        points=embedding.points,
        tree=None,  # it is that of fewer experts
        weights=weights,
    )
