"""The spectral merges against the papers' formulas, and their laws."""

import numpy as np
import pytest
import torch

from adaptlib.errors import UsageError
from adaptlib.experts import Expert, LoRADelta, SparseDelta
from adaptlib.merging import MERGES
from adaptlib.merging.core_space import INNER
from adaptlib.merging.spaces import space_of
from adaptlib.merging.wudi import wudi
from tests.merging.slow import matrix
from tests.merging.slow_spectral import (
    CASES,
    D_IN,
    D_OUT,
    SLOW,
    WEIGHTS,
    close,
    dense,
    full,
    gradient,
    loss,
    made,
    part,
    scaled,
    slow_core,
    slow_iso_c,
    slow_tsv,
    slow_wudi,
    small,
    spectrum,
    thin,
)

every = pytest.mark.parametrize("name", SLOW)
every_case = pytest.mark.parametrize("case", CASES)


# --- each against its formula ----------------------------------------------------------------


@every_case
@every
def test_the_formula(name, case):
    deltas = CASES[case]()
    p = part(deltas, WEIGHTS[: len(deltas)])
    close(made(name, p), SLOW[name](p))
    close(made(name, p, scale=0.4), SLOW[name](p, scale=0.4))


@pytest.mark.parametrize("case", ["lora", "both", "more ranks than rows"])
@pytest.mark.parametrize(
    ("inner", "slow"),
    [
        ("iso_c", slow_iso_c),
        ("linear", lambda p, scale: scale * sum(scaled(p))),
        ("tsv", slow_tsv),
        ("wudi", slow_wudi),
    ],
)
def test_core_space_with_each_inner_merge(case, inner, slow):
    p = part(CASES[case](), WEIGHTS[: len(CASES[case]())])
    close(made("core_space", p, inner=inner, scale=0.6), slow_core(p, slow, scale=0.6))
    assert inner in INNER


@every
def test_experts_that_lack_the_module_count(name):
    p = part([small(0, 4), small(1, 4)], count=5)
    close(made(name, p), SLOW[name](p))
    if name == "tsv":  # a fifth of 11 singular values, not half
        assert abs(made(name, p) - made(name, part([small(0, 4), small(1, 4)]))).max() > 0.1


@every
def test_through_the_engine(name):
    experts = {f"e{i}": Expert("b", {"m": small(i)}, {}) for i in range(3)}
    got = MERGES[name](experts, weights={"e0": 2.0, "e1": -1.0, "e2": 1.0})
    assert got.kind == "lora"
    assert got.deltas["m"].rank <= 6
    assert got.card["merge"]["error"] == 0  # nothing was cut
    p = part([small(i) for i in range(3)], (2.0, -1.0, 1.0))
    close(matrix(got.deltas["m"]), SLOW[name](p))
    cut = MERGES[name](experts, rank=2)
    whole = SLOW[name](part([small(i) for i in range(3)]))
    s = np.linalg.svd(whole, compute_uv=False)
    best = np.sqrt((s[2:] ** 2).sum() / (s**2).sum())
    assert cut.card["merge"]["error"] == pytest.approx(best, rel=1e-3)


# --- laws ------------------------------------------------------------------------------------


@every
def test_only_the_matrices_count(name):
    """Other factors of the same ΔW, or the same ΔW held entry by entry, merge to the same."""
    generator = torch.Generator().manual_seed(5)
    turned, as_sparse = [], []
    for delta in CASES["ranks"]():
        r = torch.randn(delta.rank, delta.rank, generator=generator).double()
        r = r * 10.0 ** torch.arange(-1, delta.rank - 1)[:, None]  # and of other sizes
        a, b = r @ delta.a.double(), delta.b.double() @ torch.linalg.inv(r)
        turned.append(LoRADelta(a.float(), b.float() * delta.scale))
        as_sparse.append(full(matrix(delta)))
    wanted = made(name, part(CASES["ranks"](), WEIGHTS[:3]))
    close(made(name, part(turned, WEIGHTS[:3])), wanted, 1e-4)
    close(made(name, part(as_sparse, WEIGHTS[:3])), wanted, 1e-4)
    close(made(name, part([turned[0], as_sparse[1], turned[2]], WEIGHTS[:3])), wanted, 1e-4)


@every
def test_weights_scale_the_updates_first(name):
    deltas = CASES["lora"]()
    scaled_ = [LoRADelta(d.a, d.b, w * d.scale) for w, d in zip(WEIGHTS, deltas, strict=False)]
    close(made(name, part(deltas, WEIGHTS[:3])), made(name, part(scaled_)))


@every
def test_the_same_expert_again(name):
    """What is documented: Iso-C of the sum, and for the others the merge of that one."""
    one = small(1, 4)
    turned = LoRADelta(torch.flip(one.a, [0]) * 3, torch.flip(one.b, [1]) / 3, one.scale)
    options = {"ridge": 0.0} if name == "wudi" else {}
    alone = made(name, part([one], count=2), **options)
    both = made(name, part([one, turned]), **options)
    close(both, (2 if name == "iso_c" else 1) * alone, 1e-4)
    if name == "tsv":
        close(both, matrix(one), 1e-4)


@every
def test_one_expert(name):
    one = small(2, 4)
    w = matrix(one)
    if name == "iso_c":
        s = np.linalg.svd(w, compute_uv=False)[:4]
        got = np.linalg.svd(made(name, part([one])), compute_uv=False)
        np.testing.assert_allclose(got[:5], [*[s.mean()] * 4, 0], atol=1e-4)
    else:
        options = {"density": 1.0} if name in ("core_space", "knots") else {}
        close(made(name, part([one]), **options), w)


