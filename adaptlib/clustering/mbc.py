"""Model-based clustering: which experts do the same thing (arXiv:2405.11157)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from jaxtyping import Float, Int

from adaptlib.clustering.features import KINDS
from adaptlib.clustering.features import features as choose_features
from adaptlib.clustering.groups import CLUSTERINGS, best_k, silhouette
from adaptlib.clustering.similarity import cosine_matrix
from adaptlib.errors import UsageError
from adaptlib.experts.expert import Expert


@final
@dataclass(frozen=True, eq=False)
class Clustering:
    """Experts in groups, and how the groups came about.

    `clusters` maps a label to sorted names; "0" is the largest group, and of two groups of one
    size the one with the first name comes first. `k` is the number of groups. `similarity` is the
    cosine matrix of the experts in the order of `names`.
    """

    method: str
    k: int
    seed: int
    features: str
    why: str
    clusters: dict[str, list[str]]
    silhouette: float | None
    names: tuple[str, ...]
    similarity: Float[np.ndarray, "expert expert"]

    @property
    def basis(self) -> str:
        """What was compared and why, such as `delta sketches (ranks differ)`."""
        return f"{KINDS[self.features]} ({self.why})"


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

    `k` is the number of groups, or `auto` for the one with the best silhouette. `features` is
    `factors` (as published), `sketches` (any ranks and kinds) or `auto`. `sparsity` is the share of
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
    experts: Mapping[str, Expert],
    *,
    method: str = "mbc",
    k: int | Literal["auto"] = 10,
    seed: int = 0,
    features: str = "auto",
    sparsity: float = 0.5,
) -> Clustering:
    """Group experts by any method of CLUSTERINGS, and say what was compared and how well it fits.

    Options and errors are those of `mbc`; an unknown method is a UsageError too. For every method
    `auto` is the k that MBC would take, so that a control is compared at the same k.
    """
    if method not in CLUSTERINGS:
        raise UsageError(f"no clustering is called {method!r}; there are {', '.join(CLUSTERINGS)}")
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity is a share of entries, from 0 to below 1; got {sparsity}")
    _check_k(k, len(experts))
    chosen = choose_features(experts, features, seed=seed)
    similarity = cosine_matrix(
        chosen.matrix, sparsity=sparsity if chosen.kind == "factors" else None, seed=seed
    )
    number = best_k(similarity, seed=seed) if k == "auto" else k
    labels = CLUSTERINGS[method](similarity, number, seed=seed)
    clusters = _named(chosen.names, labels)
    return Clustering(
        method=method,
        k=len(clusters),
        seed=seed,
        features=chosen.kind,
        why=chosen.why,
        clusters=clusters,
        silhouette=silhouette(similarity, labels),
        names=chosen.names,
        similarity=similarity,
    )


def _check_k(k: object, experts: int) -> None:
    if k == "auto" or experts == 0:  # no experts is an error of its own
        return
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise UsageError(f"k is a number of groups, 1 or more, or 'auto'; got {k!r}")
    if k > experts:
        raise UsageError(
            f"{k} groups cannot be made of {experts} expert{'s' * (experts != 1)}",
            hint=f"give a k from 1 to {experts}, or k='auto'",
        )


def _named(names: tuple[str, ...], labels: Int[np.ndarray, " expert"]) -> dict[str, list[str]]:
    groups: dict[int, list[str]] = {}
    for name, label in zip(names, labels.tolist(), strict=True):  # names are sorted
        groups.setdefault(label, []).append(name)
    ordered = sorted(groups.values(), key=lambda group: (-len(group), group[0]))
    return {str(i): group for i, group in enumerate(ordered)}
