"""Measures and their controls, on families that are known."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from adaptlib.clustering import cluster
from adaptlib.clustering.agreement import measures
from adaptlib.experts.expert import Expert


@pytest.fixture
def planted(lora_families):
    """Experts, and cards whose category is the family and whose text is of two families one."""
    experts, family = lora_families(sizes=(9, 8, 7), noise=0.5)
    words = ["sum the numbers", "sum the numbers", "name the capital"]
    cards = {n: {"category": f"c{f}", "description": words[f]} for n, f in family.items()}
    return experts, cards


def test_mbc_is_next_to_its_controls(planted):
    experts, cards = planted
    found = {one.method: one for one in measures(cluster(experts, k=3), cards)}
    assert list(found) == ["mbc", "random", "text", "category"]
    mbc, random, text, category = found.values()
    assert (mbc.ari, mbc.nmi, mbc.stability) == (1, pytest.approx(1), 1)
    assert mbc.silhouette == pytest.approx(category.silhouette)
    assert mbc.silhouette > 0.5
    for control in (random.ari, random.stability, random.silhouette):
        assert control is not None
        assert control < 0.3
    assert 0.3 < text.ari < 0.9  # it cannot tell two families apart
    assert (text.k, category.k, category.ari, category.stability) == (2, 3, 1, None)


def test_ari_and_nmi_are_of_those_with_a_category(planted):
    experts, cards = planted
    found = cluster(experts, k=5)
    some = {name: card for i, (name, card) in enumerate(sorted(cards.items())) if i % 3}
    group = {name: label for label, names in found.clusters.items() for name in names}
    names = sorted(some)
    pair = [some[n]["category"] for n in names], [group[n] for n in names]
    first = measures(found, some)[0]
    assert first.ari == pytest.approx(adjusted_rand_score(*pair))
    assert first.nmi == pytest.approx(normalized_mutual_info_score(*pair))


def test_no_cards_leave_parameters_only(planted):
    experts, _ = planted
    for cards in (None, {}, {name: {"category": None, "task": ""} for name in experts}):
        found = measures(cluster(experts, k=3), cards)
        assert [one.method for one in found] == ["mbc", "random"]
        assert all(one.ari is one.nmi is None for one in found)


def test_a_control_is_not_there_twice(planted):
    experts, cards = planted
    experts = {name: Expert(e.base, e.deltas, cards[name]) for name, e in experts.items()}
    for method in ("random", "text", "category", "agglomerative", "hdbscan"):
        rows = [one.method for one in measures(cluster(experts, k=3, method=method), cards)]
        assert rows[0] == method
        assert len(rows) == len(set(rows))
        assert {"random", "text", "category"} <= set(rows)


def test_an_outlier_is_a_group_of_its_own(planted):
    """Outliers agree with a category only where it has one expert."""
    experts, cards = planted
    found = cluster(experts, k=3)
    lonely = replace(found, clusters={}, outliers=found.names, k=0)
    first = measures(lonely, cards)[0]
    assert first.k == 0
    assert first.silhouette is None
    assert first.ari == pytest.approx(0)
    own = {name: {"category": name} for name in experts}
    assert measures(lonely, own)[0].ari == 1


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_experts(planted, n):
    experts = dict(list(planted[0].items())[:n])
    for one in measures(cluster(experts, k=1), {name: planted[1][name] for name in experts}):
        assert one.stability is None
        assert one.silhouette is None or np.isfinite(one.silhouette)
