"""Clustering a library: the same as of its experts, read from what `add` kept."""

import numpy as np
import pytest
import torch

from adaptlib.clustering import cluster, cluster_library, kept, library_features
from adaptlib.clustering.features import features
from adaptlib.errors import BaseMismatchError, NotFoundError, RefusedError, UsageError
from adaptlib.experts import Library
from adaptlib.experts.expert import Expert


@pytest.fixture
def keep(tmp_path):
    """Experts -> a library of them."""

    def make(experts) -> Library:
        library = Library.open(tmp_path / "library", create=True)
        for name, expert in experts.items():
            library.add(expert, name)
        return library

    return make


@pytest.fixture
def unread(monkeypatch):
    """From then on, no features are made of experts."""

    def made(*_, **options):
        raise AssertionError(f"features were made of experts: {options}")

    def forbid():
        monkeypatch.setattr(kept, "features", made)
        monkeypatch.setattr("adaptlib.experts.sketches.sketch_expert", made)

    return forbid


def test_sketches_give_the_groups_of_the_experts_and_read_none(keep, mixed_families, unread):
    experts, _ = mixed_families()
    library = keep(experts)
    wanted = cluster(experts, k=3)
    unread()
    found = cluster_library(library, k=3)
    assert found.clusters == wanted.clusters
    assert found.basis == wanted.basis == "delta sketches (LoRA and sparse experts)"
    assert np.allclose(found.similarity, wanted.similarity, atol=2e-4)  # float16
    assert found.options == wanted.options


def test_factors_and_exact_products_are_those_of_the_experts(keep, lora_families):
    experts, _ = lora_families()
    library = keep(experts)
    for kind in ("auto", "factors", "gram"):
        found, wanted = cluster_library(library, k=3, features=kind), cluster(
            experts, k=3, features=kind
        )  # fmt: skip
        assert found.clusters == wanted.clusters
        assert np.array_equal(found.unit, wanted.unit)
        assert (found.basis, found.options) == (wanted.basis, wanted.options)


def test_auto_says_the_same_of_a_library_as_of_its_experts(
    keep, lora_families, mixed_families, make_expert
):
    experts, _ = lora_families(sizes=(2, 2))
    one = make_expert(torch.Generator().manual_seed(0), rank=2)
    fewer = Expert("tiny", {m: d for m, d in one.deltas.items() if "0" not in m})
    library = keep({**experts, "rank2": one, "fewer": fewer, **mixed_families(sizes=(4,))[0]})
    for names in (list(experts), ["e00", "rank2"], ["rank2", "fewer"], list(library)):
        loaded = {name: library[name] for name in names}
        assert str(library_features(library, names)) == str(features(loaded))
    same = {"only": ["layers.3"]}
    assert library_features(library, ["rank2", "fewer"], **same).kind == "factors"


def test_many_experts_are_compared_by_sketches(keep, lora_families, monkeypatch, unread):
    library = keep(lora_families()[0])
    monkeypatch.setattr(kept, "MANY", 11)
    unread()
    assert library_features(library).why == "more than 11 experts"


def test_only_some_modules(keep, mixed_families):
    experts, _ = mixed_families()
    library = keep(experts)
    found = library_features(library, None, "sketches", only=["down_proj"])
    wanted = features(experts, "sketches", only=["down_proj"])
    assert found.options == wanted.options
    scales = np.abs(wanted.matrix).max(axis=1) / np.abs(found.matrix).max(axis=1)
    assert np.allclose(found.matrix * scales[:, None], wanted.matrix, atol=2e-3 * scales.max())
    with pytest.raises(UsageError, match="no module fits 'qproj'"):
        library_features(library, None, "sketches", only=["qproj"])


def test_an_expert_without_the_modules_is_named(keep, make_expert):
    whole = make_expert(torch.Generator().manual_seed(0))
    part = Expert("tiny", {m: d for m, d in whole.deltas.items() if "q_proj" in m})
    library = keep({"part": part, "whole": whole})
    for kind in ("auto", "factors", "sketches"):
        with pytest.raises(UsageError, match="'part' has no module that fits down_proj"):
            library_features(library, None, kind, only=["down_proj"])


def test_cards_are_read_only_by_methods_that_read_texts(keep, lora_families, monkeypatch):
    experts, family = lora_families(sizes=(20, 16, 14))
    said = {n: Expert(e.base, e.deltas, {"category": str(family[n])}) for n, e in experts.items()}
    library = keep(said)
    asked = []
    read = kept.read_manifest
    monkeypatch.setattr(kept, "read_manifest", lambda *a: (asked.append(a[2]), read(*a))[1])
    cluster_library(library, k=3, features="sketches")
    assert len(set(asked)) < 25  # what checks annotations in tests looks at one a call
    found = cluster_library(library, method="category", features="sketches")
    assert found.clusters == cluster(said, method="category").clusters
    assert found.k == 3


def test_bad_input(keep, lora_families, make_expert, tmp_path):
    library = keep(lora_families(sizes=(3, 2))[0])
    empty = Library.open(tmp_path / "empty", create=True)
    for call in (lambda: cluster_library(empty), lambda: library_features(empty)):
        with pytest.raises(UsageError, match="no experts"):
            call()
    with pytest.raises(NotFoundError, match="nobody"):
        cluster_library(library, ["e00", "nobody"], k=1)
    with pytest.raises(UsageError, match="6 groups cannot be made of 5"):
        cluster_library(library, k=6)
    with pytest.raises(UsageError, match="no clustering is called 'kmeans'"):
        cluster_library(library, method="kmeans")
    with pytest.raises(UsageError, match="features are auto, factors, gram or sketches"):
        cluster_library(library, k=2, features="weights")
    library.add(make_expert(torch.Generator().manual_seed(1), base="other"), "stranger")
    for kind in ("auto", "sketches", "gram"):
        with pytest.raises(BaseMismatchError, match="2 base models"):
            cluster_library(library, k=2, features=kind)


def test_numbers_too_large_are_refused_at_clustering_and_not_at_add(keep, lora_families):
    experts, _ = lora_families(sizes=(3, 2))
    ill = experts["e01"]
    ill.deltas["layers.2.q_proj"].b.fill_(1e30)
    ill.deltas["layers.2.q_proj"].a.fill_(1e30)
    library = keep(experts)
    with pytest.raises(RefusedError, match="'e01'"):
        cluster_library(library, k=2, features="sketches")
