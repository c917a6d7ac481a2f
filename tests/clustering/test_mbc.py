"""MBC against the same thing written out slowly, against planted families, and on bad input."""

import json
import os
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from sklearn.decomposition import TruncatedSVD
from sklearn.metrics import adjusted_rand_score

import adaptlib
from adaptlib.clustering import cluster, cosine_matrix, factor_features, mbc, sketch_features
from adaptlib.errors import BaseMismatchError, RefusedError, UsageError
from adaptlib.experts.codec import pack, write_directory
from adaptlib.experts.expert import Expert
from adaptlib.experts.lora import LoRADelta

ROOT = Path(__file__).parents[2]


def rand_index(clusters, family):
    """1 where the clusters are the families, about 0 where they have nothing to do with them."""
    found = {name: label for label, names in clusters.items() for name in names}
    names = sorted(family)
    return adjusted_rand_score([family[n] for n in names], [found[n] for n in names])


def as_sets(clusters):
    return {frozenset(names) for names in clusters.values()}


@pytest.mark.parametrize("sizes", [(5, 4, 3), (7, 1, 6, 2, 4), (12, 8)])
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_mbc_equals_the_slow_one(lora_families, slow_mbc, inertia_of, sizes, sparsity):
    experts, _ = lora_families(seed=len(sizes), sizes=sizes, noise=0.7)
    matrix, names = factor_features(experts)
    groups, cosines, least = slow_mbc(matrix, names, len(sizes), sparsity)
    found = cluster(experts, k=len(sizes), sparsity=sparsity)
    assert np.allclose(found.similarity, cosines, atol=1e-9)
    assert as_sets(found.clusters) == groups
    assert inertia_of(cosines, names, as_sets(found.clusters)) == pytest.approx(least, rel=1e-9)


def test_mbc_equals_the_slow_one_on_sketches(mixed_families, slow_mbc):
    experts, _ = mixed_families(seed=1)
    matrix, names = sketch_features(experts)
    groups, cosines, _ = slow_mbc(matrix, names, 3, sparsity=None)
    found = cluster(experts, k=3)
    assert found.features == "sketches"
    assert np.allclose(found.similarity, cosines, atol=1e-9)
    assert as_sets(found.clusters) == groups


def test_the_svd_is_that_of_the_authors(lora_families):
    """More than 64 experts, so that components are lost: the same cosines as the authors' call."""
    experts, _ = lora_families(sizes=(20, 20, 20, 20, 10), noise=1.0)
    matrix, _ = factor_features(experts)
    rows = matrix.astype(np.float64)
    rows[np.abs(matrix) <= np.quantile(np.abs(matrix), 0.5, axis=1)[:, None]] = 0
    embedding = TruncatedSVD(
        n_components=64, algorithm="randomized", n_iter=5, n_oversamples=10, random_state=7
    ).fit_transform(rows)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    wanted = embedding @ embedding.T
    assert np.allclose(cosine_matrix(matrix, sparsity=0.5, seed=7), wanted, atol=1e-8)
    exact = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert not np.allclose(exact @ exact.T, wanted, atol=1e-2)  # the SVD does do something


@pytest.mark.parametrize("seed", range(5))
def test_planted_families_are_found(lora_families, sparse_families, mixed_families, seed):
    for make, basis in [
        (lora_families, "LoRA factors (same modules and ranks)"),
        (sparse_families, "delta sketches (experts are sparse)"),
        (mixed_families, "delta sketches (LoRA and sparse experts)"),
    ]:
        experts, family = make(seed=seed)
        found = cluster(experts, k=3, seed=seed)
        assert found.basis == basis
        assert rand_index(found.clusters, family) == 1


def test_auto_finds_the_planted_number(lora_families, sparse_families):
    for sizes in [(5, 4, 3), (6, 6), (4, 4, 3, 3, 3)]:
        for make in (lora_families, sparse_families):
            experts, family = make(sizes=sizes)
            found = cluster(experts, k="auto")
            assert found.k == len(found.clusters) == len(sizes)
            assert rand_index(found.clusters, family) == 1
            assert found.silhouette is not None
            assert found.silhouette > 0.3


def test_labels_fall_in_size_and_names_are_sorted(lora_families):
    experts, _ = lora_families(sizes=(3, 6, 3))
    clusters = mbc(experts, 3)
    assert list(clusters) == ["0", "1", "2"]
    assert [len(names) for names in clusters.values()] == [6, 3, 3]
    assert clusters["1"][0] < clusters["2"][0]
    assert all(names == sorted(names) for names in clusters.values())
    assert clusters == mbc(experts, k=3) == adaptlib.mbc(experts, k=3, seed=0)


def test_two_processes_agree(tmp_path, lora_families):
    experts, _ = lora_families(sizes=(9, 8, 7), noise=2.0)  # no clear groups: the seed decides
    for name, expert in experts.items():
        write_directory(pack(expert), tmp_path / name)
    script = """
        import json, pathlib, sys
        from adaptlib import mbc
        from adaptlib.experts.codec import read_directory, unpack
        places = sorted(pathlib.Path(sys.argv[1]).iterdir())
        experts = {place.name: unpack(read_directory(place)) for place in places}
        print(json.dumps([mbc(experts, k=5, seed=3), mbc(experts, k=5, features="sketches")]))
    """
    running = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(i)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in (1, 2)
    ]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1]
    assert json.loads(outputs[0])[0] == mbc(experts, k=5, seed=3)


