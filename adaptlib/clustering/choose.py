"""How well groups are parted, how stable they are, and which number of groups has most of both."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from sklearn.metrics import adjusted_rand_score, silhouette_score

from adaptlib.clustering.similarity import Embedding, threads

SAMPLE = 2000  # experts that a silhouette and a search for k look at, where there are more
SEARCHED = 1000  # experts that the search for k looks at, where there are more
AUTO_MAX = 20  # groups, of up to FEW experts
DRAWS, SHARE = 10, 0.8  # resamplings, and the share of the experts in each
CHANCES = 6  # sets of experts without groups
FEW = 200  # experts up to which so many are drawn; half as many above
STARTS = 3  # of K-means, while a number is looked for

Method = Callable[..., Int[np.ndarray, " expert"]]


class Candidate(NamedTuple):
    """A number of groups, and what speaks for it: silhouette and stability above chance."""

    k: int
    silhouette: float
    stability: float


def silhouette(experts: Embedding, labels: Int[np.ndarray, " expert"]) -> float | None:
    """How well parted the groups are, from -1 to 1: the mean silhouette (Rousseeuw 1987) of the
    rows of the cosine matrix, which are the points K-means sees, of experts that are in a group.

    None unless there are at least 2 groups and fewer groups than experts. Above 2,000 experts it is
    that of 2,000 of them, always the same ones.
    """
    grouped = np.flatnonzero(labels >= 0)
    if len(grouped) > SAMPLE:
        chosen = np.random.default_rng(0).choice(len(grouped), SAMPLE, replace=False)
        grouped = grouped[np.sort(chosen)]
    points, labels = experts.points[grouped], labels[grouped]
    if not 2 <= len(np.unique(labels)) < len(labels):
        return None
    return float(silhouette_score(points, labels))


def stability(
    experts: Embedding,
    method: Method,
    k: int,
    *,
    seed: int = 0,
    labels: Int[np.ndarray, " expert"] | None = None,
    draws: int = DRAWS,
    starts: int = STARTS,
) -> float | None:
    """Whether the groups stay where only 80% of the experts are there: the mean adjusted Rand index
    (Hubert and Arabie 1985) between the groups of random samples and those of all, on the sample.

    1 where nothing changes, about 0 where the groups are a matter of chance. `labels` are the
    groups of all, where they are known already. None for fewer than 4 experts. Above 2,000 experts
    a sample has 80% of 2,000.
    """
    if len(experts) < 4:
        return None
    if labels is None:
        labels = method(experts, k, seed=seed, starts=starts)
    size, found = round(SHARE * min(len(experts), SAMPLE)), []
    for draw in range(draws):
        random = np.random.default_rng([seed, draw])
        rows = np.sort(random.choice(len(experts), size, replace=False))
        again = method(experts.subset(rows), min(k, size), seed=seed, starts=starts)
        found.append(adjusted_rand_score(labels[rows], again))
    return float(np.mean(found))


def candidates(experts: Embedding, method: Method, *, seed: int = 0) -> tuple[Candidate, ...]:
    """Each number of groups that `best_k` looks at, and what speaks for it.

    2 to half the experts, 20 at most; of more than 200 experts also some larger ones, each a
    quarter above the one before, up to a tenth of them. Above 1,000 experts 1,000 of them are
    looked at, so 100 groups are the most.

    Both figures are above chance, (x - c) / (1 - c): c is what they are, with as many groups, for
    experts of the same spread that have none (their components shuffled, each on its own).
    """
    # Hundreds of small problems: threads that wait for each other would take most of the time.
    with threads().limit(limits=1):
        return _candidates(experts, method, seed)


def best_k(experts: Embedding, method: Method, *, seed: int = 0) -> int:
    """The number of groups of `candidates` with the largest sum of silhouette and stability above
    chance, the smaller on a tie. 1 where two groups cannot be judged: fewer than 3 experts, or no
    two that differ.

    Above chance, because where groups are faint both tend to the largest number that is looked at:
    a pair is better parted than a crowd, and groups of one or two mostly stay.
    """
    best, most = 1, -np.inf
    for k, parted, stable in candidates(experts, method, seed=seed):
        if parted + stable > most + 1e-9:
            best, most = k, parted + stable
    return best


def _numbers(experts: int) -> list[int]:
    found = list(range(2, min(max(2, min(experts // 2, AUTO_MAX)), experts) + 1))
    while experts > FEW and found[-1] * 1.25 <= experts / 10:
        found.append(round(found[-1] * 1.25))
    return found


def _shuffled(experts: Embedding, draw: int) -> Embedding:
    """As many experts without groups: each component has its values, and another order of them."""
    random = np.random.default_rng([1, draw])
    unit = random.permuted(experts.unit, axis=0)
    norm = np.linalg.norm(unit, axis=1, keepdims=True)
    return Embedding.of(experts.names, unit / np.where(norm == 0, 1.0, norm))


def _candidates(experts: Embedding, method: Method, seed: int) -> tuple[Candidate, ...]:
    if len(experts) > SEARCHED:
        rows = np.random.default_rng(0).choice(len(experts), SEARCHED, replace=False)
        experts = experts.subset(np.sort(rows))
    half = 2 if len(experts) > FEW else 1
    chances = [_shuffled(experts, draw) for draw in range(CHANCES // half)]
    found: list[Candidate] = []
    for k in _numbers(len(experts)):
        labels = method(experts, k, seed=seed, starts=STARTS)
        parted = silhouette(experts, labels)
        number = len(np.unique(labels))
        if parted is None or any(number == other.k for other in found):
            continue
        stable = stability(experts, method, number, seed=seed, labels=labels, draws=DRAWS // half)
        by_chance = np.zeros((len(chances), 2))
        for row, other in zip(by_chance, chances, strict=True):
            labels = method(other, k, seed=seed, starts=1)
            again = stability(other, method, k, seed=seed, labels=labels, draws=1, starts=1)
            row[:] = silhouette(other, labels) or 0.0, again or 0.0
        chance = np.minimum(by_chance.mean(axis=0), 0.99)
        above = (np.array([parted, stable or 0.0]) - chance) / (1 - chance)
        found.append(Candidate(number, *above.tolist()))
    return tuple(found)
