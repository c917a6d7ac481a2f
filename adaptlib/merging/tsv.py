"""TSV-Merge: the experts' singular vectors, made orthogonal to one another."""

import torch
from jaxtyping import Float
from torch import Tensor

from adaptlib.merging.factors import svd_of
from adaptlib.merging.kept import Update
from adaptlib.merging.merge import Part
from adaptlib.merging.spaces import space_of

ALIKE = 1e-4  # singular vectors that differ by less are one direction


def tsv(part: Part, *, scale: float = 1.0) -> Update:
    """TSV-Merge: the strongest singular directions of each expert, turned until no two experts'
    interfere.

    Of each w_i ΔW_i = U_i Σ_i V_iᵀ the top min(d_out, d_in)/N triplets (at least 1), w_i = 1 where
    none is given, side by side as U, Σ, V; U⊥ and V⊥ are the nearest matrices with orthonormal
    columns (Procrustes: P Qᵀ with U = P D Qᵀ); ΔW = scale · U⊥ Σ V⊥ᵀ. Gargiulo et al. 2025
    (arXiv:2412.00081); their code has no scale.

    Directions of size 0, in an expert or in U and V together, stay out; the authors' code has
    them take part with whatever vectors the SVD returns for them. So LoRA of rank r keeps
    min(r, min(d_out, d_in)/N) triplets, experts that see and move different directions give their
    sum, and the same expert n times, or once, gives that expert.
    """
    space = space_of(part)
    most = max(1, min(part.shape) // part.count)
    us, sizes, vts = [], [], []
    for pair in space.pairs():
        u, s, vt = svd_of(pair)
        few = min(most, int((s > 0).sum()))
        us.append(u[:, :few])
        sizes.append(s[:few])
        vts.append(vt[:few])
    sides = orthogonal(torch.cat(us, dim=1)), orthogonal(torch.cat(vts).T)
    return space.lift(scale * sides[0] * torch.cat(sizes), sides[1].T)


def orthogonal(x: Float[Tensor, "k many"]) -> Float[Tensor, "k many"]:
    """The nearest matrix with orthonormal columns; where columns of `x` depend on one another, of
    orthonormal columns within what they span."""
    if not x.numel():
        return x
    p, d, qt = torch.linalg.svd(x, full_matrices=False)
    few = int((d > ALIKE).sum())
    return p[:, :few] @ qt[:few]