@pytest.mark.parametrize("kind", ["factors", "sketches"])
def test_the_order_of_the_experts_does_not_matter(lora_families, kind):
    experts, _ = lora_families(sizes=(9, 8, 7), noise=2.0)
    backwards = dict(reversed(experts.items()))
    one, other = (cluster(e, k=5, features=kind) for e in (experts, backwards))
    assert one.clusters == other.clusters
    assert np.array_equal(one.similarity, other.similarity)


def test_identical_experts_are_never_parted(make_expert):
    generator = torch.Generator().manual_seed(0)
    one, other = make_expert(generator), make_expert(generator)
    assert mbc({f"e{i}": one for i in range(6)}, k=3) == {"0": [f"e{i}" for i in range(6)]}
    twins = {"a1": one, "a2": one, "a3": one, "b1": other, "b2": other}
    for k in (2, 3, 5, "auto"):
        assert mbc(twins, k) == {"0": ["a1", "a2", "a3"], "1": ["b1", "b2"]}
    found = cluster({f"e{i}": one for i in range(6)}, k="auto")
    assert (found.k, found.silhouette) == (1, None)


@pytest.mark.parametrize("kind", ["factors", "sketches"])
def test_zero_experts_are_alike_and_like_no_other(lora_families, kind):
    experts, _ = lora_families(sizes=(5, 4))
    shape = next(iter(experts.values())).deltas
    zero = Expert(
        "tiny", {n: LoRADelta(d.a * 0, d.b * 0, d.scale) for n, d in shape.items()}
    )  # fmt: skip
    found = cluster({**experts, "zero1": zero, "zero2": zero}, k=3, features=kind)
    assert ["zero1", "zero2"] in found.clusters.values()
    assert not found.similarity[-2:].any()
    assert np.isfinite(found.similarity).all()
    assert mbc({"x": zero, "y": zero}, k=2) == {"0": ["x", "y"]}


def test_an_untrained_lora_is_zero_by_sketches_only(lora_families):
    """B = 0: ΔW is zero and A is not. Half its factors are exact zeros, which the authors' own
    check on the share of zeros stumbles over."""
    experts, _ = lora_families(sizes=(5, 4))
    some = next(iter(experts.values()))
    fresh = Expert(
        "tiny", {n: LoRADelta(torch.ones_like(d.a) + d.a, d.b * 0) for n, d in some.deltas.items()}
    )
    by_sketch = cluster({**experts, "fresh": fresh}, k=3, features="sketches")
    assert not by_sketch.similarity[-1].any()
    assert cluster({**experts, "fresh": fresh}, k=3).similarity[-1, -1] == pytest.approx(1)


def test_few_experts(make_expert):
    generator = torch.Generator().manual_seed(0)
    experts = {name: make_expert(generator) for name in "abc"}
    assert mbc({"a": experts["a"]}, k=1) == {"0": ["a"]}
    assert mbc({"a": experts["a"]}, k="auto") == {"0": ["a"]}
    two = {name: experts[name] for name in "ab"}
    assert mbc(two, k=2) == {"0": ["a"], "1": ["b"]}
    assert mbc(two, k="auto") == {"0": ["a", "b"]}
    assert mbc(experts, k=3) == {"0": ["a"], "1": ["b"], "2": ["c"]}
    assert len(mbc(experts, k="auto")) == 2


@pytest.mark.parametrize("k", [0, -1, True])
def test_a_k_that_is_no_number_of_groups(lora_families, k):
    with pytest.raises(UsageError, match=f"k is a number of groups.*got {k}"):
        mbc(lora_families()[0], k)


@pytest.mark.parametrize("k", [2.0, "ten", None])
def test_a_k_of_another_type(lora_families, k):
    # Where annotations are checked, theirs is the first word.
    with pytest.raises((UsageError, TypeCheckError)):
        mbc(lora_families()[0], k)


def test_more_groups_than_experts(lora_families):
    with pytest.raises(UsageError, match="13 groups cannot be made of 12 experts") as caught:
        mbc(lora_families()[0], k=13)
    assert "1 to 12" in str(caught.value.hint)
    with pytest.raises(UsageError, match=r"10 groups cannot be made of 1 expert$"):
        mbc(dict(list(lora_families()[0].items())[:1]))


def test_other_bad_input(lora_families, make_expert):
    experts, _ = lora_families()
    for k in (10, "auto"):
        with pytest.raises(UsageError, match="no experts"):
            mbc({}, k)
    with pytest.raises(UsageError, match="no clustering is called 'kmeans'; there are aggl"):
        cluster(experts, method="kmeans")
    for sparsity in (-0.1, 1.0, float("nan")):
        with pytest.raises(UsageError, match="sparsity is a share"):
            mbc(experts, 3, sparsity=sparsity)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(BaseMismatchError, match="'stranger'"):
        mbc({**experts, "stranger": make_expert(generator, base="other")}, 3)
    ill = make_expert(generator)
    ill.deltas["layers.0.q_proj"].a[0, 0] = float("nan")
    with pytest.raises(RefusedError, match="'ill'"):
        mbc({**experts, "ill": ill}, 3)


def test_the_rows_are_not_changed_and_not_copied():
    matrix = np.random.default_rng(0).standard_normal((8, 1_000_000), dtype=np.float32)
    before = matrix.copy()
    tracemalloc.start()
    cosine_matrix(matrix)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(matrix, before)
    assert peak < matrix.nbytes  # one row at a time, and a chunk of columns in float64
