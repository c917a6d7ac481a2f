"""What every clustering promises; a new one in CLUSTERINGS is tested by its line there."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from adaptlib.clustering import CLUSTERINGS, CONTROLS, COUNTING, Embedding, cluster
from adaptlib.experts.expert import Expert

every_clustering = pytest.mark.parametrize("method", CLUSTERINGS)
KINDS = ("fruit", "tool", "river")


@pytest.fixture
def told(lora_families):
    """Experts in families whose cards say which, each in its own words."""

    def make(seed=0, sizes=(5, 4, 3), noise=0.3):
        experts, family = lora_families(seed, sizes, noise)
        cards = {
            name: {"category": KINDS[i], "task": f"{KINDS[i]} {KINDS[i]} {name}"}
            for name, i in family.items()
        }
        return {n: Expert(e.base, e.deltas, cards[n]) for n, e in experts.items()}, family

    return make


def test_the_names_are_sorted():
    assert list(CLUSTERINGS) == sorted(CLUSTERINGS)
    assert set(CONTROLS) | set(COUNTING) < set(CLUSTERINGS)


@every_clustering
@pytest.mark.parametrize("k", [1, 3, 12])
def test_it_parts_the_experts_into_k_groups(method, k, told):
    experts, _ = told()
    found = cluster(experts, method=method, k=k)
    k = 3 if method in COUNTING else k
    assert (found.method, found.k, found.seed) == (method, k, 0)
    assert list(found.clusters) == [str(i) for i in range(k)]
    assert all(found.clusters.values())
    assert all(names == sorted(names) for names in found.clusters.values())
    members = [n for names in found.clusters.values() for n in names]
    assert sorted([*members, *found.outliers]) == sorted(experts)
    assert found.names == tuple(sorted(experts))
    assert found.unit.shape[0] == found.points.shape[0] == len(experts)
    assert (found.silhouette is None) == (k in (1, 12))
    assert (found.tree is not None) == (method == "agglomerative")


@every_clustering
def test_it_finds_planted_families(method, told):
    for seed in range(3):
        experts, family = told(seed)
        found = cluster(experts, method=method, k=3)
        label = {n: label for label, held in found.clusters.items() for n in held}
        agree = adjusted_rand_score([family[n] for n in label], [label[n] for n in label])
        assert (agree == 1) == (method != "random")
        assert found.outliers == ()


@every_clustering
def test_it_is_deterministic_and_blind_to_order(method, told):
    experts, _ = told(noise=2.0)
    one = cluster(experts, method=method, k=4, seed=5)
    other = cluster(dict(reversed(experts.items())), method=method, k=4, seed=5)
    assert one.clusters == other.clusters
    assert one.outliers == other.outliers


@every_clustering
def test_it_leaves_the_embedding_as_it_was(method):
    rows = np.random.default_rng(0).standard_normal((9, 5))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    experts = Embedding.of(tuple("abcdefghi"), rows)
    before = rows.copy(), experts.points.copy()
    labels = CLUSTERINGS[method](experts, 3, seed=0)
    assert labels.shape == (9,)
    assert labels.min() >= -1
    assert np.array_equal(experts.unit, before[0])
    assert np.array_equal(experts.points, before[1])


@every_clustering
def test_equal_experts_are_never_parted_by_what_reads_parameters(method, told, make_expert):
    if method in CONTROLS:
        return
    experts, _ = told()
    twins = {**experts, "twin1": experts["e03"], "twin2": experts["e03"], "twin3": experts["e07"]}
    for k in (3, 8, 12):
        found = cluster(twins, method=method, k=k)
        groups = [set(held) for held in found.clusters.values()] + [set(found.outliers)]
        for pair in ({"e03", "twin1", "twin2"}, {"e07", "twin3"}):
            assert any(pair <= group for group in groups)


@every_clustering
def test_few_experts_and_equal_ones(method, make_expert, told):
    experts, _ = told()
    one = next(iter(experts.values()))
    alone = cluster({"a": one}, method=method, k=1)
    assert [*alone.clusters.get("0", ()), *alone.outliers] == ["a"]
    same = cluster(dict.fromkeys("abcdef", one), method=method, k="auto")
    assert same.clusters == {"0": list("abcdef")}


@every_clustering
def test_auto_finds_the_families(method, told):
    assert cluster(told()[0], method=method, k="auto").k == 3


def test_the_control_has_the_sizes_of_mbc_and_other_members(lora_families):
    experts, _ = lora_families(sizes=(8, 6, 4))
    found = cluster(experts, k=3)
    controls = [cluster(experts, method="random", k=3, seed=seed) for seed in range(5)]
    for control in controls:
        assert [len(g) for g in control.clusters.values()] == [8, 6, 4]
        assert control.clusters != found.clusters
        assert control.silhouette < found.silhouette - 0.5
    assert len({str(control.clusters) for control in controls}) == 5


def test_cards_that_say_nothing_are_one_group(told):
    experts, family = told()
    silent = sorted(n for n, i in family.items() if i == 0)
    mixed = {n: Expert(e.base, e.deltas) if n in silent else e for n, e in experts.items()}
    assert silent in cluster(mixed, method="category").clusters.values()
    mute = {n: Expert(e.base, e.deltas, {"task": "?!"}) for n, e in experts.items()}
    for method in ("category", "text"):
        assert cluster(mute, method=method, k=4).clusters == {"0": sorted(mute)}


def test_outliers_are_named_apart(lora_families, make_expert):
    import torch

    experts, _ = lora_families(sizes=(16, 14, 10))
    generator = torch.Generator().manual_seed(99)
    strangers = {f"stranger{i}": make_expert(generator) for i in range(2)}
    found = cluster({**experts, **strangers}, method="hdbscan")
    assert found.outliers == ("stranger0", "stranger1")
    assert (found.k, len(found.clusters)) == (3, 3)
    inside = cluster(experts, method="hdbscan")
    assert found.clusters == inside.clusters
    assert found.silhouette == pytest.approx(inside.silhouette, abs=0.05)


def test_the_dendrogram_is_of_the_cosines(lora_families):
    """Average linkage written out: the two groups with the smallest mean of 1 - cos merge next."""
    experts, _ = lora_families(noise=1.0)
    found = cluster(experts, method="agglomerative", k=4)
    gaps = 1 - found.similarity
    groups = {i: [i] for i in range(len(gaps))}
    for step, (left, right, height, size) in enumerate(found.tree):
        pairs = {
            (i, j): gaps[np.ix_(groups[i], groups[j])].mean()
            for i in groups
            for j in groups
            if i < j
        }
        nearest = min(pairs, key=pairs.__getitem__)
        assert {int(left), int(right)} == set(nearest)
        assert height == pytest.approx(pairs[nearest], abs=1e-9)
        groups[len(gaps) + step] = groups.pop(int(left)) + groups.pop(int(right))
        assert len(groups[len(gaps) + step]) == size
        if len(groups) == 4:
            wanted = {frozenset(found.names[i] for i in held) for held in groups.values()}
    assert {frozenset(held) for held in found.clusters.values()} == wanted
