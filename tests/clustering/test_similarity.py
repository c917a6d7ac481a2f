"""The embedding: K-means on 64 columns is K-means on the cosine matrix, however it was found."""

import tracemalloc

import numpy as np
import pytest

from adaptlib.clustering.similarity import Embedding, cosines, embed, feature_axes, from_gram


def some_rows(count, seed=0, *, families=5, width=300, noise=0.5):
    random = np.random.default_rng(seed)
    centres = random.standard_normal((families, width))
    rows = centres[np.arange(count) % families] + noise * random.standard_normal((count, width))
    return (rows * random.uniform(0.5, 2, (count, 1))).astype(np.float32)


@pytest.mark.parametrize("count", [3, 40, 200])
def test_points_have_the_distances_of_the_rows_of_the_cosine_matrix(count):
    unit, _ = embed(some_rows(count), sparsity=None)
    experts = Embedding.of(tuple(f"{i:04}" for i in range(count)), unit)
    similarity = unit @ unit.T
    wanted = np.linalg.norm(similarity[:, None] - similarity[None], axis=2)
    found = np.linalg.norm(experts.points[:, None] - experts.points[None], axis=2)
    assert np.allclose(found, wanted, atol=1e-6)
    assert experts.points.shape[1] <= 64


@pytest.mark.parametrize("count", [40, 150])
@pytest.mark.parametrize("sparsity", [None, 0.5])
@pytest.mark.parametrize("alike", [False, True])
def test_rows_and_their_products_give_one_embedding_up_to_a_turn(count, sparsity, alike):
    """Each has the other's cosines; above 64 experts components are lost, and they are the same."""
    rows = some_rows(count)
    options = {"sparsity": sparsity, "alike": alike, "seed": 3}
    by_products, weights = embed(rows, **options)
    by_rows, axes = embed(rows, **options, many=0)
    assert np.allclose(by_rows @ by_rows.T, by_products @ by_products.T, atol=2e-6)
    exact = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    lost = np.abs(exact @ exact.T - by_rows @ by_rows.T).max()
    assert (lost > 1e-3) == (count > 64 or sparsity is not None)
    assert weights.shape == (count, min(64, count))
    assert axes.shape == (300, min(64, count))


def test_of_length_one_before_the_svd_the_large_do_not_push_out_the_small():
    """70 experts a thousand times as large as the 10 in two families."""
    random = np.random.default_rng(0)
    large = 1000 * random.standard_normal((70, 400))
    small = some_rows(10, families=2, width=400)
    rows = np.concatenate([large, small]).astype(np.float32)
    for many in (0, 1024):
        exact = rows[70:] / np.linalg.norm(rows[70:], axis=1, keepdims=True)
        one, other = (
            np.abs(cosines(embed(rows, sparsity=None, alike=alike, many=many)[0])[70:, 70:]
            - exact @ exact.T).max()
            for alike in (True, False)
        )  # fmt: skip
        assert one < 0.7 * other


@pytest.mark.parametrize("many", [0, 1024])
def test_equal_rows_are_equal_to_the_last_bit_and_zeros_are_zero(many):
    rows = some_rows(90)
    rows[[3, 50, 71]] = rows[10]
    rows[[0, 89]] = 0
    unit, _ = embed(rows, sparsity=None, many=many)
    experts = Embedding.of(tuple(f"{i:02}" for i in range(90)), unit)
    for table in (unit, experts.points, cosines(unit)):
        assert len({table[i].tobytes() for i in (3, 10, 50, 71)}) == 1
        assert not table[[0, 89]].any()
    assert len(np.unique(experts.points, axis=0)) == 90 - 3 - 1
    gaps = ((experts.apart[:, None] - experts.apart[None]) ** 2).sum(axis=2) / 2
    assert np.allclose(gaps[0, 1:89], 1)
    assert gaps[0, 89] == 0


def test_the_gram_matrix_is_enough():
    rows = some_rows(50).astype(np.float64)
    unit, weights = from_gram(rows @ rows.T)
    wanted = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.allclose(unit @ unit.T, wanted @ wanted.T, atol=1e-9)
    assert np.allclose((wanted @ wanted.T) @ weights, unit, atol=1e-7)


@pytest.mark.parametrize("many", [0, 1024])
def test_weights_put_a_row_where_it_is(many):
    rows = some_rows(40)
    unit, weights = embed(rows, sparsity=None, alike=True, many=many)
    if many:
        weights = feature_axes(rows, weights)
    placed = rows @ weights / np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.allclose(placed, unit, atol=1e-5)


def test_many_experts_take_no_square_of_memory():
    rows = some_rows(6000, width=64).astype(np.float16)
    tracemalloc.start()
    unit, _ = embed(rows, sparsity=None, alike=True)
    Embedding.of(tuple(f"{i:05}" for i in range(6000)), unit)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6000 * 6000 * 8 / 4
