"""Another expert joins a clustering, fresh or saved; and what is saved is what was made."""

import numpy as np
import pytest

from adaptlib.clustering import (
    CONTROLS,
    assign,
    assign_kept,
    cluster,
    load_clustering,
    save_clustering,
)
from adaptlib.clustering.features import features
from adaptlib.errors import CorruptError, NotFoundError, UsageError
from adaptlib.experts import Library
from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta
from adaptlib.experts.records import load_record, save_record

every_kind = pytest.mark.parametrize("kind", ["factors", "gram", "sketches"])


@pytest.fixture
def library(tmp_path) -> Library:
    return Library.open(tmp_path / "library", create=True)


def parted(experts, family, rest):
    """Those that are there before, the newcomers, and the label of each family."""
    old = {n: e for n, e in experts.items() if n not in rest}
    return old, {n: experts[n] for n in rest}


def label_of(found, family):
    return {family[held[0]]: label for label, held in found.clusters.items()}


@every_kind
@pytest.mark.parametrize("method", ["agglomerative", "hdbscan", "mbc"])
def test_newcomers_join_their_family(lora_families, kind, method):
    experts, family = lora_families(sizes=(6, 5, 4))
    rest = ["e01", "e06", "e11", "e14"]
    old, new = parted(experts, family, rest)
    found = cluster(old, k=3, features=kind, method=method)
    assigned = assign(found, new, members=old)
    wanted = label_of(found, family)
    assert {n: a.label for n, a in assigned.items()} == {n: wanted[family[n]] for n in rest}
    assert list(assigned) == sorted(rest)
    assert all(0.5 < a.cosine <= 1 + 1e-9 for a in assigned.values())


def test_newcomers_of_any_rank_and_kind_join_their_family(mixed_families):
    experts, family = mixed_families()
    rest = ["e00", "e05", "e09", "e13"]
    old, new = parted(experts, family, rest)
    found = cluster(old, k=3)
    assert found.features == "sketches"
    wanted = label_of(found, family)
    assert {n: a.label for n, a in assign(found, new).items()} == {
        n: wanted[family[n]] for n in rest
    }


def test_above_64_members(lora_families):
    experts, family = lora_families(sizes=(40, 30, 20))
    rest = sorted(experts)[::9]
    old, new = parted(experts, family, rest)
    for kind in ("factors", "gram", "sketches"):
        found = cluster(old, k=3, features=kind)
        wanted = label_of(found, family)
        assigned = assign(found, new, members=old)
        assert {n: a.label for n, a in assigned.items()} == {n: wanted[family[n]] for n in rest}


@every_kind
def test_the_cosine_is_that_with_the_mean_of_the_members(lora_families, kind):
    """Written out: the mean of the unit rows of each group, in the features themselves."""
    experts, family = lora_families(noise=1.5)
    old, new = parted(experts, family, ["e02", "e07"])
    found = cluster(old, k=2, features=kind)
    both = cluster(experts, k=2, features=kind)  # of 12 experts no component is lost
    row = dict(zip(both.names, both.unit, strict=True))
    for name, told in assign(found, new, members=old).items():
        cosines = {}
        for label, held in found.clusters.items():
            mean = np.mean([row[n] for n in held], axis=0)
            cosines[label] = row[name] @ mean / np.linalg.norm(mean)
        best = max(cosines, key=cosines.__getitem__)
        assert told.label == best
        assert told.cosine == pytest.approx(cosines[best], abs=1e-4)


@every_kind
def test_a_member_under_another_name_joins_its_own_group(lora_families, kind):
    experts, _ = lora_families()
    found = cluster(experts, k=3, features=kind)
    again = {f"copy-of-{n}": e for n, e in experts.items()}
    for name, told in assign(found, again, members=experts).items():
        assert name.removeprefix("copy-of-") in found.clusters[told.label]


def test_modules_that_no_member_has_and_zeros(lora_families):
    experts, _ = lora_families()
    found = cluster(experts, k=3, features="sketches")
    some = experts["e03"]
    more = {**some.deltas, "extra": LoRADelta(some.deltas["layers.0.q_proj"].a * 9,
                                              some.deltas["layers.0.q_proj"].b)}  # fmt: skip
    zero = {m: LoRADelta(d.a * 0, d.b) for m, d in some.deltas.items()}
    told = assign(found, {"more": Expert("tiny", more), "zero": Expert("tiny", zero)})
    assert "e03" in found.clusters[told["more"].label]
    assert told["zero"].cosine == 0


def test_only_the_modules_that_were_compared_count(lora_families, make_expert):
    experts, _ = lora_families()
    for kind in ("factors", "gram", "sketches"):
        found = cluster(experts, k=3, features=features(experts, kind).kind, only=["layers.2"])
        one, other = experts["e03"], experts["e05"]
        mixed = {m: (one if "layers.2" in m else other).deltas[m] for m in one.deltas}
        told = assign(found, {"new": Expert("tiny", mixed)}, members=experts)
        assert "e03" in found.clusters[told["new"].label]


