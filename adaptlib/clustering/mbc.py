"""Model-based clustering: which experts do the same thing (arXiv:2405.11157)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

import numpy as np
from jaxtyping import Float, Int

from adaptlib.clustering.choose import best_k, silhouette
from adaptlib.clustering.features import KINDS, Features
from adaptlib.clustering.features import features as choose_features
from adaptlib.clustering.groups import CLUSTERINGS, CONTROLS, COUNTING
from adaptlib.clustering.similarity import (
    MANY,
    Embedding,
    cosines,
    embed,
    feature_axes,
    from_gram,
)
from adaptlib.errors import UsageError
from adaptlib.experts.expert import Expert


@final
@dataclass(frozen=True, eq=False)
class Clustering:
    """Experts in groups, and how the groups came about.

    `clusters` maps a label to sorted names; "0" is the largest group, and of two groups of one
    size the one with the first name comes first. `outliers` are experts in no group, sorted
    (`hdbscan` only). `k` is the number of groups.

    Rows of `unit` and `points` are in the order of `names`, which are sorted: `unit @ unit.T` are
    the cosines, `points` what K-means saw; see `Embedding`. `tree` is the dendrogram of
    `agglomerative` as SciPy's `linkage` gives it. `weights` is what `assign` puts another expert
    among these by, and `options` are those of the features.
    """

    method: str
    k: int
    seed: int
    features: str
    why: str
    clusters: dict[str, list[str]]
    outliers: tuple[str, ...]
    silhouette: float | None
    names: tuple[str, ...]
    unit: Float[np.ndarray, "expert component"]
    points: Float[np.ndarray, "expert component"]
    tree: Float[np.ndarray, "merge 4"] | None = None
    weights: Float[np.ndarray, "basis component"] | None = field(default=None, repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def basis(self) -> str:
        """What was compared and why, such as `delta sketches (ranks differ)`."""
        return f"{KINDS[self.features]} ({self.why})"

    @property
    def similarity(self) -> Float[np.ndarray, "expert expert"]:
        """The cosine matrix of the experts. Made when asked for: of 10,000 it takes 800 MB.
        UsageError where it was saved by an earlier version, without its components."""
        if not self.unit.shape[1]:
            raise UsageError(
                "this clustering was saved without what it was made from, by an earlier version",
                hint="cluster again, and save it",
            )
        return cosines(self.unit)


def mbc(
    experts: Mapping[str, Expert],
    k: int | Literal["auto"] = 10,
    *,
    seed: int = 0,
    features: str = "auto",
    sparsity: float = 0.5,
) -> dict[str, list[str]]:
    """Group experts that do the same thing, from their parameters alone: label -> sorted names.

    Each expert's smaller entries are zeroed, the rows embedded by a truncated SVD, and the rows of
    their cosine matrix grouped by K-means (Ostapenko et al. 2024, as in the authors' code).

    `k` is the number of groups, or `auto` for the one that is best parted and most stable.
    `features` is `factors` (as published), `sketches` (any ranks and kinds), `gram` (the same
    without a projection) or `auto`. `sparsity` is the share of
    entries zeroed, of factors only: the entries of a sketch are dense mixtures, of which none is
    small for a reason. 0.5 is the authors' script; the default of their class is 0.8. `seed` is
    that of the SVD, of K-means and of the sketches.

    Equal experts are never parted, so fewer than `k` groups come back where fewer experts differ;
    experts that are zero are equal to one another. Labels are "0", "1", ... by falling size, then
    first name. The order of `experts` does not matter.

    Raises UsageError for no experts, and for `k` below 1 or above their number; BaseMismatchError
    for experts of several base models; RefusedError for NaN.
    """
    return cluster(experts, k=k, seed=seed, features=features, sparsity=sparsity).clusters


def cluster(
    experts: Mapping[str, Expert] | Features,
    *,
    method: str = "mbc",
    k: int | Literal["auto"] = 10,
    seed: int = 0,
    features: str = "auto",
    sparsity: float = 0.5,
    only: Sequence[str | int] = (),
) -> Clustering:
    """Group experts by any method of CLUSTERINGS, and say what was compared and how well it fits.

    Options and errors are those of `mbc`; an unknown method is a UsageError too. `only` restricts
    what is compared to some modules, see `modules.chosen`. Where `experts` are Features already,
    `features`, `sparsity` and `only` are theirs. Methods that find the number of groups themselves
    (COUNTING) do not use `k`; for a control that uses it `auto` is the k that MBC would take.
    """
    check(method, k, sparsity)
    if not isinstance(experts, Features):
        check_count(method, k, len(experts))
        experts = choose_features(experts, features, seed=seed, sparsity=sparsity, only=only)
    check_count(method, k, len(experts.names))
    if experts.kind == "gram":
        unit, weights = from_gram(experts.matrix, seed=seed)
    else:
        alike = experts.kind == "sketches"
        share = experts.options.get("sparsity")
        unit, weights = embed(experts.matrix, sparsity=share, seed=seed, alike=alike)
        if alike and len(experts.matrix) <= MANY:
            weights = feature_axes(experts.matrix, weights)
    embedding = Embedding.of(experts.names, unit, experts.cards)
    number = k
    if k == "auto":
        judged = "mbc" if method in CONTROLS else method
        counts = method in COUNTING  # `number` is not used then
        number = 0 if counts else best_k(embedding, CLUSTERINGS[judged], seed=seed)
    assert not isinstance(number, str)
    labels = CLUSTERINGS[method](embedding, number, seed=seed)
    clusters, outliers = _named(experts.names, labels)
    return Clustering(
        method=method,
        k=len(clusters),
        seed=seed,
        features=experts.kind,
        why=experts.why,
        clusters=clusters,
        outliers=outliers,
        silhouette=silhouette(embedding, labels),
        names=experts.names,
        unit=unit,
        points=embedding.points,
        tree=embedding.tree if method == "agglomerative" and len(unit) > 1 else None,
        weights=weights,
        options=experts.options,
    )


def check(method: str, k: object, sparsity: float = 0.5) -> None:
    """UsageError for options that mean nothing, before anything is read for them."""
    if method not in CLUSTERINGS:
        raise UsageError(f"no clustering is called {method!r}; there are {', '.join(CLUSTERINGS)}")
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity is a share of entries, from 0 to below 1; got {sparsity}")
    if k != "auto" and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise UsageError(f"k is a number of groups, 1 or more, or 'auto'; got {k!r}")


def check_count(method: str, k: int | str, experts: int) -> None:
    """UsageError where so many groups cannot be made of so many experts."""
    if k == "auto" or experts == 0 or method in COUNTING:  # no experts is an error of its own
        return
    if int(k) > experts:
        raise UsageError(
            f"{k} groups cannot be made of {experts} expert{'s' * (experts != 1)}",
            hint=f"give a k from 1 to {experts}, or k='auto'",
        )


def _named(
    names: tuple[str, ...], labels: Int[np.ndarray, " expert"]
) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    groups: dict[int, list[str]] = {}
    for name, label in zip(names, labels.tolist(), strict=True):  # names are sorted
        groups.setdefault(label, []).append(name)
    outliers = groups.pop(-1, [])
    ordered = sorted(groups.values(), key=lambda group: (-len(group), group[0]))
    return {str(i): group for i, group in enumerate(ordered)}, tuple(outliers)
