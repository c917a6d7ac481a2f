"""The projection of sketches: against loops over all entries, and its errors."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from adaptlib.experts import LoRADelta, SparseDelta
from adaptlib.experts.projection import order, signs, sketch_lora, sketch_sparse
from tests.tiny import lora, sparse


def slow(dense: np.ndarray, *, seed: int, size: int) -> np.ndarray:
    """Each entry goes to (h_out(i) + h_in(j)) modulo size, with the sign s_out(i) s_in(j)."""
    found = np.zeros(size)
    places, marks = [], []
    for side, width in zip(("out", "in"), dense.shape, strict=True):
        position = {int(index): p for p, index in enumerate(order(side, width))}
        assert sorted(position) == list(range(width))
        places.append(position)
        marks.append(signs(seed, side, width))
    for i, row in enumerate(dense.tolist()):
        for j, entry in enumerate(row):
            p, q = places[0][i], places[1][j]
            found[(p + q) % size] += entry * float(marks[0][p]) * float(marks[1][q])
    return found


@pytest.mark.parametrize("size", [1, 4, 9, 256])
@pytest.mark.parametrize(("d_out", "d_in"), [(3, 5), (32, 16), (16, 300)])
def test_it_is_what_loops_over_all_entries_give(size: int, d_out: int, d_in: int) -> None:
    for delta in (
        lora(3, rank=2, d_out=d_out, d_in=d_in),
        lora(4, rank=3, d_out=d_out, d_in=d_in, dtype=torch.bfloat16),
        sparse(5, n=14, d_out=d_out, d_in=d_in),
    ):
        wanted = slow(delta.dense().double().numpy(), seed=7, size=size)
        if isinstance(delta, LoRADelta):
            a, b = delta.a.float().numpy(), delta.b.float().numpy()
            found = sketch_lora(a, b, delta.scale, seed=7, size=size)
        else:
            values = delta.values.numpy()
            found = sketch_sparse(delta.index.numpy(), values, delta.shape, seed=7, size=size)
        assert found.dtype == np.float32
        assert found.shape == (size,)
        assert np.allclose(found, wanted, atol=1e-5 * np.abs(wanted).max() + 1e-6)


def test_blocks_are_their_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = sparse(2, n=5, d_out=48, d_in=64, block=16)
    wanted = slow(delta.dense().double().numpy(), seed=1, size=64)
    for chunk in (1 << 18, 100):  # in one piece, and block by block
        monkeypatch.setattr("adaptlib.experts.projection.CHUNK", chunk)
        assert np.allclose(delta.sketch(seed=1, size=8).reshape(-1), wanted, atol=1e-4)


def test_an_empty_update_is_zero() -> None:
    none = SparseDelta(torch.tensor([], dtype=torch.int32), torch.tensor([]), (6, 7))
    assert not none.sketch().any()


@pytest.mark.parametrize("rank", [1, 16])
def test_the_error_is_that_of_as_many_numbers_at_any_rank(rank: int) -> None:
    """√(2 / size) of the lengths or less; a projection from both sides has √(4 / √size) at rank 1,
    which is 4 times as much here."""
    one, other = (lora(seed, rank=rank, d_out=300, d_in=200) for seed in (1, 2))
    size = one.norm() * other.norm()
    errors = [
        (one.sketch(seed=s) * other.sketch(seed=s)).sum().item() - one.inner(other)
        for s in range(100)
    ]
    error = float(np.std(errors)) / size
    assert 0.3 * math.sqrt(2 / 256) < error < 1.2 * math.sqrt(2 / 256)
    assert abs(np.mean(errors)) < 4 * np.std(errors) / 10


def test_signs_are_fair_and_differ_by_seed_and_side() -> None:
    rows = [signs(seed, side, 1000) for seed in range(4) for side in ("out", "in")]
    for i, row in enumerate(rows):
        assert set(np.unique(row)) == {-1.0, 1.0}
        for other in rows[:i]:
            assert abs(float(row @ other)) < 150
    assert (order("out", 500) != order("in", 500)).any()


def test_it_needs_no_torch() -> None:
    code = (
        "import sys, adaptlib.experts.sketches;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'scipy', 'jaxtyping')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
