"""From an embedding to groups: one function for each method, and its line in CLUSTERINGS.

Each takes an `Embedding`, the number of groups and a seed, and gives each expert the number of its
group, or -1 where it is in none. None but the controls parts equal experts, so there may be fewer
groups than asked for. The controls are what a method that reads parameters must beat: `random`,
`category` and `text` look at no parameters.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int
from scipy.cluster.hierarchy import fcluster
from sklearn.cluster import HDBSCAN, KMeans
from sklearn.feature_extraction.text import TfidfVectorizer

from adaptlib.clustering.similarity import Embedding, threads

SAID = ("task", "description", "instruction", "examples")  # what `text` reads of a card
WORD = r"[^\W_]+"  # so `clinc_banking` and `clinc-banking` are the same two words


def agglomerative(
    experts: Embedding, k: int, *, seed: int = 0, starts: int = 1
) -> Int[np.ndarray, " expert"]:
    """Average linkage on 1 - cos (SciPy's `linkage`), its dendrogram cut to `k` groups.

    Nothing in it is random. Where several merges are of one height the cut takes all or none, so
    there may be fewer groups than `k`.
    """
    distinct = len(np.unique(experts.unit, axis=0))
    if len(experts) == 1:
        return np.zeros(1, np.int64)
    return fcluster(experts.tree, min(k, distinct), "maxclust").astype(np.int64)


def category(
    experts: Embedding, k: int = 0, *, seed: int = 0, starts: int = 1
) -> Int[np.ndarray, " expert"]:
    """The control: the `category` on the card, a group for each. Experts whose card has none are
    one group. `k` is not used. Nothing is guessed from names of tasks."""
    said = [str(experts.cards.get(name, {}).get("category") or "") for name in experts.names]
    return np.unique(said, return_inverse=True)[1].reshape(-1)


def hdbscan(
    experts: Embedding, k: int = 0, *, seed: int = 0, starts: int = 1
) -> Int[np.ndarray, " expert"]:
    """Dense regions of the unit rows, and outliers (Campello et al. 2013; scikit-learn's).

    It says how many groups there are; `k` is not used, nor is anything random. A group has 5
    experts at least, a tenth of all where these are under 50, and never under 2. Distances are
    sqrt(2 - 2 cos). Where no two experts differ they are one group.
    """
    rows, first, place = np.unique(experts.apart, axis=0, return_index=True, return_inverse=True)
    if len(rows) == 1:
        return np.zeros(len(experts), np.int64) - (len(experts) == 1)
    smallest = max(2, min(5, len(experts) // 10))
    maker = HDBSCAN(
        min_cluster_size=smallest,
        copy=True,  # pyright: ignore[reportArgumentType]: its default is a string, it takes both
    )
    found = maker.fit_predict(experts.apart)
    return found[first[place.reshape(-1)]].astype(np.int64)


def mbc(
    experts: Embedding, k: int, *, seed: int = 0, starts: int = 10
) -> Int[np.ndarray, " expert"]:
    """K-means on the rows of the cosine matrix, the best of 10 k-means++ starts.

    Model-based clustering of Ostapenko et al. 2024 (arXiv:2405.11157), as in the authors' code; on
    `points`, which have the distances of those rows.
    """
    points = experts.points
    return _kmeans(points, k, len(np.unique(points, axis=0)), seed=seed, starts=starts)


def random(
    experts: Embedding, k: int, *, seed: int = 0, starts: int = 10
) -> Int[np.ndarray, " expert"]:
    """The control: groups of the sizes that MBC finds, filled at random."""
    found = mbc(experts, k, seed=seed, starts=starts)
    return np.random.default_rng(seed).permutation(found)


def text(
    experts: Embedding, k: int, *, seed: int = 0, starts: int = 10
) -> Int[np.ndarray, " expert"]:
    """The control: K-means on the words of the cards (TF-IDF of task, description, instruction and
    examples, scikit-learn's). Experts whose cards say the same stay together."""
    cards = [experts.cards.get(name, {}) for name in experts.names]
    said = [" ".join(_words([card.get(key) for key in SAID])) for card in cards]
    if not any(re.search(WORD, one) for one in said):
        return np.zeros(len(experts), np.int64)
    rows: Any = TfidfVectorizer(sublinear_tf=True, token_pattern=WORD).fit_transform(said)
    return _kmeans(rows, k, len(set(said)), seed=seed, starts=starts)


# name -> function of (Embedding, k, *, seed, starts): the number of each expert's group
CLUSTERINGS = {
    "agglomerative": agglomerative,
    "category": category,
    "hdbscan": hdbscan,
    "mbc": mbc,
    "random": random,
    "text": text,
}
CONTROLS = ("category", "random", "text")  # these look at no parameters
COUNTING = ("category", "hdbscan")  # these find the number of groups themselves


def _kmeans(
    points: Any, k: int, distinct: int, *, seed: int, starts: int
) -> Int[np.ndarray, " expert"]:
    """K-means on rows, of which `distinct` differ."""
    means = KMeans(
        n_clusters=min(k, distinct),
        init="k-means++",
        n_init=starts,  # pyright: ignore[reportArgumentType]: its default is a string, takes both
        # scikit-learn scales it by the mean variance of a column, of which the cosine matrix has
        # one for each expert: so it stops where it would there.
        tol=1e-4 * points.shape[1] / points.shape[0],
        random_state=seed,
    )
    # By one thread: on a busy machine some that wait for each other take ten times as long, and of
    # 10,000 experts in 300 groups one takes 2 seconds.
    with threads().limit(limits=1):
        return means.fit_predict(points).astype(np.int64)


def _words(said: Any) -> Iterator[str]:
    """All texts in a part of a card."""
    if isinstance(said, str):
        yield said
    elif isinstance(said, Mapping | list | tuple):
        for part in said.values() if isinstance(said, Mapping) else said:
            yield from _words(part)
