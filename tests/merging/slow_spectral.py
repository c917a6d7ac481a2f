"""The spectral merges slowly: the papers' formulas on dense float64 matrices, and tiny experts."""

import numpy as np
import torch

from adaptlib.experts import LoRADelta, SparseDelta
from adaptlib.merging import MERGES, Part
from tests.merging.slow import matrix
from tests.merging.slow import ties as slow_ties
from tests.tiny import lora, sparse

D_OUT, D_IN = 11, 14


def part(deltas, weights=None, count=None):
    n = len(deltas)
    weights = (1.0,) * n if weights is None else tuple(weights)
    return Part("m", tuple(deltas), weights, count or n, tuple(range(n)))


def small(seed, rank=2):
    return lora(seed, rank=rank, d_out=D_OUT, d_in=D_IN)


def thin(seed, n=25):
    return sparse(seed, n=n, d_out=D_OUT, d_in=D_IN)


def full(w):
    """Any matrix as a sparse update that holds all entries."""
    values = torch.as_tensor(w, dtype=torch.float32).reshape(-1)
    return SparseDelta(torch.arange(len(values)), values, w.shape)


def dense(update):
    return update.double().numpy() if isinstance(update, torch.Tensor) else matrix(update)


def made(name, *args, **options):
    return dense(MERGES[name].formula(*args, **options))


CASES = {
    "lora": lambda: [small(s) for s in range(3)],
    "ranks": lambda: [small(0, 1), small(1, 3), small(2, 4)],
    "sparse": lambda: [thin(s) for s in range(3)],
    "blocks": lambda: [sparse(s, n=2, d_out=32, d_in=48, block=16) for s in range(3)],
    "both": lambda: [small(0), thin(1), small(2, 3)],
    "more ranks than rows": lambda: [small(s, 5) for s in range(4)],
    "more ranks than rows, not columns": lambda: [small(s, 4) for s in range(3)],
    "one": lambda: [small(3, 4)],
    "one with zeros": lambda: [small(1), LoRADelta(torch.ones(2, D_IN), torch.zeros(D_OUT, 2))],
}
WEIGHTS = (1.0, -0.5, 2.0, 0.7)


# --- the papers' formulas, slowly ------------------------------------------------------------


def rank_of(s):
    return int((s > 1e-6 * s[0]).sum())


def spectrum(w):
    """The SVD without what is 0."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    few = rank_of(s) if s[0] > 0 else 0
    return u[:, :few], s[:few], vt[:few]


def scaled(p):
    return [w * matrix(delta) for w, delta in zip(p.weights, p.deltas, strict=True)]


def slow_iso_c(p, scale=1.0):
    u, s, vt = spectrum(sum(scaled(p)))
    return scale * s.mean() * u @ vt


def polar(x):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    few = s > 1e-4
    return u[:, few] @ vt[few]


def slow_tsv(p, scale=1.0):
    most = max(1, min(p.shape) // p.count)
    triplets = [spectrum(w) for w in scaled(p)]
    u = np.hstack([u[:, :most] for u, _, _ in triplets])
    s = np.concatenate([s[:most] for _, s, _ in triplets])
    v = np.hstack([vt[:most].T for _, _, vt in triplets])
    return scale * polar(u) @ np.diag(s) @ polar(v).T


def slow_knots(p, density=0.2, scale=1.0):
    u, s, vt = spectrum(np.hstack(scaled(p)))
    sv = np.split(s[:, None] * vt, len(p.deltas), axis=1)
    return u @ slow_ties(part([full(w) for w in sv]), density=density, scale=scale)


def slow_core(p, inner, scale=1.0):
    u, _, _ = spectrum(np.hstack(scaled(p)))
    _, _, vt = spectrum(np.vstack(scaled(p)))
    cores = part([full(u.T @ w @ vt.T) for w in scaled(p)], count=p.count)
    return u @ inner(cores, scale=scale) @ vt


def slow_wudi(p, scale=1.0, ridge=0.1):
    taus = [w for w in scaled(p) if w.any()]
    g = sum(w.T @ w / (w**2).sum() for w in taus)
    h = sum(w @ w.T @ w / (w**2).sum() for w in taus)
    if not ridge:
        return scale * h @ np.linalg.pinv(g, rcond=1e-11, hermitian=True)
    rho = ridge * len(taus) / np.linalg.matrix_rank(g)  # each has a trace of 1
    return scale * (h + rho * sum(taus)) @ np.linalg.inv(g + rho * np.eye(len(g)))


SLOW = {
    "core_space": lambda p, **o: slow_core(p, slow_ties, **o),
    "iso_c": slow_iso_c,
    "knots": slow_knots,
    "tsv": slow_tsv,
    "wudi": slow_wudi,
}


def loss(x, taus):
    """What WUDI minimises."""
    return sum((((x - w) @ w.T) ** 2).sum() / (w**2).sum() for w in taus)


def gradient(x, taus):
    return 2 * sum((x - w) @ w.T @ w / (w**2).sum() for w in taus)


def close(got, wanted, tolerance=2e-5):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * max(1, abs(wanted).max()))
