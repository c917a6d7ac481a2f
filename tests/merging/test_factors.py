"""Factors of updates, their singular values, and what of them is kept."""

import numpy as np
import pytest
import torch

from adaptlib.experts import LoRADelta
from adaptlib.merging.factors import Factors, dense_svd, factors, stacked, svd_of
from adaptlib.merging.iso_c import iso_c
from adaptlib.merging.kept import Form, keep
from adaptlib.merging.tsv import orthogonal, tsv
from tests.merging.slow import matrix
from tests.merging.slow_spectral import (
    CASES,
    D_IN,
    D_OUT,
    WEIGHTS,
    close,
    dense,
    part,
    scaled,
    small,
    spectrum,
)
from tests.tiny import lora

every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_the_svd_in_factor_space(case):
    deltas = CASES[case]()
    weights = WEIGHTS[: len(deltas)]
    found = svd_of(stacked(deltas, weights))
    wanted = sum(scaled(part(deltas, weights)))
    _, s, _ = spectrum(wanted)
    assert len(found.s) == len(s)
    np.testing.assert_allclose(found.s, s, rtol=1e-5, atol=1e-6 * s[0])
    close(dense(found.u * found.s @ found.vt), wanted)
    for q in (found.u, found.vt.T):
        np.testing.assert_allclose(q.T @ q, np.eye(len(s)), atol=1e-5)


def test_the_svd_of_factors_of_very_different_sizes():
    """An expert with a large A and a small B weighs what its product weighs."""
    one, other = small(0), small(1)
    odd = LoRADelta(other.a * 1e6, other.b * 1e-6, other.scale)
    found = svd_of(stacked([one, odd], (1.0, 1.0)))
    close(dense(found.u * found.s @ found.vt), matrix(one) + matrix(other))
    assert len(found.s) == 4


def test_the_svd_of_small_singular_values():
    """What is above the noise of float32 is there, to its own precision, and nothing else."""
    q, _ = torch.linalg.qr(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).double())
    p, _ = torch.linalg.qr(torch.randn(20, 4, generator=torch.Generator().manual_seed(1)).double())
    s = torch.tensor([1.0, 1e-2, 1e-4, 1e-9]).double()
    found = svd_of(Factors(p * s, q.T))
    np.testing.assert_allclose(found.s, s[:3], rtol=1e-6)
    np.testing.assert_allclose(abs(found.u.T @ p[:, :3]), np.eye(3), atol=1e-6)


def test_the_svd_of_zeros():
    zero = LoRADelta(torch.ones(2, D_IN), torch.zeros(D_OUT, 2))
    found = svd_of(factors(zero))
    assert found.s.tolist() == [0.0]
    assert not (found.u * found.s @ found.vt).any()


def test_columns_that_depend_on_one_another_are_made_orthonormal_where_they_are():
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double()
    q = orthogonal(torch.cat([x, x], dim=1))
    s = np.linalg.svd(q.numpy(), compute_uv=False)
    np.testing.assert_allclose(s, [1, 1, 0, 0], atol=1e-9)
    np.testing.assert_allclose(q[:, :2], q[:, 2:])


def test_what_is_lost_is_counted_where_not_all_values_are_computed():
    """A randomized SVD loses more than the optimum; the error says how much, to 0 if nothing."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(160, 200, generator=generator)
    delta = LoRADelta(torch.ones(1, 200), torch.ones(160, 1))
    kept = keep(w, [delta], Form("lora", 4))
    away = ((dense(kept.delta) - w.double().numpy()) ** 2).sum()
    assert kept.lost == pytest.approx(away, rel=1e-5)
    assert kept.whole == pytest.approx(float(w.double().square().sum()))
    exact = torch.randn(160, 3, generator=generator) @ torch.randn(3, 200, generator=generator)
    kept = keep(exact, [delta], Form("lora", 4))
    assert (kept.lost / kept.whole) ** 0.5 < 2e-6
    assert len(dense_svd(w, 4).s) == 4


@pytest.mark.parametrize("merge", [iso_c, tsv])
def test_results_are_of_low_rank(merge):
    wide = [lora(s, rank=2, d_out=40, d_in=60) for s in range(3)]
    got = merge(part(wide))
    assert isinstance(got, LoRADelta)
    assert got.rank == 6
