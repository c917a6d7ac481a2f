"""From the cosine matrix to groups: MBC's K-means, and its control."""

import numpy as np
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score

AUTO_MAX = 20  # groups


def mbc_labels(
    similarity: Float[np.ndarray, "expert expert"], k: int, *, seed: int
) -> Int[np.ndarray, " expert"]:
    """K-means on the rows of the cosine matrix, the best of 10 k-means++ starts.

    Equal experts stay together, so there are fewer than `k` groups where fewer rows are distinct.
    Model-based clustering of Ostapenko et al. 2024 (arXiv:2405.11157), as in the authors' code.
    """
    distinct = len(np.unique(similarity, axis=0))
    means = KMeans(
        n_clusters=min(k, distinct),
        init="k-means++",
        n_init=10,  # pyright: ignore[reportArgumentType]: its default is a string, it takes both
        random_state=seed,
    )
    return means.fit_predict(similarity)


def random_labels(
    similarity: Float[np.ndarray, "expert expert"], k: int, *, seed: int
) -> Int[np.ndarray, " expert"]:
    """The control: groups of the sizes that MBC finds, filled at random."""
    return np.random.default_rng(seed).permutation(mbc_labels(similarity, k, seed=seed))


# name -> function of (similarity, k, *, seed) that gives each expert the number of its group
CLUSTERINGS = {
    "mbc": mbc_labels,
    "random": random_labels,
}


def silhouette(
    similarity: Float[np.ndarray, "expert expert"], labels: Int[np.ndarray, " expert"]
) -> float | None:
    """How well parted the groups are, from -1 to 1: the mean silhouette (Rousseeuw 1987) of the
    rows of the cosine matrix, which are the points K-means sees. None unless there are at least
    2 groups and fewer groups than experts."""
    if not 2 <= len(np.unique(labels)) < len(labels):
        return None
    return float(silhouette_score(similarity, labels))


def best_k(similarity: Float[np.ndarray, "expert expert"], *, seed: int) -> int:
    """The number of groups, 2 to min(20, half the experts), of MBC's largest silhouette.

    The smaller number on a tie. 1 where two groups cannot be judged: fewer than 3 experts, or no
    two that differ.
    """
    best, best_score = 1, -np.inf
    for k in range(2, max(2, min(len(similarity) // 2, AUTO_MAX)) + 1):
        if k > len(similarity):
            break
        labels = mbc_labels(similarity, k, seed=seed)
        score = silhouette(similarity, labels)
        if score is not None and score > best_score + 1e-9:
            best, best_score = len(np.unique(labels)), score
    return best
