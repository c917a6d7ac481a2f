"""MBC on the bundled experts, which were really trained, against the slow one."""

import numpy as np
import pytest
from sklearn.cluster import kmeans_plusplus

from adaptlib.clustering import cluster, factor_features
from adaptlib.clustering.features import features
from adaptlib.demo import experts


@pytest.fixture(scope="module")
def bundled():
    """The bundled LoRA experts; all are of one rank and have the same modules."""
    return {name: expert for name, expert in experts().items() if expert.kind == "lora"}


def the_ten_starts(cosines, k, seed=0):
    """The starts that scikit-learn's KMeans draws for this seed, by its public k-means++."""
    random, centred = np.random.RandomState(seed), cosines - cosines.mean(axis=0)
    return [kmeans_plusplus(centred, k, random_state=random)[1].tolist() for _ in range(10)]


@pytest.mark.parametrize("k", [5, 10, 15])
@pytest.mark.parametrize("kind", ["factors", "sketches"])
def test_mbc_equals_the_slow_one(bundled, slow_mbc, inertia_of, kind, k):
    """Real experts fall into no clear groups, so another start may end elsewhere: both begin with
    the same ten, and everything else is done twice."""
    chosen = features(bundled, kind)
    sparsity = 0.5 if kind == "factors" else None
    groups, cosines, least = slow_mbc(chosen.matrix, chosen.names, k, sparsity, the_ten_starts)
    found = cluster(bundled, k=k, features=kind)
    assert np.allclose(found.similarity, cosines, atol=1e-5)
    clusters = {frozenset(names) for names in found.clusters.values()}
    assert clusters == groups
    assert inertia_of(cosines, chosen.names, clusters) == pytest.approx(least, rel=1e-9)


def test_each_expert_is_in_the_nearest_group(bundled):
    found = cluster(bundled, k=min(10, len(bundled) // 2))
    row = dict(zip(found.names, found.similarity, strict=True))
    middle = {g: np.mean([row[n] for n in names], axis=0) for g, names in found.clusters.items()}
    for group, names in found.clusters.items():
        for name in names:
            gaps = {g: np.linalg.norm(row[name] - m) for g, m in middle.items()}
            assert gaps[group] <= min(gaps.values()) + 1e-9


def test_auto_parts_the_bundle(bundled):
    found = cluster(bundled, k="auto")
    assert 2 <= found.k <= max(2, len(bundled) // 2)
    assert sorted(n for names in found.clusters.values() for n in names) == sorted(bundled)
    assert factor_features(bundled)[1] == list(found.names)
