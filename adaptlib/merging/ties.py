"""TIES-Merging: trim, elect a sign, merge what agrees."""

from adaptlib.merging.entries import by_entries, elected
from adaptlib.merging.kept import Update
from adaptlib.merging.merge import Part
from adaptlib.merging.trim import cuts, kept_count, trim


def ties(part: Part, *, density: float = 0.2, scale: float = 1.0, elect: str = "total") -> Update:
    """TIES: of each expert only the largest entries, then at each entry the mean of those experts
    that have the sign on which they agree.

    τ_i = ΔW_i where |ΔW_i| is among its `density` · d_out · d_in largest, else 0. s = the sign of
    Σ τ_i (`elect="total"`), or the sign that more of them have (`"frequency"`); plus in a tie.
    ΔW = scale · Σ w_i τ_i [sgn τ_i = s] / #{i: sgn τ_i = s}, with w_i = 1 where none is given.

    Yadav et al. 2023 (arXiv:2306.01708), section 3; trimmed module by module. As PEFT's `ties_svd`
    (`on="factors"`: its `ties`): weights have no part in the election, so one that is negative
    subtracts where its expert agrees. mergekit elects by Σ w_i τ_i and divides by the sum of the
    weights that agree; with equal weights that is the same.
    """
    ends = cuts(part, kept_count(part, density))
    return by_entries(
        part,
        elected(part.weights, scale, elect),
        lambda i, chunk: trim(chunk, i, ends[i][0]),
    )
