"""Iso-C: a merged update with all its directions of one size."""

import torch

from adaptlib.merging.factors import NOISE
from adaptlib.merging.kept import Update
from adaptlib.merging.merge import Part
from adaptlib.merging.spaces import space_of


def iso_c(part: Part, *, scale: float = 1.0) -> Update:
    """Iso-C: the sum, with its singular values all set to their mean, so that no expert's strong
    directions drown another's.

    With Σ w_i ΔW_i = U diag(s) Vᵀ of rank k: ΔW = scale · mean(s) · U Vᵀ, w_i = 1 where none is
    given. Marczak et al. 2025 (arXiv:2502.04959), who choose the scale on data.

    A sum of LoRA is of rank k < min(d_out, d_in). Mean and directions here are those of its k
    singular values that are not zero, as in the code of Core Space (arXiv:2509.17786). That of
    TSV's authors takes all min(d_out, d_in) of the mean of the ΔW_i, and gives directions that no
    expert has, whichever the SVD returns for 0, the same weight as the others. Zero is what is
    below 1e-6 of the experts' norm. One expert is not itself again but its own directions evened
    out; the same expert n times is n times that.
    """
    space = space_of(part)
    total, square = space.zeros(*space.shape), 0.0
    for left, right in space.pairs():
        update = left @ right
        total += update
        square += float(update.square().sum())
    u, s, vt = torch.linalg.svd(total, full_matrices=False)
    few = int((s > NOISE * square**0.5).sum())  # of the parts: a sum may cancel
    size = float(s[:few].mean()) if few else 0.0
    return space.lift(scale * size * u[:, :few], vt[:few])
