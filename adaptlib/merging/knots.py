"""KnOTS: TIES in a basis that all experts share."""

from adaptlib.merging.kept import Update
from adaptlib.merging.merge import Part
from adaptlib.merging.spaces import Side, Space, side_of
from adaptlib.merging.ties import ties


def knots(part: Part, *, density: float = 0.2, scale: float = 1.0) -> Update:
    """KnOTS: TIES on the experts' updates after all were written in one basis of the output.

    SVD of [ΔW_1 ... ΔW_n] = U Σ [V_1 ... V_n], weights in it; TIES on the matrices Σ V_i;
    ΔW = U · merged. Stoica et al. 2024 (arXiv:2410.19735). `density` and `scale` are those of TIES;
    the authors' configurations have 0.2 and 0.6 for CLIP, 1 and 0.5 for Llama.

    With density 1 one expert is itself again. The basis is unique but for signs, which TIES does
    not see, where the singular values differ; the same expert n times is TIES on Σ V of that
    expert. The authors trim over all modules at once, here each module keeps its share; the code
    of Core Space (arXiv:2509.17786) runs TIES on V_i and multiplies by Σ afterwards.
    """
    space = Space(part, side_of(part, "left", exact=True), Side())
    return space.lift_update(ties(space.small(), density=density, scale=scale))