@every_kind
def test_saved_and_loaded_it_is_the_same(library, lora_families, kind):
    experts, family = lora_families()
    for name, expert in experts.items():
        library.add(expert, name)
    rest = ["e01", "e08"]
    old, new = parted(experts, family, rest)
    found = cluster(old, k=3, features=kind)
    assert save_clustering(library, "mine", found).startswith("sha256:")
    loaded = load_clustering(library, "mine")
    for key in ("method", "k", "seed", "features", "why", "clusters", "outliers", "silhouette",
                "names", "basis"):  # fmt: skip
        assert getattr(loaded, key) == getattr(found, key)
    assert np.allclose(loaded.unit, found.unit, atol=1e-6)
    assert np.allclose(loaded.similarity, found.similarity, atol=1e-6)
    wanted = assign(found, new, members=old)
    for told in (assign(loaded, new, members=old), assign_kept(library, "mine"),
                 assign_kept(library, "mine", rest)):  # fmt: skip
        assert {n: a.label for n, a in told.items()} == {n: a.label for n, a in wanted.items()}
        for name, one in told.items():
            assert one.cosine == pytest.approx(wanted[name].cosine, abs=1e-3)
    assert assign_kept(library, "mine", []) == {}


def test_the_document(library, lora_families):
    experts, _ = lora_families()
    for name, expert in experts.items():
        library.add(expert, name)
    found = cluster(experts, k=3, method="agglomerative")
    save_clustering(library, "mine", found)
    document = load_record(library.store, "clusterings", "mine")
    assert document["schema"] == "adaptlib.clustering/1"
    assert document["experts"] == library.names()
    assert document["clusters"] == found.clusters
    assert document["options"]["sparsity"] == 0.5
    assert np.array_equal(load_clustering(library, "mine").tree, found.tree)
    for name in experts:
        library.remove(name)
    library.gc(allow_empty=True)
    assert load_clustering(library, "mine").clusters == found.clusters  # its blob was kept


def test_members_are_found_by_digest_whatever_their_names_mean(library, lora_families):
    experts, family = lora_families()
    for name, expert in experts.items():
        library.add(expert, name)
    rest = ["e01"]
    old, _ = parted(experts, family, rest)
    save_clustering(library, "mine", cluster(old, k=3, features="factors"))
    wanted = assign_kept(library, "mine", rest)
    for name in sorted(old)[:5]:
        library.remove(name)
    assert assign_kept(library, "mine", rest) == wanted


def test_one_that_an_earlier_version_saved(library, lora_families):
    experts, _ = lora_families()
    for name, expert in experts.items():
        library.add(expert, name)
    found = cluster(experts, k=3)
    document = {
        "schema": "adaptlib.clustering/1",
        "method": "mbc",
        "k": 3,
        "seed": 0,
        "features": "factors",
        "clusters": found.clusters,
        "experts": library.names(),
    }
    save_record(library.store, "clusterings", "old", document)
    loaded = load_clustering(library, "old")
    assert (loaded.clusters, loaded.k, loaded.names) == (found.clusters, 3, found.names)
    for use in (lambda: loaded.similarity, lambda: assign(loaded, experts, members=experts)):
        with pytest.raises(UsageError, match="earlier version") as caught:
            use()
        assert "save it" in str(caught.value.hint)


def test_what_cannot_be_assigned(lora_families, sparse_families):
    experts, _ = lora_families()
    for method in CONTROLS:
        with pytest.raises(UsageError, match=f"by {method}"):
            assign(cluster(experts, k=3, method=method), experts, members=experts)
    by_factors = cluster(experts, k=3)
    with pytest.raises(UsageError, match="members="):
        assign(by_factors, experts)
    with pytest.raises(UsageError, match="by factors; got features by sketches"):
        assign(by_factors, features(experts, "sketches"))
    by_sketches = cluster(experts, k=3, features="sketches")
    with pytest.raises(UsageError, match="seed 0 and size 16"):
        assign(by_sketches, features(experts, "sketches", size=8))
    with pytest.raises(UsageError, match="sparse"):
        assign(by_factors, sparse_families()[0], members=experts)


def test_what_is_no_clustering(library):
    with pytest.raises(NotFoundError, match="no clusterings named 'mine'"):
        load_clustering(library, "mine")
    for document in (
        {"schema": "adaptlib.clustering/9"},
        {"schema": "adaptlib.clustering/1", "experts": {}},
        {"schema": "adaptlib.clustering/1"},
    ):
        save_record(library.store, "clusterings", "mine", document)
        with pytest.raises(CorruptError, match="clusterings/mine"):
            load_clustering(library, "mine")
