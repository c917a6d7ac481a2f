"""What every clustering promises; a new one in CLUSTERINGS is tested by its line there."""

import numpy as np
import pytest

from adaptlib.clustering import CLUSTERINGS, cluster

every_clustering = pytest.mark.parametrize("method", CLUSTERINGS)


def test_the_names_are_sorted():
    assert list(CLUSTERINGS) == sorted(CLUSTERINGS)


@every_clustering
@pytest.mark.parametrize("k", [1, 3, 12])
def test_it_parts_the_experts_into_k_groups(method, k, lora_families):
    experts, _ = lora_families()
    found = cluster(experts, method=method, k=k)
    assert (found.method, found.k, found.seed) == (method, k, 0)
    assert list(found.clusters) == [str(i) for i in range(k)]
    assert all(found.clusters.values())
    assert sorted(n for names in found.clusters.values() for n in names) == sorted(experts)
    assert found.names == tuple(sorted(experts))
    assert (found.silhouette is None) == (k in (1, 12))


@every_clustering
def test_it_is_deterministic_and_blind_to_order(method, lora_families):
    experts, _ = lora_families(noise=2.0)
    one = cluster(experts, method=method, k=4, seed=5)
    other = cluster(dict(reversed(experts.items())), method=method, k=4, seed=5)
    assert one.clusters == other.clusters


@every_clustering
def test_it_leaves_the_similarity_as_it_was(method):
    rows = np.random.default_rng(0).standard_normal((9, 5))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = rows @ rows.T
    before = similarity.copy()
    labels = CLUSTERINGS[method](similarity, 3, seed=0)
    assert labels.shape == (9,)
    assert np.array_equal(similarity, before)


@every_clustering
def test_auto_is_the_k_of_mbc(method, lora_families):
    assert cluster(lora_families()[0], method=method, k="auto").k == 3


def test_the_control_has_the_sizes_of_mbc_and_other_members(lora_families):
    experts, _ = lora_families(sizes=(8, 6, 4))
    found = cluster(experts, k=3)
    controls = [cluster(experts, method="random", k=3, seed=seed) for seed in range(5)]
    for control in controls:
        assert [len(g) for g in control.clusters.values()] == [8, 6, 4]
        assert control.clusters != found.clusters
        assert control.silhouette < found.silhouette - 0.5
    assert len({str(control.clusters) for control in controls}) == 5