@every
def test_zeros_and_what_cancels(name):
    zero = LoRADelta(torch.randn(2, D_IN), torch.zeros(D_OUT, 2))
    nothing = SparseDelta(torch.zeros(0, dtype=torch.long), torch.zeros(0), (D_OUT, D_IN))
    assert not made(name, part([zero, nothing])).any()
    got = made(name, part([small(0), small(0)], (1.0, -1.0)))
    assert np.isfinite(got).all()
    if name == "iso_c":  # not a spectrum of rounding errors
        assert not got.any()


def test_noise_is_not_lifted_by_iso_c():
    """The same expert in other numbers leaves singular values of 1e-7 in the sum."""
    one = small(4, 3)
    r = torch.tensor([[1.0, 0.3, 0.1], [0.2, 0.7, 0.0], [0.0, 0.4, 1.3]])
    other = LoRADelta(r @ one.a, one.b @ torch.linalg.inv(r), one.scale)
    got = made("iso_c", part([one, other]))
    assert np.linalg.matrix_rank(got, tol=1e-3) == 3
    assert not made("iso_c", part([one, other], (1.0, -1.0))).any()


def test_nearly_the_same_expert_does_not_upset_tsv():
    """Each half of a direction, not one along it and one along the difference of the two."""
    one = small(4, 3)
    near = LoRADelta(one.a * (1 + 1e-6), one.b + 1e-6, one.scale)
    close(made("tsv", part([one, near])), matrix(one), 1e-4)


@pytest.mark.parametrize("inner", ["linear", "iso_c", "wudi"])
def test_core_space_loses_nothing(inner):
    """Merges that do not depend on the basis are the same inside and outside."""
    p = part([small(0), thin(1), small(2, 3)], WEIGHTS[:3])
    outside = {"linear": "linear"}.get(inner, inner)
    close(made("core_space", p, inner=inner), made(outside, p))
    space = space_of(p, exact=True)
    for (left, right), wanted in zip(space.pairs(), scaled(p), strict=True):
        close(dense(space.lift(left, right)), wanted)


def test_core_space_of_linear_is_linear_for_given_weights():
    experts = {f"e{i}": Expert("b", {"m": small(i)}, {}) for i in range(3)}
    weights = [0.2, 0.5, 0.3]
    got = MERGES["core_space"](experts, weights=weights, inner="linear")
    wanted = MERGES["linear"](experts, weights=weights)
    close(matrix(got.deltas["m"]), matrix(wanted.deltas["m"]))


def apart(i):
    """Experts of which none sees or moves what another does."""
    a, b = torch.zeros(2, D_IN), torch.zeros(D_OUT, 2)
    generator = torch.Generator().manual_seed(i)
    a[:, 4 * i : 4 * i + 4] = torch.randn(2, 4, generator=generator)
    b[3 * i : 3 * i + 3] = torch.randn(3, 2, generator=generator)
    return LoRADelta(a, b)


@pytest.mark.parametrize("name", ["tsv", "wudi"])
def test_experts_that_have_nothing_in_common_are_added(name):
    p = part([apart(0), apart(1), apart(2)], (1.0, 2.0, -1.0))
    close(made(name, p), sum(scaled(p)))


# --- WUDI ------------------------------------------------------------------------------------


def adam(taus, steps, rate=1e-5):
    """The authors' loop, with its gradient written out."""
    x = sum(taus).copy()
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t in range(1, steps + 1):
        g = gradient(x, taus)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x -= rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return x


@every_case
def test_the_exact_solution_of_wudi(case):
    p = part(CASES[case](), WEIGHTS[: len(CASES[case]())])
    taus = [w for w in scaled(p) if w.any()]
    got = made("wudi", p, ridge=0.0)
    close(got, slow_wudi(p, ridge=0.0), 1e-4)
    start = sum(taus)
    assert abs(gradient(got, taus)).max() < 1e-4 * (abs(gradient(0 * got, taus)).max())
    assert loss(got, taus) <= loss(adam(taus, 2000, 1e-2), taus) + 1e-6
    if len(taus) > 1:
        assert loss(got, taus) < 0.9 * loss(start, taus)
    # Of all minimisers the nearest to the start: nothing is changed where nothing is asked for.
    _, _, vt = spectrum(np.vstack(taus))
    outside = np.eye(len(vt.T)) - vt.T @ vt
    close((got - start) @ outside, 0 * start)


def test_where_inputs_differ_wudi_is_each_expert_on_its_own():
    p = part([small(s) for s in range(3)])
    for w in scaled(p):
        close(made("wudi", p, ridge=0.0) @ w.T, w @ w.T, 1e-4)


def test_the_papers_steps():
    p = part([small(s) for s in range(3)])
    taus = scaled(p)
    close(dense(wudi(p, steps=30)), adam(taus, 30))
    moved = abs(dense(wudi(p, steps=30)) - sum(taus)).max()
    assert 1e-4 < moved < 4e-4  # 30 steps of 1e-5


def test_the_ridge_leads_from_the_minimiser_to_the_sum():
    p = part([small(s) for s in range(3)], WEIGHTS[:3])
    taus = scaled(p)
    close(dense(wudi(p, ridge=1e7)), sum(taus), 1e-4)
    close(dense(wudi(p, ridge=1e-9)), slow_wudi(p, ridge=0.0), 1e-4)
    losses = [loss(dense(wudi(p, ridge=r)), taus) for r in (0.0, 0.1, 1.0, 10.0)]
    assert losses == sorted(losses)
    assert losses[0] < losses[1] < losses[3]


def test_options_that_make_no_sense():
    p = part([small(0)])
    for options in ({"ridge": -1.0}, {"steps": -1}):
        with pytest.raises(UsageError, match="0 or more"):
            wudi(p, **options)
    with pytest.raises(UsageError, match="did you mean ties"):
        made("core_space", p, inner="tie")
