"""ΔW as a product of two factors, and its singular values from them, without ΔW itself.

All geometry of a product L R is in two small Gram matrices, LᵀL and R Rᵀ. They are made and
decomposed in float64: singular values down to 1e-8 of the largest then are numbers and not noise,
which is more than factors of float32 can say. It costs a third of the QR of both factors.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from adaptlib.experts.delta import Delta
from adaptlib.experts.lora import LoRADelta

NOISE = 1e-6  # of the largest: a singular value below is rounding of float32 factors, and is 0
OVERSAMPLING = 16
PASSES = 3  # of power iteration; each costs two products with the matrix


class Factors(NamedTuple):
    """ΔW = left @ right."""

    left: Float[Tensor, "d_out rank"]
    right: Float[Tensor, "rank d_in"]


class SVD(NamedTuple):
    """u @ diag(s) @ vt, `s` falling."""

    u: Float[Tensor, "d_out rank"]
    s: Float[Tensor, " rank"]
    vt: Float[Tensor, "rank d_in"]


def factors(delta: Delta) -> Factors:
    """Exact float32 factors of an update of any kind: of LoRA its own, the scale in `left`. Of a
    sparse one its rows (or its columns, if these are fewer) that are not zero, and where they
    are."""
    if isinstance(delta, LoRADelta):
        return Factors(delta.b.float() * delta.scale, delta.a.float())
    dense = delta.dense()
    rows = dense.any(dim=1).nonzero().squeeze(1)
    columns = dense.any(dim=0).nonzero().squeeze(1)
    if not len(rows):  # a rank of zero would be no LoRA
        rows = columns = torch.zeros(1, dtype=torch.long, device=dense.device)
    if len(rows) <= len(columns):
        return Factors(_places(rows, dense.shape[0]).T, dense[rows])
    return Factors(dense[:, columns], _places(columns, dense.shape[1]))


def stacked(deltas: Sequence[Delta], weights: Sequence[float]) -> Factors:
    """Factors of Σ w_i ΔW_i, the experts' side by side."""
    pairs = [factors(delta) for delta in deltas]
    left = torch.cat([p.left * w for p, w in zip(pairs, weights, strict=True)], dim=1)
    return Factors(left, torch.cat([p.right for p in pairs]))


def svd_of(pair: Factors) -> SVD:
    """The SVD of left @ right in factor space: Gram matrices and eigenproblems of size rank (never
    more than min(d_out, d_in)), in float64; the vectors in the dtype of the factors.

    Only singular values above NOISE times the largest are returned: as many as the numerical rank,
    whatever the factors' own. A zero matrix has one, 0.
    """
    dtype = pair.left.dtype
    left, right = pair.left.double(), pair.right.double()
    if left.shape[1] < min(len(left), right.shape[1]):
        gram = left.T @ left
        mix, s = directions(gram, root(right @ right.T))
        u = left @ mix
        vt = (gram @ mix * _inverse(s)).T @ right  # ΔWᵀ u = Rᵀ (LᵀL) mix = v s
    else:  # the product is no larger than its factors
        dense = left @ right
        if len(dense) <= dense.shape[1]:
            u, s = principal(dense @ dense.T)
            vt = _inverse(s)[:, None] * (u.T @ dense)
        else:
            v, s = principal(dense.T @ dense)
            u, vt = dense @ v * _inverse(s), v.T
    return SVD(u.to(dtype), s.to(dtype), vt.to(dtype))


def root(gram: Float[Tensor, "rank rank"]) -> Float[Tensor, "rank rank"]:
    """K with K Kᵀ = a positive semidefinite matrix, of any rank and with rows of any size."""
    size = gram.diagonal().clamp(min=0).sqrt()
    unit = _inverse(size)
    values, vectors = torch.linalg.eigh(gram * unit[:, None] * unit)
    return size[:, None] * vectors * values.clamp(min=0).sqrt()


def principal(
    gram: Float[Tensor, "size size"],
) -> tuple[Float[Tensor, "size few"], Float[Tensor, " few"]]:
    """Left singular vectors and the singular values, falling, of X with X Xᵀ = `gram`."""
    squares, vectors = torch.linalg.eigh(gram)  # rising
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    count = max(1, int((squares > NOISE**2 * squares[0]).sum()))
    return vectors[:, :count], squares[:count].sqrt()


def directions(
    gram: Float[Tensor, "rank rank"], other: Float[Tensor, "rank rank"]
) -> tuple[Float[Tensor, "rank few"], Float[Tensor, " few"]]:
    """The left singular vectors of L R as L @ mix, and the singular values, falling, from
    `gram` = LᵀL and `other`, any K with K Kᵀ = R Rᵀ."""
    vectors, s = principal(other.T @ gram @ other)
    return other @ vectors * _inverse(s), s


def dense_svd(matrix: Float[Tensor, "d_out d_in"], rank: int) -> SVD:
    """The `rank` largest singular values of a matrix and their vectors. All of them are computed
    where that is not much more work; else a randomized range finder with a fixed seed and three
    power iterations (Halko et al. 2011, algorithm 4.4), near the optimum: what it loses is told by
    whoever keeps the result."""
    if 4 * (rank + OVERSAMPLING) >= min(matrix.shape):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return SVD(u[:, :rank], s[:rank], vt[:rank])
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], rank + OVERSAMPLING, generator=generator)
    q = torch.linalg.qr(matrix @ start.to(matrix))[0]
    for _ in range(PASSES):
        q = torch.linalg.qr(matrix.T @ q)[0]
        q = torch.linalg.qr(matrix @ q)[0]
    u, s, vt = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return SVD(q @ u[:, :rank], s[:rank], vt[:rank])


def as_lora(found: SVD) -> LoRADelta:
    """The product as LoRA, the singular values shared between A and B."""
    shared = found.s.clamp(min=0).sqrt()
    return LoRADelta((shared[:, None] * found.vt).contiguous(), (found.u * shared).contiguous())


def _places(index: Tensor, size: int) -> Float[Tensor, "n size"]:
    places = torch.zeros(len(index), size, device=index.device)
    places[torch.arange(len(index), device=index.device), index] = 1.0
    return places


def _inverse(s: Float[Tensor, " few"]) -> Float[Tensor, " few"]:
    """1/s, and 0 for 0."""
    return torch.where(s > 0, 1 / s.clamp(min=torch.finfo(s.dtype).tiny), 0.0)
