"""MBC on the bundled experts, which were really trained, against the slow one."""

import importlib

import numpy as np
import pytest

from adaptlib.clustering import cluster, factor_features
from adaptlib.clustering.features import features


@pytest.fixture(scope="module")
def bundled():
    """The bundled LoRA experts of the most frequent ranks and modules."""
    try:
        demo = importlib.import_module("adaptlib.demo")
    except ModuleNotFoundError:
        pytest.skip("adaptlib.demo is not there yet")
    if not hasattr(demo, "experts"):
        pytest.skip("adaptlib.demo has no experts() yet")
    groups = {}
    for name, expert in demo.experts().items():
        if expert.kind == "lora":
            shape = tuple((m, d.rank) for m, d in expert.deltas.items())
            groups.setdefault(shape, {})[name] = expert
    experts = max(groups.values(), key=len, default={})
    if len(experts) < 6:
        pytest.skip(f"the bundle has {len(experts)} LoRA experts of one shape; 6 are needed")
    return experts


@pytest.mark.parametrize("kind", ["factors", "sketches"])
def test_mbc_equals_the_slow_one(bundled, slow_mbc, inertia_of, kind):
    chosen = features(bundled, kind)
    sparsity = 0.5 if kind == "factors" else None
    k = min(10, len(bundled) // 2)
    groups, cosines, least = slow_mbc(chosen.matrix, chosen.names, k, sparsity, starts=100)
    found = cluster(bundled, k=k, features=kind)
    assert np.allclose(found.similarity, cosines, atol=1e-5)
    clusters = {frozenset(names) for names in found.clusters.values()}
    reached = inertia_of(cosines, chosen.names, clusters)
    # Real experts need not fall into clear groups, and 10 starts need not find what 100 find.
    assert reached <= least * 1.05
    if reached == pytest.approx(least, rel=1e-9):
        assert clusters == groups


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
