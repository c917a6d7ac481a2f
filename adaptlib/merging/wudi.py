"""WUDI: the update that does on each expert's own inputs what that expert does."""

import torch
from torch import Tensor

from adaptlib.errors import UsageError
from adaptlib.merging.factors import NOISE
from adaptlib.merging.kept import Update
from adaptlib.merging.merge import Part
from adaptlib.merging.spaces import Space, space_of

LEARNING_RATE = 1e-5  # of the paper's Adam


def wudi(part: Part, *, scale: float = 1.0, ridge: float = 0.1, steps: int = 0) -> Update:
    """WUDI: the update that, on the inputs an expert listens to, differs least from that expert.

    min over ΔW of Σ ‖(ΔW - τ_i) τ_iᵀ‖² / ‖τ_i‖² with τ_i = w_i ΔW_i, w_i = 1 where none is given.
    Cheng et al. 2025 (arXiv:2503.08099). It is a quadratic, and solved: with
    G = Σ τ_iᵀτ_i / ‖τ_i‖², H = Σ τ_i τ_iᵀτ_i / ‖τ_i‖² and c = ridge · mean(λ(G)), over λ > 0,
    ΔW = scale · (H + c Σ τ_i)(G + c)⁻¹.

    With ridge 0 this is H G⁺, of all minimisers the nearest to Σ τ_i and the smallest. Where no
    expert's inputs are a combination of the others', it is each expert on its own inputs, exactly;
    but where they are nearly that, as with A's that all began as one, it answers their small
    differences with large numbers. `ridge` holds it near Σ τ_i: it adds c ‖ΔW - Σ τ_i‖² to the sum.

    The paper runs Adam from Σ τ_i instead, 300 steps at 1e-5, which ends near the start: `steps`
    does that, in dense matrices and without a ridge. mttl divides its result by N (scale = 1/N),
    the paper and fusion_bench do not. A zero update takes no part; theirs divides by 0 there.
    """
    if ridge < 0 or steps < 0:
        raise UsageError(f"ridge and steps are 0 or more; got {ridge} and {steps}")
    space = space_of(part)
    start, g, h = _quadratic(space)
    values, vectors = torch.linalg.eigh(g)
    listened = values > max(NOISE**2 * float(values[-1]), 0.0)  # in the others nothing is asked for
    values, vectors = values[listened], vectors[:, listened]
    start, h = start @ vectors, h @ vectors
    if steps:
        return scale * _adam(space, start, values, h, vectors, steps)
    pull = ridge * float(values.mean()) if len(values) else 0.0
    return space.lift(scale * (h + pull * start) / (values + pull), vectors.T)


def _quadratic(space: Space) -> tuple[Tensor, Tensor, Tensor]:
    """Σ τ_i, G and H, in the coordinates of the space."""
    many, few = space.shape
    start, h, g = space.zeros(many, few), space.zeros(many, few), space.zeros(few, few)
    for left, right in space.pairs():
        update = left @ right
        start += update
        if (square := update.square().sum()) > 0:
            gram = right.T @ (left.T @ left / square) @ right
            g += gram
            h += update @ gram
    return start, g, h


def _adam(
    space: Space, start: Tensor, values: Tensor, h: Tensor, vectors: Tensor, steps: int
) -> Tensor:
    """The paper's iteration, on the dense matrix: Adam's steps depend on its entries."""
    # The gradient is 2 (ΔW G - H), with G = Q diag(values) Qᵀ and H = h Qᵀ.
    q = space.right.lift(vectors)  # (d_in, few)
    wanted, update = space.left.lift(h), space.left.lift(start) @ q.T
    values = values.float()
    adam = torch.optim.Adam([update], lr=LEARNING_RATE)
    for _ in range(steps):
        update.grad = 2 * ((update @ q * values - wanted) @ q.T)
        adam.step()
    return update
