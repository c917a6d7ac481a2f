"""The number of groups: what is planted is found, and what is above chance is not chance."""

import numpy as np
import pytest

from adaptlib.clustering import CLUSTERINGS, Embedding, best_k, candidates, silhouette, stability
from adaptlib.clustering.choose import SAMPLE, SEARCHED
from adaptlib.clustering.similarity import embed

MBC = CLUSTERINGS["mbc"]


def planted(families, each, noise, seed=0):
    random = np.random.default_rng(seed)
    rows = np.repeat(random.standard_normal((families, 60)), each, axis=0)
    rows += noise * random.standard_normal(rows.shape)
    unit, _ = embed(rows.astype(np.float32), sparsity=None)
    return Embedding.of(tuple(f"{i:05}" for i in range(len(rows))), unit)


@pytest.mark.parametrize("method", ["agglomerative", "mbc"])
@pytest.mark.parametrize(("families", "each", "noise"), [(3, 6, 1.0), (6, 8, 1.0), (12, 5, 0.7)])
def test_it_finds_what_is_planted(families, each, noise, method):
    for seed in range(2):
        assert best_k(planted(families, each, noise, seed), CLUSTERINGS[method]) == families


def test_of_many_experts_it_looks_above_twenty():
    """Silhouette alone, up to 20, would say 20."""
    experts = planted(40, 25, 0.7)
    assert abs(best_k(experts, MBC) - 40) <= 3


def test_of_more_than_a_thousand_it_looks_at_a_thousand(monkeypatch):
    seen = []

    def watched(experts, k, *, seed, starts):
        seen.append(len(experts))
        return MBC(experts, k, seed=seed, starts=1)

    experts = planted(4, 300, 0.7)
    monkeypatch.setattr("adaptlib.clustering.choose._numbers", lambda n: [2, 4])
    assert best_k(experts, watched) == 4
    assert max(seen) == SEARCHED < len(experts)


def test_figures_are_above_chance():
    """Of experts without groups no number stands out; of planted ones the right one is near 1."""
    random = np.random.default_rng(0)
    unit, _ = embed(random.standard_normal((40, 60)).astype(np.float32), sparsity=None)
    nothing = candidates(Embedding.of(tuple(f"{i:02}" for i in range(40)), unit), MBC)
    assert [c.k for c in nothing] == list(range(2, 21))
    assert max(abs(c.silhouette) for c in nothing) < 0.1
    assert max(abs(c.stability) for c in nothing) < 0.5
    assert abs(np.mean([c.stability for c in nothing])) < 0.2
    (right,) = [c for c in candidates(planted(6, 8, 0.7), MBC) if c.k == 6]
    assert right.stability == pytest.approx(1)
    assert right.silhouette > 0.3


def test_it_is_deterministic():
    experts = planted(5, 6, 2.0)
    assert candidates(experts, MBC, seed=3) == candidates(experts, MBC, seed=3)


def test_stability_written_out():
    experts = planted(3, 10, 0.5)
    truth = np.repeat([0, 1, 2], 10)
    assert stability(experts, MBC, 3, labels=truth) == pytest.approx(1)
    assert stability(experts, MBC, 3) == pytest.approx(1)
    chance = np.random.default_rng(0).permutation(truth)
    assert abs(stability(experts, MBC, 3, labels=chance)) < 0.2
    assert stability(experts.subset(np.arange(3)), MBC, 2) is None


def test_the_silhouette_is_that_of_the_rows_of_the_cosine_matrix():
    from sklearn.metrics import silhouette_score

    experts = planted(4, 6, 1.0)
    labels = MBC(experts, 4)
    wanted = silhouette_score(experts.unit @ experts.unit.T, labels)
    assert silhouette(experts, labels) == pytest.approx(wanted, abs=1e-9)
    labels[:3] = -1  # outliers are in no group
    wanted = silhouette_score((experts.unit @ experts.unit.T)[3:], labels[3:])
    assert silhouette(experts, labels) == pytest.approx(wanted, abs=1e-9)
    assert silhouette(experts, np.zeros(24, np.int64)) is None
    assert silhouette(experts, np.full(24, -1)) is None


def test_of_many_experts_the_silhouette_is_of_some():
    experts = planted(3, 1000, 1.0)
    labels = np.repeat([0, 1, 2], 1000)
    some = silhouette(experts, labels)
    first = experts.subset(np.arange(0, 3000, 2))
    assert len(first) < SAMPLE
    assert some == pytest.approx(silhouette(first, labels[::2]), abs=0.03)
    assert some == silhouette(experts, labels)
